// Tab Run: the run and its buttons, components, boards, alarms, and the end of the log.

import {
  Facts,
  Table,
  ask,
  button,
  element,
  field,
  input,
  panel,
  select,
  setAttribute,
  setOptions,
  setText,
} from "./elements.js";
import { age, brief, clock, count, cut, digits, duration, known, percent, plural, seconds, utc } from "./format.js";
import { Groups, groupNames, makeGroups } from "./groups.js";
import {
  boardLevel,
  boards,
  components,
  current,
  details,
  doubts,
  elapsed,
  heard,
  verdictLevel,
} from "./health.js";

const LEVELS = ["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"];
const HISTORY = [
  ["3600", "last hour"],
  ["43200", "last 12 h"],
  ["86400", "last 24 h"],
  ["604800", "last 7 days"],
];
const componentKey = (component) => `${component.name} ${component.alive}`;
const boardKey = (board) => `${board.producer} ${board.io_group}`;
const alarmKey = (alarm) => alarm.id;

export class RunTab {
  constructor(app) {
    this.app = app;
    this.live = app.live;
    this.requests = app.requests;
    this.outcome = null;
    const run = this.runPanel();
    const alarms = this.alarmPanel();
    this.components = this.componentTable("Components");
    this.groups = new Groups(
      "Components",
      (label) => this.componentTable(label, ["run", "queued", "log from"]),
      componentKey,
    );
    this.boards = this.boardTable("Boards");
    this.boardGroups = new Groups("Boards", (label) => this.boardTable(label), boardKey);
    const componentPanel = panel("Components", { class: "components" }, this.components.node, this.groups.node);
    componentPanel.tools.append(this.groups.toggleAll);
    this.componentNote = componentPanel.note;
    const boardPanel = panel("Boards", { class: "boards" }, this.boards.node, this.boardGroups.node);
    boardPanel.tools.append(this.boardGroups.toggleAll);
    this.boardNote = boardPanel.note;
    this.node = element(
      "div",
      { class: "grid run-grid" },
      run,
      alarms,
      componentPanel.panel,
      boardPanel.panel,
      this.logPanel(),
    );
  }

  runPanel() {
    this.facts = new Facts("The run");
    this.comment = input({ maxlength: "10000" });
    this.kind = input({ maxlength: "64", list: "run-kinds", placeholder: "physics" });
    this.shifter = input({ maxlength: "100" });
    this.log = input({ maxlength: "10000" });
    this.buttons = {
      prepare: button("Prepare run…", () => this.prepare(), { class: "primary" }),
      begin: button("Begin run…", () => this.begin(), { class: "primary" }),
      end: button("End run…", () => this.end(), { class: "primary" }),
      abort: button("Abort run…", () => this.abort(), { class: "danger" }),
    };
    this.why = element("p", { class: "note", id: "why-not" });
    this.progress = element("p", { class: "progress-line", "aria-live": "polite" });
    this.bar = element("progress", { hidden: true, "aria-label": "progress of the request" });
    this.outcomeList = element("ul", { class: "outcome" });
    this.take = button("Take control…", () => this.takeControl());
    this.release = button("Release control", () => this.requests.try("release_control", "release_control"));
    this.setShifter = button("Set", () =>
      this.requests.try(`shifter ${this.shifter.value}`, "set_shifter", { name: this.shifter.value }),
    );
    this.addComment = button("Add to the e-log", () => this.addToLog());
    const kinds = element(
      "datalist",
      { id: "run-kinds" },
      ...["physics", "calibration", "cosmics", "test"].map((kind) => element("option", { value: kind })),
    );
    const made = panel(
      "Run control",
      { class: "control" },
      this.facts.node,
      field("Comment of the next run", this.comment).row,
      element(
        "div",
        { class: "row" },
        field("Kind", this.kind).row,
        field("Shifter", this.shifter).row,
        this.setShifter,
      ),
      kinds,
      element("div", { class: "buttons big" }, ...Object.values(this.buttons)),
      this.why,
      element("div", { class: "progress-row" }, this.progress, this.bar),
      this.outcomeList,
      element("div", { class: "row" }, field("Comment on the run, for the e-log", this.log).row, this.addComment),
      element("div", { class: "buttons" }, this.take, this.release),
    );
    this.log.addEventListener("keydown", (event) => {
      if (event.key === "Enter") this.addToLog();
    });
    return made.panel;
  }

