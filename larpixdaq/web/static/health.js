// What the state says about run, losses and problems. A word of praise appears nowhere: what is not known is called so.

import { age, bytes, count, cut, known, percent, plural, rate, utc } from "./format.js";

// Levels, from the least important. "stale": the number is old, or nothing is known.
const ORDER = ["", "note", "warning", "stale", "alarm"];
export const rank = (level) => ORDER.indexOf(level);
export const worst = (levels) => levels.reduce((found, level) => (rank(level) > rank(found) ? level : found), "");

export const components = (live, kind) =>
  (live.state.status?.components ?? []).filter((component) => !kind || component.kind === kind);

// Whether the web server hears the core, and the page the web server.
export const current = (live) => live.fresh && Boolean(live.state.core?.connected) && Boolean(live.state.status);

// Seconds since a component was heard by the core.
export function heard(live, component) {
  return component.heard_s + live.age("status");
}

// The state of the run as {word, level, text}; the word is large in the header.
export function runState(live) {
  const status = live.state.status;
  if (!status) return { word: "UNKNOWN", level: "stale", text: "the state is not known yet" };
  const run = status.run;
  const busy = status.busy ? `${status.busy} in progress` : "";
  const parts = [];
  if (run) parts.push(`run ${run.run}`, run.kind);
  else if (status.last_run) parts.push(`last run ${status.last_run.run}`);
  else parts.push("no run yet");
  if (busy) parts.push(busy);
  const level = current(live) ? ({ RUN: "run", READY: "ready" }[status.state] ?? "stop") : "stale";
  return { word: status.state, level, text: parts.join(" · ") };
}

// Seconds since begin_run, by the clock of the web server's host; null when no run goes on.
export function elapsed(live) {
  const run = live.state.status?.run;
  if (!known(run?.begun)) return null;
  return Math.max(0, (known(run.ended) ? run.ended : live.now()) - run.begun);
}

// Whether anything is lost in the present run, or was in the last one: {level, text, note, hint}.
export function losses(live) {
  const status = live.state.status;
  if (!status) return { level: "stale", text: "not known" };
  const producers = components(live, "producer");
  const run = status.run?.run ?? null;
  if (run === null) {
    const last = status.last_run;
    if (!last) return { level: "", text: "no run yet" };
    const level = { COMPLETE: "", "COMPLETE, suspect": "warning", ABORTED: "warning" }[last.condition] ?? "alarm";
    return {
      level,
      text: last.condition.replace("COMPLETE, ", ""),
      note: `last run, ${last.run}`,
      hint: last.reasons.join("\n"),
    };
  }
  // What was found, the worst first: [level, text for the bar, details].
  const away = producers.filter((producer) => !producer.alive).map((producer) => producer.name);
  const absent = [...new Set([...(status.run.missing ?? []), ...away])];
  const counted = producers.filter((producer) => producer.alive && producer.status?.counted_run === run);
  const sum = (name) => counted.reduce((total, producer) => total + (producer.status[name] ?? 0), 0);
  const groups = (verdict) =>
    counted.flatMap((producer) =>
      Object.entries(producer.status.verdicts ?? {})
        .filter(([, found]) => found === verdict)
        .map(([group]) => group),
    );
  const found = [];
  if (absent.length || !producers.length)
    found.push(["alarm", "not known", `not heard: ${absent.join(", ") || "any producer"}`]);
  const uncounted = producers.filter((producer) => producer.alive && !counted.includes(producer));
  if (uncounted.length)
    found.push(["stale", "not known", `no counts of ${uncounted.map((producer) => producer.name).join(", ")} yet`]);
  if (sum("dropped")) found.push(["alarm", `${plural(sum("dropped"), "row")} dropped`, "no room in ring and spool"]);
  if (groups("lost").length) found.push(["alarm", "LOST", `before the host, io_group ${groups("lost").join(", ")}`]);
  if (groups("suspect").length)
    found.push(["warning", "suspect", `before the host, io_group ${groups("suspect").join(", ")}`]);
  if (sum("unknown")) found.push(["warning", plural(sum("unknown"), "unknown word"), "kept in the file"]);
  const [[, text, note]] = found.length ? found : [["", "no loss seen", `run ${run}`]];
  const hint = found.map(([, words, details]) => `${words}: ${details}`).join("\n");
  return { level: worst(found.map(([level]) => level)), text, note, hint };
}

