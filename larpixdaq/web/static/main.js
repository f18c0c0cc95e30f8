// The page: the bar with state, losses and alarms, which is always in sight, and the tabs below it.

import { drawCharts, redrawCharts } from "./charts.js";
import { ConfigurationTab } from "./configuration.js";
import { element, setAttribute, setText } from "./elements.js";
import { age, count, duration, known, percent, plural, rate, seen, utc } from "./format.js";
import { current, elapsed, losses, problems, runState, worst } from "./health.js";
import { Live } from "./live.js";
import { MonitorTab } from "./monitor.js";
import { Requests } from "./requests.js";
import { RoutinesTab } from "./routines.js";
import { RunTab } from "./run.js";
import { RunsTab } from "./runs.js";

const NOT_LOGGED_IN = 4401;
const THEMES = { system: "colours: as the system", dark: "colours: dark", light: "colours: light" };
const TICK = 500; // ms between two looks at the ages
const NOTHING = { pixels: null, histogram: null, packets: null };

const at = (id) => document.getElementById(id);

class App {
  constructor() {
    const scheme = location.protocol === "https:" ? "wss" : "ws";
    this.live = new Live(`${scheme}://${location.host}/live`);
    this.requests = new Requests(this.live, at("requests"));
    this.tabs = {
      run: new RunTab(this),
      monitor: new MonitorTab(this),
      configuration: new ConfigurationTab(this),
      routines: new RoutinesTab(this),
      runs: new RunsTab(this),
    };
    for (const [name, tab] of Object.entries(this.tabs)) at(`panel-${name}`).append(tab.node);
    this.reason = "";
    this.changed = new Set();
    this.live.on("change", (sections) => this.change(sections));
    this.live.on("connection", (event) => this.connection(event));
    this.listen();
    this.setTheme(read("theme") ?? "system");
    this.open(Object.hasOwn(this.tabs, location.hash.slice(1)) ? location.hash.slice(1) : "run");
    this.showBar();
    this.live.start();
    setInterval(() => this.tick(), TICK);
  }

  get tab() {
    return this.tabs[this.shown];
  }

  // Whether this viewer's key allows to change something. The core checks it again.
  get mayChange() {
    return this.live.connected && this.live.viewer.role !== "observer";
  }

  get whyNot() {
    return this.live.connected ? "your key allows to look, not to change" : "no connection to the web server";
  }

  get hasControl() {
    const control = this.live.state.status?.control;
    return Boolean(control) && control.by === this.live.viewer.name;
  }