  alarmTable(label) {
    return new Table(
      label,
      [
        {
          title: "level",
          text: (alarm) => alarm.level.toUpperCase(),
          level: (alarm) => (alarm.acknowledged ? "acknowledged" : alarm.level),
        },
        {
          title: "alarm",
          wide: true,
          text: (alarm) => cut(alarm.text, 240),
          hint: (alarm) => `${alarm.condition} · ${alarm.component || "core"} · ${alarm.subject}\n${alarm.text}`,
        },
        {
          title: "for",
          number: true,
          text: (alarm) => age(this.live.now() - alarm.raised),
          hint: (alarm) => `since ${utc(alarm.raised)}`,
        },
        { title: "times", number: true, text: (alarm) => count(alarm.count) },
        {
          title: "acknowledged",
          wide: true,
          text: (alarm) => (alarm.acknowledged ? `by ${alarm.by}${alarm.comment ? `: ${alarm.comment}` : ""}` : "no"),
        },
        {
          title: "",
          node: (alarm, row) =>
            button("Acknowledge…", () => this.acknowledge([row.item]), {
              "aria-label": `Acknowledge alarm ${alarm.id}`,
            }),
          renew: (cell, alarm) =>
            setAttribute(cell.firstChild, "disabled", Boolean(alarm.acknowledged) || !this.app.mayChange),
        },
      ],
      { empty: "no alarm is open", className: "alarms" },
    );
  }

  alarmPanel() {
    this.alarms = this.alarmTable("Open alarms");
    // Each of them is a problem: unfolded they would be as long as their table.
    this.alarmGroups = new Groups("Open alarms", (label) => this.alarmTable(label), alarmKey, { folded: true });
    this.history = new Table(
      "History of alarms",
      [
        { title: "time", text: (row) => utc(row.time_ns / 1e9) },
        { title: "event", text: (row) => row.event },
        {
          title: "level",
          text: (row) => row.level.toUpperCase(),
          level: (row) => (row.event === "raised" ? row.level : ""),
        },
        { title: "alarm", wide: true, text: (row) => row.text },
        { title: "by", wide: true, text: (row) => [row.who, row.comment].filter(Boolean).join(": ") },
      ],
      { empty: "no alarm in this time" },
    );
    this.span = select(HISTORY, { "aria-label": "Time span of the history" });
    this.history.node.hidden = true;
    const show = button("Show history", async () => {
      const found = await this.requests.try(
        "history of alarms",
        "alarms",
        { history: true, since: Math.max(0, this.live.now() - Number(this.span.value)), limit: 1000 },
        { quiet: true },
      );
      if (found) {
        this.history.node.hidden = false;
        this.history.update(
          [...found.history].reverse().map((row, place) => ({ ...row, place })),
          (row) => row.place,
        );
      }
    });
    const all = button("Acknowledge all…", () =>
      this.acknowledge((this.live.state.alarms ?? []).filter((alarm) => !alarm.acknowledged)),
    );
    this.acknowledgeAll = all;
    this.alarmBox = element("div", { class: "scroll-box" }, this.alarms.node);
    const made = panel(
      "Alarms",
      { class: "alarm-panel" },
      this.alarmBox,
      this.alarmGroups.node,
      element("div", { class: "row" }, all, this.span, show),
      this.history.node,
    );
    made.tools.append(this.alarmGroups.toggleAll);
    this.alarmNote = made.note;
    return made.panel;
  }

