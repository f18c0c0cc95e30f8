// Tab Routines: a form from a routine's parameters, its progress, its result, and plots of it.

import { Histogram, Lines } from "./charts.js";
import {
  Table,
  ask,
  button,
  element,
  field,
  input,
  panel,
  resultNode,
  select,
  setAttribute,
  setOptions,
  setText,
} from "./elements.js";
import { clock, cut, duration, inline, plural } from "./format.js";
import { components } from "./health.js";

const CHIP_KEY = /^\d+-\d+-\d+$/;
const KEPT = 20; // results of this page
const KEPT_LINES = 200;
const MOST_LINES = 10; // of a plot with one line a chip

// A parameter as a person writes it: JSON where it is JSON, otherwise a text, or a list of texts where commas are.
export function parseParameter(text, type) {
  const trimmed = text.trim();
  if (type === "str") return text;
  try {
    return JSON.parse(trimmed);
  } catch {
    if (trimmed === "None") return null;
    if (trimmed === "True" || trimmed === "False") return trimmed === "True";
    return /list/.test(type) && trimmed.includes(",")
      ? trimmed
          .split(",")
          .map((part) => part.trim())
          .filter(Boolean)
      : trimmed;
  }
}

export class RoutinesTab {
  constructor(app) {
    this.app = app;
    this.live = app.live;
    this.requests = app.requests;
    this.routines = [];
    this.results = [];
    this.running = null;
    this.node = element(
      "div",
      { class: "grid routines-grid" },
      this.formPanel(),
      this.progressPanel(),
      this.resultPanel(),
    );
  }