// What is wrong, the worst first: [{level, text}]. Open alarms are not repeated here; they have a table of their own.
export function problems(live) {
  const found = [];
  const add = (level, text) => found.push({ level, text });
  if (!live.connected)
    add(
      "stale",
      `no connection to the web server for ${age((performance.now() - live.lostAt) / 1000)}: everything here is old`,
    );
  else if (!live.fresh)
    add("stale", `nothing heard from the web server for ${age(live.silence)}: everything here is old`);
  const { core, status } = live.state;
  if (core && !core.connected)
    add(
      "stale",
      `the core has not been heard for ${known(core.heard_s) ? age(core.heard_s + live.age("core")) : "an unknown time"}: all of this is old`,
    );
  if (!status) {
    add("stale", "the state of the system is not known yet");
    return found;
  }
  const open = new Set((live.state.alarms ?? []).map((alarm) => `${alarm.condition} ${alarm.component}`));
  const { groups } = live.state;
  const grouped = new Set((groups ?? []).flatMap((group) => group.members.map((member) => member.name)));
  for (const group of groups ?? []) if (group.level) add(group.level, groupProblem(group));
  for (const name of status.run?.missing ?? []) if (!grouped.has(name)) add("alarm", `${name} is missing in this run`);
  for (const component of groups ? [] : status.components) {
    if (!component.alive && !open.has(`component-lost ${component.name}`))
      add("alarm", `${component.name} is LOST, last heard ${age(heard(live, component))} ago`);
    else if (component.alive && component.stuck && !open.has(`component-stuck ${component.name}`))
      add("warning", `${component.name} is stuck: ${plural(component.queued, "waiting item")}, no progress`);
    if (component.alive) add_component(component, open, add);
  }
  for (const kind of ["producer", "storage", "run_data"]) {
    if (!status.components.some((component) => component.kind === kind && component.alive))
      add(
        kind === "run_data" ? "warning" : "alarm",
        `no ${{ producer: "producer", storage: "storage", run_data: "online monitor" }[kind]} is alive`,
      );
  }
  if (live.state.monitor_problem) add("warning", `online monitor: ${live.state.monitor_problem}`);
  if (status.insecure)
    add("warning", "no keys are in use: everybody who can connect to the core can control the detector");
  if (status.audit?.lost || status.audit?.error)
    add(
      "warning",
      `audit: ${plural(status.audit.lost ?? 0, "row")} lost${status.audit.error ? `: ${status.audit.error}` : ""}`,
    );
  return found.sort((one, other) => rank(other.level) - rank(one.level));
}

// A group in one line: how many of its components live, and the worst of them.
function groupProblem(group) {
  const [worst, ...others] = group.members.filter((member) => member.level);
  const more = others.length ? `, and ${plural(others.length, "more component")} with a problem` : "";
  return `${group.name}: ${group.state}; ${worst.name}: ${worst.problems[0]}${more}`;
}

function add_component(component, open, add) {
  const facts = component.status ?? {};
  if (component.kind === "storage" && facts.paused && !open.has(`storage-paused ${component.name}`))
    add("alarm", `${component.name} is PAUSED: ${facts.paused}`);
  for (const board of facts.boards ?? []) {
    if (known(board.away_since) && !open.has(`board-disconnected ${component.name}`))
      add("warning", `io_group ${board.io_group} (${board.name}) is NOT CONNECTED since ${utc(board.away_since)}`);
  }
  for (const process of facts.processes ?? []) {
    if (process.state === "given up" && !open.has(`given-up ${component.name}`))
      add("alarm", `${process.name} was given up: ${process.last_exit || process.last_line}`);
    else if (process.state === "waiting")
      add("warning", `${process.name} waits for its next start: it ${process.last_exit}`);
  }
}