  // `without`: titles of columns that the table does not have.
  componentTable(label, without = []) {
    const load = (component) => component.status?.load;
    const columns = [
      { title: "component", text: (component) => component.name },
      { title: "kind", text: (component) => component.kind.replace("run_data", "monitor") },
      {
        title: "health",
        text: (component) => this.health(component)[0],
        level: (component) => this.health(component)[1],
      },
      {
        title: "heard",
        number: true,
        text: (component) => `${age(heard(this.live, component))} ago`,
        level: (component) => (heard(this.live, component) > 1.5 ? "stale" : ""),
      },
      { title: "run", number: true, text: (component) => (known(component.run) ? String(component.run) : "–") },
      { title: "queued", number: true, text: (component) => count(component.queued) },
      {
        title: "CPU",
        number: true,
        text: (component) => percent(load(component)?.process),
        hint: () => "of one core, in the last seconds",
        level: (component) => (load(component)?.loop > 0.95 ? "warning" : ""),
      },
      { title: "log from", text: (component) => component.log_level || "–" },
      {
        title: "figures",
        wide: true,
        text: (component) => [...(component.problems ?? []), details(component)].filter(Boolean).join("\n") || "–",
      },
    ];
    return new Table(
      label,
      columns.filter((column) => !without.includes(column.title)),
    );
  }

  health(component) {
    if (!current(this.live)) return ["not known", "stale"];
    if (!component.alive) return ["LOST", "alarm"];
    return component.stuck ? ["stuck", "warning"] : ["alive", "alive"];
  }

  boardTable(label) {
    const share = (board, part) => (board.counts?.packets ? percent(board.counts[part] / board.counts.packets) : "–");
    return new Table(
      label,
      [
        { title: "io_group", number: true, text: (board) => String(board.io_group) },
        { title: "board", wide: true, text: (board) => board.name, hint: (board) => `read by ${board.producer}` },
        {
          title: "connection",
          text: (board) => this.connection(board)[0],
          level: (board) => this.connection(board)[1],
          hint: (board) => board.problem,
        },
        {
          title: "clock offset",
          number: true,
          text: (board) =>
            board.clock ? `${seconds(board.clock.offset)} ± ${seconds(board.clock.offset_uncertainty)}` : "not known",
          hint: (board) => board.clock?.text,
        },
        {
          title: "drift",
          number: true,
          text: (board) =>
            known(board.clock?.drift)
              ? `${digits(board.clock.drift, 3)} ± ${digits(board.clock.drift_uncertainty, 2)} ppm`
              : "not known",
        },
        {
          title: "verdict",
          text: (board) => board.verdict || "not known",
          level: verdictLevel,
          hint: () => "verdict on losses between chips and this computer, in the run",
        },
        { title: "packets", number: true, text: (board) => (board.counts ? count(board.counts.packets) : "–") },
        { title: "bad parity", number: true, text: (board) => share(board, "bad_parity") },
        {
          title: "FIFO full",
          number: true,
          text: (board) => (known(board.counts?.fifo_full) ? share(board, "fifo_full") : "–"),
        },
        { title: "firmware", text: (board) => board.firmware || "–" },
        {
          title: "doubts",
          wide: true,
          text: (board) => doubts(board).join("; ") || "–",
          level: (board) => (doubts(board).length ? "warning" : ""),
        },
      ],
      { empty: "no producer reports a board" },
    );
  }

  connection(board) {
    if (!board.alive || !current(this.live)) return ["not known", "stale"];
    if (known(board.away_since)) return [`NOT CONNECTED for ${age(this.live.now() - board.away_since)}`, "alarm"];
    return ["connected", "alive"];
  }

  logPanel() {
    this.level = select(
      LEVELS.map((level) => [level, `${level} and above`]),
      { "aria-label": "Lowest level shown" },
    );
    this.level.value = "INFO";
    this.sender = select([["", "all components"]], { "aria-label": "Component" });
    this.search = input({ "aria-label": "Text in the log", placeholder: "text" });
    this.lines = element("ol", { class: "log", tabindex: "0", "aria-label": "Log, the newest first" });
    for (const control of [this.level, this.sender, this.search])
      control.addEventListener("input", () => this.showLog());
    this.recordLevel = select(LEVELS, { "aria-label": "Level from which records are written" });
    this.recordLevel.value = "INFO";
    this.recordWhere = select([["", "all"]], { "aria-label": "Of which component" });
    this.setLevel = button("Set", () =>
      this.requests.try(`log level ${this.recordLevel.value}`, "set_log_level", {
        level: this.recordLevel.value,
        component: this.recordWhere.value || null,
      }),
    );
    const made = panel(
      "Log",
      { class: "log-panel" },
      element("div", { class: "row" }, this.level, this.sender, this.search),
      this.lines,
      element(
        "div",
        { class: "row" },
        element("span", {}, "write records from"),
        this.recordLevel,
        element("span", {}, "on, of"),
        this.recordWhere,
        this.setLevel,
      ),
    );
    this.logNote = made.note;
    return made.panel;
  }