  formPanel() {
    this.producer = select([], { "aria-label": "Producer" });
    this.producer.addEventListener("change", () => this.list());
    this.choice = select([], { "aria-label": "Routine", size: "9" });
    this.choice.addEventListener("change", () => this.showForm());
    this.help = element("p", { class: "lines help" });
    this.form = element("form", { class: "routine-form" });
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.run();
    });
    this.directory = input({ placeholder: "more", size: "14" });
    this.load = button("Load", () => this.loadDirectory());
    const made = panel(
      "Routines",
      { class: "routine-list" },
      field("Producer", this.producer).row,
      field("Routine", this.choice).row,
      this.help,
      this.form,
      element(
        "div",
        { class: "row" },
        field("Load the routines of a folder below --routines", this.directory).row,
        this.load,
      ),
    );
    this.listNote = made.note;
    return made.panel;
  }

  progressPanel() {
    this.state = element("p", { class: "routine-state", role: "status" }, "no routine was started from this page");
    this.bar = element("progress", { hidden: true, "aria-label": "progress of the routine" });
    this.lines = element("ol", { class: "log", tabindex: "0", "aria-label": "Words of the routine, the newest first" });
    this.abort = button("Abort the routine…", () => this.stop(), { class: "danger" });
    this.table = new Table(
      "Routines of this page",
      [
        { title: "time", text: (row) => clock(row.time) },
        { title: "routine", wide: true, text: (row) => cut(row.call, 80) },
        { title: "outcome", wide: true, text: (row) => row.outcome, level: (row) => (row.error ? "alarm" : "") },
        {
          title: "",
          node: (row) => button("Show", () => this.showResult(row), { "aria-label": `Show the result of ${row.call}` }),
        },
      ],
      { empty: "none yet" },
    );
    return panel(
      "Progress",
      { class: "routine-progress" },
      this.state,
      this.bar,
      element("div", { class: "buttons" }, this.abort),
      this.lines,
      this.table.node,
    ).panel;
  }

  resultPanel() {
    this.plots = element("div", { class: "plots" });
    this.result = element("div", { class: "scroll-box tall" });
    const made = panel("Result", { class: "routine-result" }, this.plots, this.result);
    this.resultNote = made.note;
    return made.panel;
  }

  async list() {
    const component = this.producer.value;
    if (!component || this.listing === component) return;
    this.listing = component;
    const found = await this.requests.try("list of routines", "list_routines", {}, { component, quiet: true });
    this.listing = "";
    if (found && component === this.producer.value) this.showRoutines(found);
  }

  showRoutines(found) {
    this.routines = found;
    setOptions(
      this.choice,
      found.map((routine) => (routine.error ? [routine.name, `${routine.name}: not loaded`] : routine.name)),
    );
    if (!this.choice.value && found.length) this.choice.value = found[0].name;
    const broken = found.filter((routine) => routine.error).length;
    const note = broken ? `, ${plural(broken, "file")} not loaded` : "";
    setText(this.listNote, plural(found.length - broken, "routine") + note);
    this.showForm();
  }

  async loadDirectory() {
    const found = await this.requests.try(
      `load routines of ${this.directory.value}`,
      "load_routines",
      { directory: this.directory.value.trim() },
      { component: this.producer.value },
    );
    if (found) this.showRoutines(found);
  }

  showForm() {
    const routine = this.routines.find((one) => one.name === this.choice.value);
    setText(this.help, routine?.error || routine?.help || "no description");
    this.entries = new Map();
    this.limit = input({ placeholder: "3600", size: "8", inputmode: "numeric" });
    const rows = (routine?.params ?? []).map((parameter) => {
      const bool = parameter.type === "bool";
      const entry = bool
        ? select([
            ["", `as usual (${inline(parameter.default)})`],
            ["true", "yes"],
            ["false", "no"],
          ])
        : input({
            required: parameter.required,
            placeholder: parameter.required ? "needed" : defaultText(parameter.default),
          });
      this.entries.set(parameter.name, { parameter, entry });
      return field(parameter.name, entry, parameter.type && parameter.type !== "bool" ? parameter.type : "").row;
    });
    this.start = element("button", { type: "submit", class: "primary" }, "Run…");
    this.form.replaceChildren(
      ...rows,
      field("time limit, s", this.limit).row,
      element("div", { class: "buttons" }, this.start),
    );
    this.update(new Set());
  }

  async run() {
    const name = this.choice.value;
    const kwargs = {};
    for (const [key, { parameter, entry }] of this.entries) {
      if (entry.value.trim()) kwargs[key] = parseParameter(entry.value, parameter.type);
    }
    const params = { name, args: [], kwargs };
    if (this.limit.value.trim()) params.time_limit = Number(this.limit.value);
    const call = `${name}(${Object.entries(kwargs)
      .map(([key, value]) => `${key}=${JSON.stringify(value)}`)
      .join(", ")})`;
    const lines = [call, "Chips are changed while it works; other requests about chips are refused meanwhile."];
    if (this.live.state.status?.run)
      lines.push(`Run ${this.live.state.status.run.run} is going on: the routine's data go into it.`);
    if (!(await ask({ title: `Run ${name}?`, lines, action: "Run" }))) return;
    const entry = { time: this.live.now(), call, outcome: "in progress", error: "", value: null, key: `${Date.now()}` };
    this.results = [entry, ...this.results].slice(0, KEPT);
    this.running = entry;
    this.began = performance.now();
    this.lines.replaceChildren();
    this.showState();
    try {
      entry.value = await this.requests.run(name, "run_routine", params, {
        component: this.producer.value,
        report: (response) => this.report(response),
      });
      entry.outcome = `done in ${duration((performance.now() - this.began) / 1000)}`;
    } catch (error) {
      entry.error = error.message;
      entry.outcome = cut(error.message.split("\n")[0], 120);
    }
    if (this.running === entry) this.running = null;
    this.showState();
    this.showResult(entry);
  }

  report(response) {
    if (response.kind !== "progress") return;
    this.bar.hidden = !response.total;
    if (response.total) [this.bar.max, this.bar.value] = [response.total, response.done];
    const share = response.total ? ` (${response.done} of ${response.total})` : "";
    this.said = `${response.text}${share}`;
    this.lines.prepend(
      element("li", {}, element("time", {}, clock(this.live.now())), element("span", { class: "text" }, this.said)),
    );
    while (this.lines.children.length > KEPT_LINES) this.lines.lastChild.remove();
    this.showState();
  }

  showState() {
    this.table.update(this.results, (row) => row.key);
    if (this.running)
      setText(
        this.state,
        `${this.running.call}: ${this.said ?? "begins"}, for ${duration((performance.now() - this.began) / 1000)}`,
      );
    else {
      this.bar.hidden = true;
      this.said = null;
      setText(
        this.state,
        this.results.length
          ? `${this.results[0].call}: ${this.results[0].outcome}`
          : "no routine was started from this page",
      );
    }
    this.update(new Set());
  }

  async stop() {
    if (
      await ask({
        title: "Abort the routine?",
        lines: ["The running routine, or the running action on chips or boards, ends at once. The readout continues."],
        action: "Abort",
        danger: true,
      })
    )
      this.requests.try("abort routine", "abort_routine", {}, { component: this.producer.value });
  }

  showResult(entry) {
    setText(this.resultNote, `${entry.call}, ${clock(entry.time)}`);
    if (entry.error) {
      this.plots.replaceChildren();
      this.result.replaceChildren(element("p", { class: "problem lines" }, entry.error));
      return;
    }
    this.result.replaceChildren(
      entry.value === null && entry.outcome === "in progress"
        ? element("p", { class: "empty" }, "in progress")
        : resultNode(entry.value),
    );
    this.plots.replaceChildren(
      ...plotsOf(entry.value).map(({ title, chart, data }) => {
        const made = element("figure", {}, element("figcaption", {}, title), chart.node);
        chart.say("");
        chart.set(data);
        return made;
      }),
    );
  }

  show() {
    this.update(new Set(["status"]));
    if (!this.routines.length) this.list();
  }

  update(changed) {
    if (changed.has("status")) {
      const before = this.producer.value;
      setOptions(
        this.producer,
        components(this.live, "producer")
          .filter((component) => component.alive)
          .map((component) => component.name),
      );
      if (this.producer.value !== before) this.list();
    }
    const no = !this.app.mayChange || !this.producer.value;
    if (this.start) setAttribute(this.start, "disabled", no || !this.choice.value || Boolean(this.running));
    for (const made of [this.abort, this.load]) setAttribute(made, "disabled", no);
  }

  tick() {
    if (this.running) this.showState();
  }
}

