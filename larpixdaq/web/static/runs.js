// Tab Runs: the run catalogue with its files and e-log, plots of a past run, and two runs side by side.

import { COLOURS, Histogram, Lines } from "./charts.js";
import { Facts, Table, button, element, field, input, panel, select, setAttribute, setText } from "./elements.js";
import {
  brief,
  bytes,
  count,
  cut,
  digits,
  duration,
  known,
  percent,
  plural,
  rate,
  seconds,
  seen,
  utc,
} from "./format.js";
import { components } from "./health.js";
import { getLayout } from "./layout.js";
import { get, inflate, splitFrame } from "./live.js";
import { groupColour } from "./monitor.js";
import { PixelMap, encode } from "./pixel_map.js";

const MOST = 100;
const MAX_ATTACHMENT = 64 * 2 ** 20;

const levelOf = (condition) =>
  ({ COMPLETE: "", RUNNING: "note", "COMPLETE, suspect": "warning", ABORTED: "warning", CANCELLED: "note" })[
    condition
  ] ?? "alarm";

export class RunsTab {
  constructor(app) {
    this.app = app;
    this.live = app.live;
    this.requests = app.requests;
    this.run = null;
    this.other = null;
    this.chosen = false; // whether a person has chosen the run; otherwise it is the newest one
    this.wanted = false; // whether plots of these runs were asked for
    this.summaries = new Map();
    this.node = element("div", { class: "grid runs-grid" }, this.listPanel(), this.detailPanel(), this.plotPanel());
  }