  // The buttons.

  async step(title, action, params = {}) {
    this.busy = title;
    this.outcome = null;
    this.showOutcome();
    const report = (response) => {
      if (response.kind !== "progress") return;
      setText(this.progress, `${title}: ${response.text}`);
      this.bar.hidden = !response.total;
      if (response.total) [this.bar.max, this.bar.value] = [response.total, response.done];
    };
    setText(this.progress, `${title}…`);
    try {
      const value = await this.requests.run(title, action, params, { report });
      this.outcome = { title, value, error: "" };
    } catch (error) {
      this.outcome = { title, value: null, error: error.message };
    }
    this.busy = "";
    setText(this.progress, "");
    this.bar.hidden = true;
    this.showOutcome();
    this.update();
  }

  showOutcome() {
    const { outcome } = this;
    const lines = [];
    if (outcome?.error) lines.push(["alarm", `${outcome.title} failed: ${outcome.error}`]);
    else if (outcome) {
      const { run, condition, stored, files, warnings, reasons } = outcome.value ?? {};
      const what = condition
        ? `run ${run}: ${condition}, ${known(stored) ? plural(stored, "row") : "an unknown number of rows"} stored`
        : `${outcome.title}: done`;
      lines.push([condition && condition !== "COMPLETE" ? "warning" : "note", what]);
      for (const file of files ?? []) lines.push(["", file]);
      for (const text of [...(warnings ?? []), ...(reasons ?? [])]) lines.push(["warning", text]);
    }
    this.outcomeList.replaceChildren(...lines.map(([level, text]) => element("li", { data: { level } }, text)));
  }

  async prepare() {
    const kind = this.kind.value.trim();
    const lines = [
      `Kind: ${kind || "as the sources decide: physics, or test for made-up and replayed data"}`,
      `Comment: ${this.comment.value || "none"}`,
      `Shifter: ${this.live.state.status?.shifter?.name || "nobody"}`,
    ];
    if (
      await ask({
        title: "Prepare the next run?",
        lines: ["The next run number is taken and the files are opened.", ...lines],
        action: "Prepare run",
      })
    ) {
      await this.step("prepare_run", "prepare_run", { comment: this.comment.value, kind });
    }
  }

  async begin() {
    const { run } = this.live.state.status ?? {};
    if (
      await ask({
        title: `Begin run ${run?.run}?`,
        lines: [run?.comment ? `Comment: ${run.comment}` : "It has no comment."],
        action: "Begin run",
      })
    )
      await this.step("begin_run", "begin_run");
  }

  async end() {
    const { run } = this.live.state.status ?? {};
    const lines = [
      `It has lasted ${duration(elapsed(this.live))}.`,
      "Everything that the boards have sent is stored, then the numbers are compared.",
    ];
    if (await ask({ title: `End run ${run?.run}?`, lines, action: "End run" })) await this.step("end_run", "end_run");
  }

  async abort() {
    const { run } = this.live.state.status ?? {};
    const lines = [
      "The run ends at once. What was taken until now is kept, and its condition is ABORTED.",
      "Use End run unless something hangs.",
    ];
    if (
      await ask({
        title: run ? `Abort run ${run.run}?` : "Abort whatever is going on?",
        lines,
        action: "Abort run",
        danger: true,
      })
    )
      await this.step("abort_run", "abort_run");
  }