const defaultText = (value) =>
  value === null || value === undefined ? "None" : typeof value === "object" ? JSON.stringify(value) : String(value);

// Plots of whatever a result has for each channel or chip: {title, chart, data}. Lists under chip keys become
// histograms over all channels, "before" and "after" in one; rates at several thresholds become lines.
export function plotsOf(result) {
  if (result === null || typeof result !== "object") return [];
  const scan = scanOf(result);
  if (scan) return [scan];
  const values = new Map();
  gather(result, "", values);
  const plots = [];
  const done = new Set();
  for (const [name, numbers] of values) {
    if (done.has(name) || numbers.length < 3) continue;
    const other = name.replace("before", "after");
    const pair = other !== name && values.has(other) ? [name, other] : [name];
    for (const one of pair) done.add(one);
    plots.push(
      histogramOf(
        pair,
        pair.map((one) => values.get(one)),
      ),
    );
  }
  return plots.slice(0, 6);
}

function gather(part, name, values) {
  for (const [key, value] of Object.entries(part)) {
    if (!CHIP_KEY.test(key)) {
      if (value && typeof value === "object" && !Array.isArray(value)) gather(value, key, values);
      continue;
    }
    for (const [inner, content] of value && typeof value === "object" && !Array.isArray(value)
      ? Object.entries(value)
      : [[name, value]]) {
      const numbers = (Array.isArray(content) ? content : [content]).filter(
        (one) => typeof one === "number" && Number.isFinite(one),
      );
      if (!values.has(inner)) values.set(inner, []);
      for (const number of numbers) values.get(inner).push(number);
    }
  }
}

function histogramOf(names, columns) {
  const all = columns.flat();
  let [low, high] = [Infinity, -Infinity];
  for (const value of all) [low, high] = [Math.min(low, value), Math.max(high, value)];
  const positive = all.filter((value) => value > 0);
  const least = positive.reduce((found, value) => Math.min(found, value), Infinity);
  const logarithmic = low >= 0 && positive.length > 10 && high / least > 300;
  const whole = all.every(Number.isInteger) && high - low < 400;
  const bins = whole ? high - low + 1 : 60;
  const edges = Array.from({ length: bins + 1 }, (_, at) =>
    logarithmic
      ? least * ((high * 1.001) / least) ** (at / bins)
      : whole
        ? low - 0.5 + at
        : low + ((high - low || 1) * at) / bins,
  );
  const place = (value) =>
    logarithmic
      ? Math.floor((Math.log(value / least) / Math.log((high * 1.001) / least)) * bins)
      : Math.min(bins - 1, Math.floor(whole ? value - low : ((value - low) / (high - low || 1)) * bins));
  const series = columns.map((column, at) => {
    const counts = new Array(bins).fill(0);
    for (const value of column) if (!logarithmic || value > 0) counts[Math.min(bins - 1, place(value))] += 1;
    return { name: names[at], edges, counts };
  });
  const none = logarithmic ? columns.map((column) => column.filter((value) => value <= 0).length) : [];
  const zero = none.some(Boolean) ? `; 0: ${none.join(" and ")}` : "";
  const title = `${names.join(" (filled), ")}: ${columns.map((column) => column.length.toLocaleString("en")).join(" and ")} values${zero}`;
  const unit = /_hz|rate/.test(names[0]) ? ", Hz" : /mean|std/.test(names[0]) ? ", ADC counts" : "";
  return {
    title,
    chart: new Histogram(title, {
      x: `${names[0].replaceAll("_", " ").replace(" hz", "")}${unit}`,
      y: "channels or chips",
      logX: logarithmic,
      log: logarithmic,
      height: 230,
    }),
    data: { series },
  };
}

// The summed rate of each chip against the threshold.
function scanOf(result) {
  const { thresholds, chips } = result;
  if (!Array.isArray(thresholds) || !chips || typeof chips !== "object") return null;
  const sums = Object.entries(chips)
    .filter(([, chip]) => Array.isArray(chip?.rates))
    .map(([name, chip]) => ({
      name,
      values: chip.rates.map((rates) => (rates ?? []).reduce((sum, rate) => sum + (rate ?? 0), 0)),
    }));
  if (!sums.length) return null;
  sums.sort((one, other) => Math.max(...other.values) - Math.max(...one.values));
  const title = `rate of a chip against the global threshold${sums.length > MOST_LINES ? `: the ${MOST_LINES} of ${sums.length} chips with the highest rates` : ""}`;
  const lines = sums.slice(0, MOST_LINES);
  return {
    title: `${title}: ${lines.map((line) => line.name).join(", ")}`,
    chart: new Lines(title, { x: "global threshold, DAC counts", y: "rate, Hz", log: true, height: 280 }),
    data: { x: thresholds, lines },
  };
}