// The most important figures of a component as one line.
export function details(component) {
  const facts = component.status ?? {};
  const info = component.info ?? {};
  const parts = ["source", "directory", "file"].filter((name) => info[name]).map((name) => cut(String(info[name]), 80));
  if (component.kind === "producer") parts.push(...producer(facts));
  else if (component.kind === "storage") parts.push(...storage(facts));
  else if (component.kind === "run_data")
    parts.push(
      known(facts.run) ? `run ${facts.run}: ${rate(facts.rate)}, ${count(facts.packets, "packets")}` : "no run yet",
    );
  else if (component.kind === "log")
    parts.push(
      `${count(facts.written ?? null, "records written")}`,
      ...(facts.lost ? [`${plural(facts.lost, "record")} lost`] : []),
    );
  else if (component.kind === "supervisor") parts.push(...supervisor(facts));
  if (component.kind === "run_data" && known(facts.seen) && facts.seen < 1)
    parts.push(`${percent(facts.seen)} of the rows seen`);
  return parts.join("; ");
}

function producer(facts) {
  const run = facts.run !== null && facts.run !== undefined;
  const parts = [
    run ? count(facts.packets, "packets of the run") : count(facts.outside_run, "packets outside of runs"),
  ];
  if (facts.dropped) parts.push(`${plural(facts.dropped, "row")} dropped`);
  if (facts.unknown) parts.push(plural(facts.unknown, "unknown word"));
  if (facts.bad_parity) parts.push(`${count(facts.bad_parity)} with bad parity`);
  if (facts.owed_blocks) parts.push(`${plural(facts.owed_blocks, "block")} pending, ring ${percent(facts.ring)} full`);
  if (facts.spooled_blocks)
    parts.push(`${plural(facts.spooled_blocks, "block")} in the spool (${bytes(facts.spooled_bytes)})`);
  if (facts.finished) parts.push("source finished");
  return parts;
}

function storage(facts) {
  const parts = [];
  if (known(facts.free_bytes)) parts.push(`${bytes(facts.free_bytes)} free`);
  if (facts.paused) parts.push("PAUSED");
  if (known(facts.seconds_left) && facts.seconds_left >= 0)
    parts.push(`disk full in ${age(facts.seconds_left)} at ${bytes(facts.bytes_per_second)}/s`);
  if (facts.files?.length)
    parts.push(
      `writing ${facts.files.map((file) => file.split("/").pop()).join(", ")}: ${count(facts.rows, "rows")}, ${bytes(facts.bytes)}`,
    );
  if (facts.recovering?.length) parts.push(`recovering ${facts.recovering.join(", ")}`);
  if (facts.not_recovered?.length) parts.push(`NOT RECOVERED: ${facts.not_recovered.join(", ")}`);
  const last = facts.finished?.at(-1);
  if (last) parts.push(`last closed: ${last.file.split("/").pop()}, ${bytes(last.bytes)}, ${last.condition}`);
  return parts;
}

function supervisor(facts) {
  const processes = facts.processes ?? [];
  const running = processes.filter((process) => process.state === "running").length;
  const restarted = processes.filter((process) => process.restarts);
  return [
    `${running} of ${processes.length} processes running`,
    ...restarted.map((process) => `${process.name} started again ${process.restarts} ×, last: it ${process.last_exit}`),
  ];
}

const VERDICTS = { suspect: "warning", lost: "alarm" };
export const verdictLevel = (board) => VERDICTS[board.verdict] ?? "";

// What is doubtful about a board's data, as texts.
export function doubts(board) {
  const silent = known(board.counts?.silent) ? `no packet for ${age(board.counts.silent)}` : "";
  return [...(board.setup ?? []), board.changed, silent].filter(Boolean);
}

export const boardLevel = (board) =>
  worst([
    !board.alive || known(board.away_since) ? "alarm" : "",
    verdictLevel(board),
    doubts(board).length ? "warning" : "",
  ]);

// All boards: [{producer, alive, io_group, name, ...}].
export function boards(live) {
  return components(live, "producer").flatMap((component) => {
    const facts = component.status ?? {};
    const groups = new Map((facts.groups ?? []).map((group) => [group.io_group, group]));
    return (facts.boards ?? []).map((board) => ({
      ...board,
      producer: component.name,
      alive: component.alive,
      firmware: facts.firmware?.[String(board.io_group)] ?? "",
      verdict: facts.verdicts?.[String(board.io_group)] ?? "",
      counts: groups.get(board.io_group) ?? null,
    }));
  });
}