  listPanel() {
    this.search = input({ placeholder: "words in comment, e-log, kind, condition, names", size: "40" });
    this.older = button("Older runs", () => this.find(this.oldest));
    const form = element(
      "form",
      { class: "row", role: "search", "aria-label": "Search of runs" },
      field("Search", this.search).row,
      element("button", { type: "submit", class: "primary" }, "Search"),
      this.older,
    );
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.find();
    });
    this.table = new Table(
      "Runs",
      [
        {
          title: "run",
          number: true,
          node: (row) =>
            button(String(row.run), () => this.choose(row.run), { class: "link", "aria-label": `Show run ${row.run}` }),
        },
        {
          title: "condition",
          text: (row) => row.condition,
          level: (row) => levelOf(row.condition),
          hint: (row) => (row.reasons ?? []).join("\n"),
        },
        { title: "kind", text: (row) => row.kind },
        { title: "prepared", text: (row) => utc(row.prepared) },
        { title: "length", number: true, text: (row) => duration(row.length_s) },
        { title: "rows stored", number: true, text: (row) => (known(row.stored) ? count(row.stored) : "not known") },
        { title: "shifter", text: (row) => row.shifter || row.operator },
        { title: "comment", wide: true, text: (row) => cut(row.comment || "–", 70), hint: (row) => row.comment },
        { title: "e-log", number: true, text: (row) => (row.comments ? plural(row.comments, "comment") : "–") },
        {
          title: "compare",
          node: (row) => button("with", () => this.compare(row.run), { "aria-label": `Compare with run ${row.run}` }),
        },
      ],
      { empty: "no run fits" },
    );
    const made = panel("Runs", { class: "run-list" }, form, element("div", { class: "scroll-box" }, this.table.node));
    this.listNote = made.note;
    return made.panel;
  }

  detailPanel() {
    this.facts = new Facts("The run");
    this.files = new Table(
      "Files",
      [
        {
          title: "file",
          wide: true,
          text: (row) => `${row.path.split("/").pop()}\nsha256 ${row.sha256 || "not yet"}`,
          hint: (row) => `${row.path}\nsha256 ${row.sha256}`,
        },
        { title: "size", number: true, text: (row) => bytes(row.bytes), hint: (row) => count(row.bytes, "bytes") },
        {
          title: "condition",
          text: (row) => row.condition,
          level: (row) => (row.condition === "CONTINUED" ? "" : levelOf(row.condition)),
        },
        { title: "storage", text: (row) => row.storage },
      ],
      { empty: "no closed file yet" },
    );
    this.ledger = new Table(
      "Ledger",
      [
        { title: "producer", text: (row) => row.producer },
        { title: "io_group", number: true, text: (row) => String(row.io_group) },
        ...["packets", "bad_parity", "unknown_words", "rejected_words", "dropped"].map((name) => ({
          title: name.replaceAll("_", " "),
          number: true,
          text: (row) => count(row[name]),
          level: (row) => (row[name] && name !== "packets" ? "warning" : ""),
        })),
      ],
      { empty: "no counts yet" },
    );
    this.comments = element("ol", { class: "log elog", tabindex: "0", "aria-label": "e-log" });
    this.attachments = element("ul", { class: "attachments" });
    this.text = element("textarea", { rows: "2", maxlength: "10000" });
    this.author = input({ placeholder: "who is on shift", size: "14" });
    this.add = button("Add comment", () => this.comment());
    this.file = element("input", { type: "file" });
    this.attach = button("Attach", () => this.attachFile());
    const made = panel(
      "Run",
      { class: "run-detail" },
      this.facts.node,
      element("h3", {}, "Files"),
      this.files.node,
      element("h3", {}, "Counts of the ledger"),
      this.ledger.node,
      element("h3", {}, "e-log"),
      this.comments,
      this.attachments,
      element("div", { class: "row" }, field("Comment", this.text).row, field("By", this.author).row, this.add),
      element("div", { class: "row" }, field("File, of at most 64 MiB", this.file).row, this.attach),
    );
    this.detailTitle = made.panel.querySelector("h2");
    return made.panel;
  }

  plotPanel() {
    this.draw = button("Read the files and plot", () => this.wantPlots(), { class: "primary" });
    this.alone = button("Without comparison", () => this.compare(null));
    this.plotText = element("p", { "aria-live": "polite" });
    this.figures = new Table("Figures", [], {});
    this.figureBox = element("div");
    this.plots = element("div", { class: "plots" });
    this.quantity = select(
      [
        ["rate", "rate"],
        ["mean", "mean ADC"],
        ["std", "std of ADC"],
      ],
      { "aria-label": "Quantity of the maps" },
    );
    this.quantity.addEventListener("change", () => this.showMaps());
    this.maps = element("div", { class: "run-maps" });
    this.mapBox = element(
      "div",
      { hidden: true },
      element("div", { class: "row" }, element("h3", {}, "Maps of all channels"), this.quantity),
      this.maps,
    );
    const made = panel(
      "Plots",
      { class: "run-plots" },
      element("div", { class: "buttons" }, this.draw, this.alone),
      this.plotText,
      this.figureBox,
      this.plots,
      this.mapBox,
    );
    this.plotNote = made.note;
    return made.panel;
  }

  // Shows the newest runs that have all words of the search; `before`: those with a lower number.
  async find(before = null) {
    const query = new URLSearchParams({ limit: String(MOST), search: this.search.value.trim() });
    if (before !== null) query.set("before", String(before));
    setText(this.listNote, "searching…");
    try {
      const found = await get(`/api/runs?${query}`);
      this.table.update(found.runs, (row) => row.run);
      this.oldest = found.runs.at(-1)?.run ?? null;
      this.older.hidden = !found.more;
      setText(
        this.listNote,
        [
          `${plural(found.runs.length, "run")}${before === null ? "" : ` before run ${before}`}`,
          ...(found.more ? ["and older ones"] : []),
          "the newest first",
        ].join(", "),
      );
      if (!this.chosen && found.runs.length) this.open(found.runs[0].run);
    } catch (error) {
      this.table.update(null, () => "");
      setText(this.listNote, error.message);
    }
  }

  choose(number) {
    this.chosen = true;
    this.open(number);
  }

  async open(number) {
    if (this.run !== null && this.run !== number) this.wanted = false;
    this.run = number;
    this.showRun(await get(`/api/runs/${number}`).catch((error) => ({ problem: error.message })));
    this.plot();
  }

  showRun(run) {
    setText(this.detailTitle, `Run ${this.run}`);
    if (run.problem) {
      this.facts.fill([["problem", run.problem, "alarm"]]);
      return;
    }
    const facts = [
      ["condition", run.condition, levelOf(run.condition)],
      ["kind", run.kind],
      ["comment", run.comment || "none"],
      ["operator", run.operator],
      ["shifter", run.shifter || "nobody"],
      ["prepared", utc(run.prepared)],
      ["began", utc(run.begun)],
      ["ended", utc(run.ended)],
      ["length", duration(run.length_s)],
      ["rows made", known(run.rows) ? count(run.rows) : "not known"],
      [
        "rows stored",
        known(run.stored) ? count(run.stored) : "not known",
        known(run.rows) && run.rows !== run.stored ? "warning" : "",
      ],
    ];
    if (run.reasons?.length) facts.push(["reasons", brief(run.reasons), "warning", run.reasons.join("\n")]);
    if (run.asic) facts.push(["chips", `generation ${run.asic}`]);
    const boards = (run.connected ?? []).map(
      (board) =>
        `io_group ${board.io_group}: ${board.kind} ${board.address}${board.firmware ? `, firmware ${board.firmware}` : ""}`,
    );
    if (boards.length) facts.push(["boards", brief(boards), "", boards.join("\n")]);
    const versions = Object.entries(run.versions ?? {}).map(([name, version]) => `${name} ${version}`);
    if (versions.length) facts.push(["versions", cut(versions.join("; "), 300)]);
    this.facts.fill(facts);
    this.files.update(run.file_details ?? [], (row) => `${row.storage} ${row.path}`);
    this.ledger.update(run.ledger ?? [], (row) => `${row.producer} ${row.epoch} ${row.io_group}`);
    this.comments.replaceChildren(
      ...(run.comments ?? []).map((entry) =>
        element(
          "li",
          {},
          element("time", {}, utc(entry.time)),
          element("b", {}, entry.by || entry.operator),
          element("span", { class: "text" }, entry.text),
        ),
      ),
    );
    if (!this.comments.children.length) this.comments.append(element("li", { class: "empty" }, "no comment"));
    this.attachments.replaceChildren(
      ...(run.attachments ?? []).map((entry) =>
        element(
          "li",
          {},
          element(
            "a",
            { href: `/api/runs/${run.run}/attachments/${encodeURIComponent(entry.name)}`, download: entry.name },
            entry.name,
          ),
          ` ${bytes(entry.bytes)}, by ${entry.by || entry.operator}, ${utc(entry.time)}`,
        ),
      ),
    );
    this.latest = run;
  }

  async comment() {
    if (!this.text.value.trim() || this.run === null) return;
    const params = { text: this.text.value, run: this.run };
    if (this.author.value.trim()) params.by = this.author.value.trim();
    if (await this.requests.try(`comment on run ${this.run}`, "comment", params)) {
      this.text.value = "";
      this.open(this.run);
    }
  }

  async attachFile() {
    const [file] = this.file.files;
    if (!file || this.run === null) return;
    const title = `attach ${file.name} to run ${this.run}`;
    if (file.size > MAX_ATTACHMENT) {
      this.requests
        .add(title)
        .show("error", `${file.name} has ${bytes(file.size)}, at most ${bytes(MAX_ATTACHMENT)} are taken`);
      return;
    }
    const entry = this.requests.add(title);
    try {
      const query = new URLSearchParams({ name: file.name, by: this.author.value.trim() });
      const response = await fetch(`/api/runs/${this.run}/attachments?${query}`, {
        method: "POST",
        body: file,
        headers: { "Content-Type": "application/octet-stream" },
        credentials: "same-origin",
      });
      const answer = await response.json().catch(() => ({}));
      if (!response.ok) throw new Error(answer.error ?? `the web server answered ${response.status}`);
      entry.show("result", "");
      this.file.value = "";
      this.open(this.run);
    } catch (error) {
      entry.show("error", error.message);
    }
  }

  compare(number) {
    this.chosen = true;
    this.other = number === this.run ? null : number;
    this.wantPlots();
  }

  wantPlots() {
    this.wanted = true;
    this.plot();
  }

  async summary(number) {
    if (!this.summaries.has(number)) this.summaries.set(number, await get(`/api/runs/${number}/summary`));
    const found = this.summaries.get(number);
    if (found.condition === "RUNNING") this.summaries.delete(number);
    return found;
  }

  // Draws the plots. Reading the files takes some seconds, so that it begins only when asked for, or when they are
  // known.
  async plot() {
    const runs = [this.run, this.other].filter((number) => number !== null);
    setText(this.plotNote, runs.map((number) => `run ${number}`).join(" and "));
    this.alone.hidden = this.other === null;
    if (!runs.length || (!this.wanted && !runs.every((number) => this.summaries.has(number)))) {
      this.clearPlots();
      setText(this.plotText, runs.length ? "" : "choose a run");
      return;
    }
    setAttribute(this.draw, "disabled", true);
    setText(this.plotText, `reading the files of ${runs.map((number) => `run ${number}`).join(" and ")}…`);
    try {
      const found = await Promise.all(runs.map((number) => this.summary(number)));
      if (runs.join() === [this.run, this.other].filter((number) => number !== null).join())
        this.showPlots(runs, found);
    } catch (error) {
      this.clearPlots();
      setText(this.plotText, error.message);
    } finally {
      setAttribute(this.draw, "disabled", false);
    }
  }

  clearPlots() {
    for (const box of [this.plots, this.figureBox, this.maps]) box.replaceChildren();
    this.mapBox.hidden = true;
  }

  // A map for each run, with all channels of its files.
  async showMaps() {
    const [runs, quantity] = [this.plotted, this.quantity.value];
    this.mapBox.hidden = false;
    const facts = this.live.state.layout;
    const layout = facts ? await getLayout(facts).catch(() => null) : null;
    const made = await Promise.all(
      runs.map((number) =>
        runMap(number, quantity, layout).catch((error) =>
          element("p", { class: "problem" }, `run ${number}: ${error.message}`),
        ),
      ),
    );
    if (runs === this.plotted && quantity === this.quantity.value) this.maps.replaceChildren(...made);
  }

  showPlots(runs, summaries) {
    this.plotted = runs;
    this.showMaps();
    setText(
      this.plotText,
      summaries
        .map(
          (summary, at) =>
            `run ${runs[at]}: ${count(summary.rows_read)} of ${count(summary.rows, "rows")} read, ${seen(summary.seen)}`,
        )
        .join("; "),
    );
    this.figureBox.replaceChildren(figures(runs, summaries));
    const charts = [];
    const add = (title, chart, data) => charts.push([title, chart, data]);
    const name = (at) => `run ${runs[at]}`;
    const colour = (at) => COLOURS[at];
    if (summaries.length === 1) {
      const [summary] = summaries;
      const x = centres(summary.edges).map((time) => time - (summary.start ?? 0));
      const lines = (rows) =>
        rows.map((values, at) => ({
          name: `io_group ${summary.io_groups[at].io_group}`,
          values,
          colour: groupColour(summary.io_groups[at].io_group),
        }));
      const groups = summary.io_groups.map((row) => row.io_group).join(", ");
      if (x.length) {
        add(`rate of io_groups ${groups}`, new Lines("rates", { x: "time since the first row, s", y: "packets/s" }), {
          x,
          lines: lines(summary.rates),
        });
        add(
          "packets with bad parity",
          new Lines("bad parity", { x: "time since the first row, s", y: "fraction of packets" }),
          { x, lines: lines(summary.bad_parity) },
        );
        add(
          "data packets with a full FIFO",
          new Lines("full FIFO", { x: "time since the first row, s", y: "fraction of data packets" }),
          { x, lines: lines(summary.fifo_full) },
        );
      }
    } else {
      const lines = summaries.map((summary, at) => ({
        name: name(at),
        colour: colour(at),
        x: centres(summary.edges).map((time) => time - (summary.start ?? 0)),
        values: totals(summary.rates),
      }));
      if (lines.some((line) => line.x.length))
        add(
          `total rate: ${runs.map((number, at) => `run ${number} ${["blue", "orange"][at]}`).join(", ")}`,
          new Lines("total rates", { x: "time since the first row, s", y: "packets/s" }),
          { lines },
        );
    }
    const adc = summaries.map((summary, at) => ({
      name: name(at),
      colour: colour(at),
      edges: adcEdges(summary),
      counts: share(sumRows(summary.adc), summaries.length > 1),
    }));
    add(
      summaries.length > 1 ? "ADC values, as fractions" : "ADC values",
      new Histogram("ADC values", {
        x: "ADC counts",
        y: summaries.length > 1 ? "fraction of packets" : "packets seen",
      }),
      { series: adc },
    );
    const rates = summaries.map((summary, at) => ({
      name: name(at),
      colour: colour(at),
      edges: summary.channel_rates.edges,
      counts: summary.channel_rates.channels,
    }));
    if (rates.every((one) => one.edges.length))
      add(
        "rates of channels",
        new Histogram("rates of channels", {
          logX: true,
          log: true,
          x: "mean rate of a channel, packets/s",
          y: "channels",
        }),
        { series: rates },
      );
    this.plots.replaceChildren(
      ...charts.map(([title, chart, data]) => {
        chart.say("");
        chart.set(data);
        return element("figure", {}, element("figcaption", {}, title), chart.node);
      }),
    );
  }

  show() {
    this.filesKey = this.presentFiles();
    this.refresh();
  }

  refresh() {
    this.find();
    if (this.chosen) this.open(this.run);
  }

  // Changes when a run has ended, and when a storage has closed a file.
  presentFiles() {
    const last = this.live.state.status?.last_run;
    const files = components(this.live, "storage").map((storage) => storage.status?.finished?.at(-1)?.file);
    return JSON.stringify([last?.run, last?.condition, files]);
  }

  update(changed) {
    for (const made of [this.add, this.attach])
      setAttribute(made, "disabled", !this.app.mayChange || this.run === null);
    if (!changed.has("status")) return;
    if (this.filesKey === this.presentFiles()) return;
    this.filesKey = this.presentFiles();
    this.refresh();
  }

  tick() {}
}