  async takeControl() {
    const control = this.live.state.status?.control;
    const lines = control
      ? [`${control.by} has control since ${utc(control.since)}, and loses it.`]
      : ["Nobody has control now."];
    if (await ask({ title: "Take control?", lines, action: "Take control" }))
      this.requests.try("take_control", "take_control");
  }

  async addToLog() {
    if (!this.log.value.trim()) return;
    const added = await this.requests.try("comment", "comment", { text: this.log.value });
    if (added) this.log.value = "";
  }

  async acknowledge(alarms) {
    if (!alarms.length) return;
    const comment = input({ maxlength: "1000" });
    const answer = await ask({
      title: alarms.length === 1 ? `Acknowledge alarm ${alarms[0].id}?` : `Acknowledge ${alarms.length} alarms?`,
      lines: [
        ...alarms.slice(0, 8).map((alarm) => alarm.text),
        "An acknowledged alarm stays open until its condition is in order.",
      ],
      action: "Acknowledge",
      fields: [{ name: "comment", label: "Comment", input: comment }],
    });
    if (!answer) return;
    for (const alarm of alarms)
      this.requests.try(`acknowledge alarm ${alarm.id}`, "acknowledge_alarm", {
        alarm: alarm.id,
        comment: answer.comment,
      });
  }

  // What is shown.

  update(changed = null) {
    const { status, alarms } = this.live.state;
    this.showRun(status);
    this.showAlarms(alarms);
    this.showComponents(status);
    this.showBoards(status);
    if (!changed || changed.has("log") || changed.has("status")) this.showLog();
  }

  // Ages go on between two messages.
  tick() {
    this.update(new Set());
  }

  // The components, in groups if the web server has made some.
  showComponents(status) {
    const { groups } = this.live.state;
    const named = components(this.live);
    const all = status ? this.withCore(status) : null;
    this.components.update(groups ? all?.slice(0, 1) : all, componentKey);
    this.node.classList.toggle("grouped", Boolean(groups));
    const byName = new Map(named.map((component) => [component.name, component]));
    const withComponents = (group) => ({
      ...group,
      members: group.members
        .filter((member) => byName.has(member.name))
        .map(({ name, level, problems }) => ({ level, item: { ...byName.get(name), problems } })),
    });
    this.groups.update(groups?.map(withComponents));
    const alive = named.filter((component) => component.alive).length;
    const note = [
      `${plural(alive, "component")} alive, ${named.length - alive} lost`,
      ...(groups ? [withProblem(groups)] : []),
    ];
    setText(this.componentNote, status ? note.join("; ") : "");
  }

  // The boards; many of them in groups by the module or host of their producer.
  showBoards(status) {
    const found = status ? boards(this.live) : null;
    const names = groupNames(this.live.state.groups, found?.length ?? 0);
    this.boards.node.hidden = Boolean(names);
    if (!names) this.boards.update(found, boardKey);
    const groups =
      names &&
      makeGroups(found, {
        nameOf: (board) => names.get(board.producer) ?? "others",
        levelOf: boardLevel,
        about: (members) => ({ state: this.connections(members), figures: boardFigures(members) }),
      });
    this.boardGroups.update(groups);
    setText(this.boardNote, groups ? [this.connections(found), withProblem(groups)].join("; ") : "");
  }

  // How many boards are connected: "12 boards connected", "12 boards: 1 NOT CONNECTED, 2 not known, 9 connected".
  connections(found) {
    const words = found.map((board) => this.connection(board)[0].replace(/ for .*/, ""));
    const numbers = ["NOT CONNECTED", "not known", "connected"]
      .map((word) => [words.filter((one) => one === word).length, word])
      .filter(([number]) => number);
    const boards = plural(found.length, "board");
    if (numbers.length === 1 && numbers[0][1] === "connected") return `${boards} connected`;
    return `${boards}: ${numbers.map(([number, word]) => `${number} ${word}`).join(", ")}`;
  }

  // The files of the run: those that storages have open, or those that it has when it has ended.
  openFiles(run) {
    const open = components(this.live, "storage").flatMap((storage) => storage.status?.files ?? []);
    return (run.files.length ? run.files : open).map((file) => file.split("/").pop()).join(", ") || "–";
  }