  listen() {
    const names = Object.keys(this.tabs);
    at("tabs").addEventListener("click", (event) => {
      const name = event.target.id?.replace("tab-", "");
      if (name && Object.hasOwn(this.tabs, name)) this.open(name);
    });
    at("tabs").addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      const place =
        event.key === "Home"
          ? 0
          : event.key === "End"
            ? names.length - 1
            : step
              ? (names.indexOf(this.shown) + step + names.length) % names.length
              : -1;
      if (place < 0) return;
      event.preventDefault();
      this.open(names[place]);
      at(`tab-${names[place]}`).focus();
    });
    addEventListener("hashchange", () => {
      if (Object.hasOwn(this.tabs, location.hash.slice(1))) this.open(location.hash.slice(1));
    });
    document.addEventListener("visibilitychange", () => this.rewatch());
    at("theme").addEventListener("click", () => {
      const choices = Object.keys(THEMES);
      this.setTheme(choices[(choices.indexOf(this.theme) + 1) % choices.length]);
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.redraw());
    at("logout").addEventListener("click", (event) => {
      event.preventDefault();
      fetch("/logout", { method: "POST", credentials: "same-origin" }).finally(() => location.replace("/login"));
    });
  }

  setTheme(theme) {
    this.theme = Object.hasOwn(THEMES, theme) ? theme : "system";
    write("theme", this.theme);
    if (this.theme === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = this.theme;
    at("theme").setAttribute("aria-label", THEMES[this.theme]);
    setText(at("theme"), { system: "◐ auto", dark: "● dark", light: "○ light" }[this.theme]);
    this.redraw();
  }

  redraw() {
    redrawCharts();
    this.tabs.monitor.map.legendKey = "";
    this.tabs.monitor.map.draw();
    if (this.shown === "monitor") this.tabs.monitor.showRates();
  }

  open(name) {
    if (this.shown === name) return;
    this.shown = name;
    for (const one of Object.keys(this.tabs)) {
      const chosen = one === name;
      at(`panel-${one}`).hidden = !chosen;
      at(`tab-${one}`).setAttribute("aria-selected", String(chosen));
      at(`tab-${one}`).tabIndex = chosen ? 0 : -1;
    }
    history.replaceState(null, "", `#${name}`);
    this.rewatch();
    (this.tab.show ?? this.tab.update).call(this.tab);
    drawCharts();
  }

  // Tells the server what is shown now: nothing but the state while the page is hidden.
  rewatch() {
    this.live.watch({ ...NOTHING, ...(document.hidden ? {} : this.tab?.watched?.()) });
  }

  // Sections that have changed are shown once for each frame of the screen.
  change(sections) {
    for (const section of sections) this.changed.add(section);
    if (this.queued) return;
    this.queued = true;
    requestAnimationFrame(() => {
      this.queued = false;
      const changed = this.changed;
      this.changed = new Set();
      this.showBar();
      this.tab.update(changed);
    });
  }

  connection(event) {
    if (event?.code === NOT_LOGGED_IN) {
      location.replace("/login");
      return;
    }
    this.reason = event?.reason ?? "";
    if (event === null) this.rewatch();
    this.showBar();
    this.tab?.update(new Set());
  }

  tick() {
    this.showBar();
    this.tab.tick?.();
  }

  showBar() {
    const { live } = this;
    const state = runState(live);
    const stale = !current(live);
    document.body.classList.toggle("stale", stale);
    setAttribute(at("state"), "data-level", state.level);
    setText(at("state-word"), state.word);
    setText(at("state-text"), state.text);
    const gone = elapsed(live);
    const { run, last_run: last } = live.state.status ?? {};
    const comment = run ? run.comment : last?.condition;
    setText(at("state-more"), [gone === null ? "" : duration(gone), comment].filter(Boolean).join(" · "));
    document.title = `${stale ? "? " : ""}${state.word}${live.state.status?.run ? ` ${live.state.status.run.run}` : ""} · larpix-daq`;
    this.showRate(stale);
    const loss = losses(live);
    cell("loss", stale ? worst([loss.level, "stale"]) : loss.level, loss.text, stale ? "old" : (loss.note ?? ""));
    setAttribute(at("loss-cell"), "title", loss.hint || null);
    this.showAlarms(stale);
    const control = live.state.status?.control;
    cell("control", "", control ? control.by : live.state.status ? "nobody" : "not known", null);
    setAttribute(at("control-cell"), "title", control ? `since ${utc(control.since)}` : null);
    setText(
      at("viewer"),
      live.viewer.name ? `you: ${live.viewer.name}, ${live.viewer.role}${this.hasControl ? ", in control" : ""}` : "",
    );
    const core = live.state.core;
    cell(
      "link",
      live.fresh && core?.connected ? "" : "stale",
      live.connected ? (live.fresh ? (core?.connected ? "live" : "NO CORE") : "SILENT") : "NOT CONNECTED",
      live.connected ? `${age(live.silence)} old` : this.reason,
    );
    setAttribute(at("link-cell"), "title", core ? `core ${core.address}, version ${core.version}` : null);
    this.showProblems();
  }

  showRate(stale) {
    const { monitor, monitor_problem: problem } = this.live.state;
    const since = this.live.age("monitor");
    if (!monitor || problem) cell("rate", "stale", "not known", problem ? "no monitor" : "");
    else if (stale || since > 3) cell("rate", "stale", rate(monitor.rate), `OLD: ${age(since)}`);
    else
      cell(
        "rate",
        "",
        rate(monitor.rate),
        `${known(monitor.run) ? `run ${monitor.run}` : "no run"}, ${age(since)} old`,
      );
    setAttribute(
      at("rate-cell"),
      "title",
      monitor
        ? `${count(monitor.packets, "packets")} in all, exact; channels: ${seen(monitor.seen)} (${percent(monitor.seen)})`
        : null,
    );
  }

  showAlarms(stale) {
    const { alarms } = this.live.state;
    if (!alarms) {
      cell("alarm", "stale", "not known", "");
      return;
    }
    const open = alarms.filter((alarm) => !alarm.acknowledged);
    const serious = open.filter((alarm) => alarm.level === "alarm");
    const text = serious.length
      ? plural(serious.length, "ALARM")
      : open.length
        ? plural(open.length, "warning")
        : alarms.length
          ? `${alarms.length} acknowledged`
          : "none open";
    const more =
      serious.length && open.length > serious.length ? `and ${plural(open.length - serious.length, "warning")}` : "";
    cell(
      "alarm",
      serious.length ? "alarm" : open.length ? "warning" : stale ? "stale" : "",
      text,
      [more, stale ? "old" : ""].filter(Boolean).join(", "),
    );
    setAttribute(at("alarm-cell"), "title", open.map((alarm) => alarm.text).join("\n") || null);
  }

  showProblems() {
    const found = problems(this.live);
    const box = at("problems");
    box.hidden = !found.length;
    const key = JSON.stringify(found.map(({ text }) => text.replace(/\d+(\.\d+)? (s|min|h|d)\b/g, "")));
    if (key === this.problemKey) {
      // Only ages have changed: not to be read out again and again.
      [...box.children].forEach((line, place) => setText(line, found[place].text));
      return;
    }
    this.problemKey = key;
    box.replaceChildren(...found.map(({ level, text }) => element("p", { data: { level } }, text)));
  }
}

function cell(name, level, text, note) {
  setText(at(name), text);
  if (note !== null) setText(at(`${name}-note`), note);
  setAttribute(at(`${name}-cell`), "data-level", level || null);
}

// Settings of this browser. It may have no storage.
function read(name) {
  try {
    return localStorage.getItem(`larpixdaq-${name}`);
  } catch {
    return null;
  }
}

function write(name, value) {
  try {
    localStorage.setItem(`larpixdaq-${name}`, value);
  } catch {
    // the setting holds until the page is closed
  }
}

new App();