async function runMap(number, quantity, layout) {
  const response = await fetch(`/api/runs/${number}/pixels?quantity=${quantity}`, { credentials: "same-origin" });
  if (!response.ok)
    throw new Error((await response.json().catch(() => ({}))).error ?? `the web server answered ${response.status}`);
  const { header, values } = splitFrame(await response.arrayBuffer());
  const numbers = new Float32Array((await inflate(header, values)).buffer);
  const { codes, scale } = encode(numbers, quantity === "rate");
  const map = new PixelMap();
  map.setLayout(layout);
  map.setChips(header.chips);
  map.setValues({ ...header, scale, time: 0 }, codes, numbers);
  return element("figure", {}, element("figcaption", {}, `run ${number}, ${seen(header.seen)} `, map.tools), map.node);
}

function figures(runs, summaries) {
  const interval = (words) =>
    known(words.mean) ? `${seconds(words.low)} to ${seconds(words.high)}` : "interval not known";
  const clocks = (summary) => {
    const lines = summary.clocks.flatMap((clock) =>
      clock.sync.map((words) => `io_group ${clock.io_group}: ${count(words.words)} ${words.kind}, ${interval(words)}`),
    );
    return brief(lines, 8) || "none";
  };
  const rows = [
    ["condition", (summary) => summary.condition || "not known"],
    ["length", (summary) => duration(summary.seconds)],
    [
      "packets",
      (summary) =>
        `${summary.io_groups.every((row) => row.exact) ? "" : "about "}${count(summary.io_groups.reduce((sum, row) => sum + row.packets, 0))}`,
    ],
    [
      "mean rate",
      (summary) =>
        summary.seconds
          ? rate(summary.io_groups.reduce((sum, row) => sum + row.packets, 0) / summary.seconds)
          : "not known",
    ],
    ["bad parity", (summary) => percent(fraction(summary, "seen_bad_parity", "seen_packets"))],
    ["full local FIFO", (summary) => percent(fraction(summary, "seen_local_full", "seen_data"))],
    ["chips", (summary) => count(summary.chips.length)],
    ["channels without a packet", (summary) => count(summary.channel_rates.silent)],
    ["mean ADC", (summary) => `${digits(meanOf(sumRows(summary.adc)), 4)} ADC counts`],
    ["SYNC intervals", clocks],
    [
      "losses",
      (summary) =>
        summary.losses
          .map(
            (loss) =>
              `${loss.place}: ${count(loss.count)} ${loss.unit} ${loss.what}${known(loss.io_group) ? `, io_group ${loss.io_group}` : ""}`,
          )
          .join("; ") || "none in the ledger",
    ],
    ["verdicts", (summary) => brief(summary.verdicts) || "none other than complete"],
    ["notes", (summary) => brief(summary.notes) || "–"],
  ].map(([name, text]) => ({ name, texts: summaries.map(text) }));
  const table = new Table("Figures of the runs", [
    { title: "", text: (row) => row.name },
    ...runs.map((number, at) => ({ title: `run ${number}`, wide: true, text: (row) => row.texts[at] })),
  ]);
  table.update(rows, (row) => row.name);
  return table.node;
}

const centres = (edges) => edges.slice(1).map((edge, at) => (edge + edges[at]) / 2);
const sumRows = (rows) => (rows[0] ?? []).map((_, at) => rows.reduce((sum, row) => sum + row[at], 0));
const totals = (rates) =>
  (rates[0] ?? []).map((_, at) =>
    rates.some((row) => row[at] !== null) ? rates.reduce((sum, row) => sum + (row[at] ?? 0), 0) : null,
  );
const meanOf = (counts) => counts.reduce((sum, n, adc) => sum + n * adc, 0) / counts.reduce((sum, n) => sum + n, 0);
const adcEdges = (summary) => Array.from({ length: (summary.adc[0]?.length ?? 0) + 1 }, (_, at) => at - 0.5);

function share(counts, wanted) {
  const sum = counts.reduce((total, n) => total + n, 0);
  return wanted && sum ? counts.map((n) => n / sum) : counts;
}

function fraction(summary, part, whole) {
  const sum = (name) => summary.io_groups.reduce((total, row) => total + row[name], 0);
  return sum(whole) ? sum(part) / sum(whole) : null;
}