  // The core as the first line of the components.
  withCore(status) {
    const core = {
      name: "core",
      kind: "core",
      alive: Boolean(this.live.state.core?.connected),
      stuck: false,
      heard_s: this.live.state.core?.heard_s ?? 0,
      run: status.run?.run ?? null,
      queued: 0,
      log_level: status.log_level,
      status: { load: status.load },
      info: {},
    };
    return [core, ...status.components];
  }

  showRun(status) {
    const run = status?.run;
    const last = status?.last_run;
    const control = status?.control;
    const facts = [
      ["state", status ? `${status.state}${status.busy ? `, ${status.busy} in progress` : ""}` : "not known"],
    ];
    if (run) {
      facts.push(
        ["run", String(run.run)],
        ["kind", run.kind],
        ["comment", run.comment || "none"],
        ["prepared", utc(run.prepared)],
        ["began", known(run.begun) ? utc(run.begun) : "not yet"],
        ["duration", known(run.begun) ? duration(elapsed(this.live)) : "–"],
        ["shifter", run.shifter || "nobody"],
        ["files", this.openFiles(run)],
      );
      if (run.missing.length) facts.push(["MISSING", run.missing.join(", "), "alarm"]);
    } else {
      facts.push(
        [
          "last run",
          last
            ? `${last.run}, ${last.condition}, ${known(last.stored) ? plural(last.stored, "row") : "an unknown number of rows"} stored`
            : "none yet",
          last && last.condition !== "COMPLETE" ? "warning" : "",
        ],
        ["ended", last ? utc(last.ended) : "–"],
        ["shifter", status?.shifter?.name || "nobody"],
      );
      if (last?.reasons?.length) facts.push(["reasons", brief(last.reasons), "warning", last.reasons.join("\n")]);
    }
    facts.push([
      "control",
      control ? `${control.by}${this.app.hasControl ? " (this page)" : ""}, since ${utc(control.since)}` : "nobody",
    ]);
    this.facts.fill(facts);
    if (document.activeElement !== this.shifter && status && this.shownShifter !== status.shifter?.name) {
      this.shownShifter = status.shifter?.name;
      this.shifter.value = this.shownShifter ?? "";
    }
    const state = status?.state;
    const why = !this.app.mayChange
      ? this.app.whyNot
      : this.busy || status?.busy
        ? `${this.busy || status.busy} is in progress`
        : "";
    const may = {
      prepare: state === "STOP",
      begin: state === "READY",
      end: state === "READY" || state === "RUN",
      abort: true,
    };
    for (const [name, made] of Object.entries(this.buttons)) {
      setAttribute(
        made,
        "disabled",
        !this.app.mayChange || !status || !may[name] || (name !== "abort" && Boolean(why)),
      );
      made.hidden =
        (name === "prepare" && state !== "STOP" && Boolean(state)) ||
        (name === "begin" && state !== "READY") ||
        (name === "end" && state !== "READY" && state !== "RUN");
    }
    setText(this.why, why);
    for (const made of [this.setShifter, this.addComment, this.take, this.setLevel, this.acknowledgeAll])
      setAttribute(made, "disabled", !this.app.mayChange);
    setAttribute(this.release, "disabled", !this.app.mayChange || !this.app.hasControl);
  }

  showAlarms(alarms) {
    const order = (alarm) => [alarm.acknowledged ? 1 : 0, alarm.level === "alarm" ? 0 : 1, -alarm.raised];
    const sorted = alarms
      ? [...alarms].sort(
          (one, other) =>
            order(one)
              .map((part, place) => part - order(other)[place])
              .find((part) => part) ?? 0,
        )
      : null;
    const names = groupNames(this.live.state.groups, sorted?.length ?? 0);
    this.alarmBox.hidden = Boolean(names);
    if (!names) this.alarms.update(sorted, alarmKey);
    const groups =
      names &&
      makeGroups(sorted, {
        nameOf: (alarm) => (alarm.component ? (names.get(alarm.component) ?? "others") : "core"),
        levelOf: (alarm) => (alarm.acknowledged ? "" : alarm.level),
        about: (members) => ({ state: severities(members), figures: members[0].text }),
      });
    this.alarmGroups.update(groups);
    const old = sorted && !current(this.live) ? `as of ${age(this.live.age("alarms"))} ago` : "";
    const open = groups ? `${sorted.length} open: ${severities(sorted)}` : `${sorted?.length} open`;
    setText(this.alarmNote, sorted ? [open, old].filter(Boolean).join(", ") : "not known");
    this.acknowledgeAll.hidden = !sorted?.some((alarm) => !alarm.acknowledged);
  }

  showLog() {
    const records = this.live.state.log;
    const names = [
      "core",
      ...new Set([
        ...components(this.live).map((component) => component.name),
        ...(records ?? []).map((record) => record.component).filter((name) => name !== "core"),
      ]),
    ];
    setOptions(this.sender, [["", "all components"], ...names.map((name) => [name, name])]);
    setOptions(this.recordWhere, [
      ["", "all"],
      ...[
        "core",
        ...components(this.live)
          .filter((component) => component.alive)
          .map((component) => component.name),
      ].map((name) => [name, name]),
    ]);
    const lowest = LEVELS.indexOf(this.level.value);
    const text = this.search.value.toLowerCase();
    const shown = (records ?? []).filter(
      (record) =>
        LEVELS.indexOf(record.level) >= lowest &&
        (!this.sender.value || record.component === this.sender.value) &&
        (!text || record.text.toLowerCase().includes(text) || record.component.toLowerCase().includes(text)),
    );
    const key = JSON.stringify([shown.length, shown.at(-1), shown[0], lowest, text, this.sender.value]);
    setText(this.logNote, records ? `${shown.length} of the last ${records.length} records` : "not known yet");
    if (key === this.logKey) return;
    this.logKey = key;
    const first = this.lines.querySelector("li");
    const anchored = this.lines.scrollTop > 10 && first;
    const before = this.lines.scrollHeight;
    this.lines.replaceChildren(
      ...shown
        .reverse()
        .map((record) =>
          element(
            "li",
            { data: { level: record.level } },
            element("time", { title: utc(record.time) }, clock(record.time)),
            element("b", {}, record.level),
            element("span", {}, cut(record.component, 40)),
            element("span", { class: "text" }, record.text),
          ),
        ),
    );
    if (anchored) this.lines.scrollTop += this.lines.scrollHeight - before;
  }
}

const withProblem = (groups) =>
  `${groups.filter((group) => group.level).length} of ${plural(groups.length, "group")} with a problem`;

// How many alarms there are of each level that nobody has acknowledged, and how many acknowledged ones.
function severities(alarms) {
  const number = (level) => alarms.filter((alarm) => !alarm.acknowledged && alarm.level === level).length;
  const acknowledged = alarms.filter((alarm) => alarm.acknowledged).length;
  return [
    [number("alarm"), plural(number("alarm"), "alarm")],
    [number("warning"), plural(number("warning"), "warning")],
    [acknowledged, `${acknowledged} acknowledged`],
  ]
    .filter(([amount]) => amount)
    .map(([, text]) => text)
    .join(", ");
}

// Sums over boards: packets, parity and the verdicts that are not good.
function boardFigures(found) {
  const counted = found.filter((board) => board.counts);
  const sum = (part) => counted.reduce((total, board) => total + Number(board.counts[part]), 0);
  const packets = sum("packets");
  const verdicts = ["lost", "suspect"].map((verdict) => [
    found.filter((board) => board.verdict === verdict).length,
    verdict,
  ]);
  const doubtful = found.filter((board) => doubts(board).length).length;
  return [
    ...verdicts.filter(([number]) => number).map(([number, verdict]) => `${number} ${verdict}`),
    doubtful ? `${doubtful} with doubts` : "",
    counted.length ? count(packets, "packets") : "no packets counted",
    counted.length && counted.length < found.length ? `of ${plural(counted.length, "board")}` : "",
    packets ? `${percent(sum("bad_parity") / packets)} with bad parity` : "",
  ]
    .filter(Boolean)
    .join(", ");
}
