// Tab Monitor: what the online monitor sees of the data, live.

import { COLOURS, Histogram, Legend, Lines } from "./charts.js";
import {
  Facts,
  Table,
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
import {
  age,
  bytes,
  channelName,
  clock,
  count,
  digits,
  known,
  percent,
  plural,
  rate,
  seconds,
  seen,
  utc,
} from "./format.js";
import { getLayout } from "./layout.js";
import { PixelMap } from "./pixel_map.js";

const WINDOWS = [
  ["60", "1 min"],
  ["600", "10 min"],
  ["3600", "1 h"],
];
const TYPES = ["data", "test", "config write", "config read", "time stamp", "message", "sync", "trigger"];
const COUNTS = ["20", "50", "100", "200", "500"];
const PACKET_COLUMNS = [
  "packet_type",
  "io_group",
  "io_channel",
  "chip_id",
  "channel_id",
  "timestamp",
  "dataword",
  "trigger_type",
  "valid_parity",
  "local_fifo",
  "shared_fifo",
  "register_address",
  "register_data",
  "direction",
  "receipt_timestamp",
  "counter",
];
const SELECTION = ["io_group", "io_channel", "chip", "channel"];
const ARRANGEMENTS = [
  ["layout", "pixel layout"],
  ["grid", "chips × channels"],
];
const OLD = 3; // seconds after which the monitor's numbers are called old

export const groupColour = (group) => COLOURS[(Number(group) - 1 + COLOURS.length * 26) % COLOURS.length];

export class MonitorTab {
  constructor(app) {
    this.app = app;
    this.live = app.live;
    this.requests = app.requests;
    this.summary = null; // the last one that came
    this.summaryAt = -Infinity;
    this.selection = { io_group: null, io_channel: null, chip: null, channel: null };
    this.stale = element("p", { class: "stale-word", hidden: true });
    this.node = element(
      "div",
      {},
      this.stale,
      element(
        "div",
        { class: "grid monitor-grid" },
        this.ratePanel(),
        this.channelRatePanel(),
        this.mapPanel(),
        this.selectionPanel(),
        this.groupPanel(),
        this.hottestPanel(),
        this.deadPanel(),
        this.clockPanel(),
        this.packetPanel(),
        this.messagePanel(),
        this.ledgerPanel(),
        this.typePanel(),
      ),
    );
    this.live.on("pixels", (header, values) => this.takePixels(header, values));
  }

  // Panels.

  ratePanel() {
    this.span = select(WINDOWS, { "aria-label": "Time span" });
    this.span.value = "600";
    this.scale = select(
      [
        ["linear", "linear"],
        ["log", "logarithmic"],
      ],
      { "aria-label": "Scale of the rates" },
    );
    this.rates = {
      linear: new Lines("Rates over time", { time: true, y: "packets/s", x: "time, UTC", height: 270 }),
      log: new Lines("Rates over time", { time: true, y: "packets/s", x: "time, UTC", log: true, height: 270 }),
    };
    this.rates.log.node.hidden = true;
    this.rateLegend = new Legend("Lines of the rates", () => this.showRates());
    this.span.addEventListener("change", () => this.showRates());
    this.scale.addEventListener("change", () => {
      for (const [name, chart] of Object.entries(this.rates)) chart.node.hidden = name !== this.scale.value;
      this.showRates();
    });
    const made = panel("Rates", { class: "rates" }, this.rateLegend.node, this.rates.linear.node, this.rates.log.node);
    made.tools.append(this.span, this.scale);
    this.rateNote = made.note;
    return made.panel;
  }

  channelRatePanel() {
    this.channelRates = new Histogram("Number of channels for each rate", {
      logX: true,
      x: "rate of a channel, packets/s",
      y: "channels",
      log: true,
      height: 290,
    });
    const made = panel("Rates of channels", { class: "channel-rates" }, this.channelRates.node);
    this.channelRateNote = made.note;
    return made.panel;
  }

  groupPanel() {
    const fraction = (part, whole) => (row) => (row[whole] ? percent(row[part] / row[whole]) : "–");
    const sample = (part, whole) => (row) => `${count(row[part])} of ${count(row[whole])} packets seen`;
    const fifo = (name, part) => ({
      title: name,
      number: true,
      text: fraction(part, "seen_data"),
      hint: sample(part, "seen_data"),
      level: (row) => (row.seen_data && row[part] / row.seen_data > 0.01 ? "warning" : ""),
    });
    this.groups = new Table(
      "Figures of each io_group",
      [
        { title: "io_group", number: true, text: (row) => (row.io_group ? String(row.io_group) : "0, INFO") },
        { title: "rate", number: true, text: (row) => rate(row.rate) },
        { title: "mean of the run", number: true, text: (row) => rate(row.mean_rate) },
        { title: "packets", number: true, text: (row) => count(row.packets) },
        { title: "rows", number: true, text: (row) => count(row.rows) },
        {
          title: "bad parity",
          number: true,
          text: fraction("bad_parity", "packets"),
          hint: (row) => `${count(row.bad_parity)} packets`,
          level: (row) => (row.packets && row.bad_parity / row.packets > 0.01 ? "warning" : ""),
        },
        {
          title: "unknown words",
          number: true,
          text: (row) => count(row.unknown),
          level: (row) => (row.unknown ? "warning" : ""),
        },
        {
          title: "rows dropped",
          number: true,
          text: (row) => count(row.dropped),
          level: (row) => (row.dropped ? "alarm" : ""),
        },
        fifo("local FIFO half", "seen_local_half"),
        fifo("local FIFO full", "seen_local_full"),
        fifo("shared half", "seen_shared_half"),
        fifo("shared full", "seen_shared_full"),
        {
          title: "seen",
          number: true,
          text: (row) => percent(row.seen),
          hint: () => "fraction of the packets from which FIFO flags, channels and histograms are counted",
        },
      ],
      { empty: "no packet in this run yet" },
    );
    const made = panel("io_groups", { class: "io-groups" }, this.groups.node);
    this.groupNote = made.note;
    return made.panel;
  }

  mapPanel() {
    this.map = new PixelMap({
      hover: (channel) => this.hover(channel),
      select: (channel) =>
        this.choose({
          io_group: channel.io_group,
          io_channel: channel.io_channel,
          chip: channel.chip_id,
          channel: channel.channel_id,
        }),
    });
    this.quantity = select(
      [
        ["rate", "rate"],
        ["mean_adc", "mean ADC"],
        ["packets", "packets"],
        ["", "off"],
      ],
      { "aria-label": "Quantity of the map" },
    );
    this.arrangement = select(ARRANGEMENTS.slice(1), { "aria-label": "Arrangement of the map" });
    this.quantity.addEventListener("change", () => {
      this.map.clear();
      this.app.rewatch();
    });
    this.arrangement.addEventListener("change", () => {
      this.wantsGrid = this.arrangement.value === "grid";
      this.useLayout();
    });
    const made = panel("Pixel map", { class: "pixel-map" }, this.map.node);
    made.tools.append(this.quantity, this.arrangement, this.map.tools);
    this.mapNote = made.note;
    this.mapPanelNode = made.panel;
    return made.panel;
  }

  selectionPanel() {
    this.entries = Object.fromEntries(
      SELECTION.map((name) => [name, input({ inputmode: "numeric", maxlength: "3", placeholder: "all", size: "5" })]),
    );
    const form = element(
      "form",
      { class: "row", "aria-label": "Selection of channels" },
      ...SELECTION.map((name) => field(name, this.entries[name]).row),
      element("button", { type: "submit" }, "Show"),
      button("All", () => this.choose({})),
    );
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.submitSelection();
    });
    this.selectionProblem = element("p", { class: "problem", role: "alert", hidden: true });
    this.adcLog = select(
      [
        ["linear", "linear"],
        ["log", "logarithmic"],
      ],
      { "aria-label": "Scale of the ADC histogram" },
    );
    this.adc = {
      linear: new Histogram("ADC histogram of the selection", { x: "ADC counts", y: "packets", height: 250 }),
      log: new Histogram("ADC histogram of the selection", { x: "ADC counts", y: "packets", log: true, height: 250 }),
    };
    this.adc.log.node.hidden = true;
    this.adcLog.addEventListener("change", () => {
      for (const [name, chart] of Object.entries(this.adc)) chart.node.hidden = name !== this.adcLog.value;
      this.showHistogram();
    });
    this.adcFacts = new Facts("Figures of the selection");
    const made = panel(
      "ADC values",
      { class: "adc" },
      form,
      this.selectionProblem,
      this.adcFacts.node,
      this.adc.linear.node,
      this.adc.log.node,
    );
    made.tools.append(this.adcLog);
    this.adcNote = made.note;
    return made.panel;
  }

  channelTable(label, empty) {
    return new Table(
      label,
      [
        {
          title: "channel",
          node: (row) =>
            button(
              channelName(row),
              () =>
                this.choose({
                  io_group: row.io_group,
                  io_channel: row.io_channel,
                  chip: row.chip_id,
                  channel: row.channel_id,
                }),
              { class: "link", title: "io_group-io_channel-chip_id-channel_id: show it" },
            ),
        },
        { title: "rate", number: true, text: (row) => rate(row.rate) },
      ],
      { empty },
    );
  }

  hottestPanel() {
    this.hottest = this.channelTable("Channels with the highest rates", "no channel yet");
    const made = panel("Hottest channels", { class: "hottest scroll" }, this.hottest.node);
    this.hottestNote = made.note;
    return made.panel;
  }

  deadPanel() {
    this.dead = this.channelTable("Channels that have stopped", "no dead channel is known");
    const made = panel("Dead channels", { class: "dead scroll" }, this.dead.node);
    this.deadNote = made.note;
    return made.panel;
  }

  clockPanel() {
    this.sync = new Table(
      "SYNC intervals",
      [
        { title: "io_group", number: true, text: (row) => String(row.io_group) },
        { title: "SYNC rows", number: true, text: (row) => count(row.rows) },
        {
          title: "last interval",
          number: true,
          text: (row) => (known(row.ticks) ? seconds(row.seconds) : "none"),
          hint: (row) =>
            known(row.ticks)
              ? `${count(row.ticks, "ticks")}, of ${row.kind || "SYNC words"}`
              : "the board sends none, or none was seen",
        },
        {
          title: "last minute",
          number: true,
          text: (row) => (known(row.min_ticks) ? `${count(row.min_ticks)} to ${count(row.max_ticks)} ticks` : "–"),
        },
      ],
      { empty: "no board yet" },
    );
    this.spread = new Table(
      "Time stamps between boards",
      [
        { title: "io_group", number: true, text: (row) => String(row.io_group) },
        {
          title: "ahead of the others",
          number: true,
          text: (row) => (known(row.seconds) ? seconds(row.seconds) : "not known"),
          hint: (row) => (known(row.ticks) ? `${count(row.ticks)} ticks` : ""),
        },
        {
          title: "known from",
          text: (row) => ({ resets: "resets each second", clock: "free clocks" })[row.how] ?? (row.how || "–"),
        },
      ],
      { empty: "no board yet" },
    );
    const made = panel(
      "Clocks of boards",
      { class: "clocks" },
      element("h3", {}, "SYNC intervals"),
      this.sync.node,
      element("h3", {}, "Spread of time stamps"),
      this.spread.node,
    );
    this.clockNote = made.note;
    return made.panel;
  }

  packetPanel() {
    this.packetCount = select(
      COUNTS.map((number) => [number, `last ${number}`]),
      { "aria-label": "Number of packets" },
    );
    this.packetCount.value = "50";
    this.packetTypes = TYPES.map((name, type) => {
      const box = element("input", { type: "checkbox", checked: true, id: `type-${type}` });
      box.addEventListener("change", () => this.app.rewatch());
      return { box, node: element("label", { for: `type-${type}` }, box, name) };
    });
    this.packetCount.addEventListener("change", () => this.app.rewatch());
    this.packetFilter = input({
      "aria-label": "Filter, such as io_group=1 chip_id=11",
      placeholder: "io_group=1 chip_id=11",
      size: "24",
    });
    this.packetFilter.addEventListener("input", () => this.showPackets());
    this.hold = button(
      "Hold",
      () => {
        this.held = !this.held;
        setAttribute(this.hold, "aria-pressed", String(Boolean(this.held)));
        this.app.rewatch();
      },
      { "aria-pressed": "false" },
    );
    this.packetBox = element("div", {
      class: "table packets",
      tabindex: "0",
      role: "region",
      "aria-label": "Last packets",
    });
    const made = panel(
      "Last packets",
      { class: "packet-panel" },
      element("div", { class: "row types" }, ...this.packetTypes.map((type) => type.node)),
      element("div", { class: "row" }, this.packetCount, this.packetFilter, this.hold),
      this.packetBox,
    );
    this.packetNote = made.note;
    return made.panel;
  }

  messagePanel() {
    this.messages = element("ol", {
      class: "log messages",
      tabindex: "0",
      "aria-label": "INFO messages, the newest first",
    });
    const made = panel("INFO messages", { class: "message-panel" }, this.messages);
    this.messageNote = made.note;
    return made.panel;
  }

  ledgerPanel() {
    this.ledger = new Table(
      "Live ledger of producers",
      [
        { title: "producer", text: (row) => row.name },
        { title: "run", number: true, text: (row) => (known(row.counted_run) ? String(row.counted_run) : "none") },
        { title: "packets", number: true, text: (row) => count(row.packets) },
        { title: "bad parity", number: true, text: (row) => count(row.bad_parity) },
        {
          title: "unknown words",
          number: true,
          text: (row) => count(row.unknown),
          level: (row) => (row.unknown ? "warning" : ""),
        },
        {
          title: "rows dropped",
          number: true,
          text: (row) => count(row.dropped),
          level: (row) => (row.dropped ? "alarm" : ""),
        },
        { title: "blocks pending", number: true, text: (row) => count(row.owed_blocks) },
        {
          title: "in the spool",
          number: true,
          text: (row) =>
            row.spooled_blocks ? `${plural(row.spooled_blocks, "block")}, ${bytes(row.spooled_bytes)}` : "0 blocks",
        },
        {
          title: "ring",
          number: true,
          text: (row) => percent(row.ring),
          level: (row) => (row.ring > 0.9 ? "alarm" : row.ring > 0.5 ? "warning" : ""),
        },
        { title: "outside of runs", number: true, text: (row) => count(row.outside_run, "packets") },
      ],
      { empty: "no producer is alive" },
    );
    this.stored = new Table(
      "Live counts of storages",
      [
        { title: "storage", text: (row) => row.name },
        { title: "rows in the open part", number: true, text: (row) => count(row.rows) },
        { title: "bytes in the open part", number: true, text: (row) => bytes(row.bytes) },
        { title: "duplicate blocks removed", number: true, text: (row) => count(row.duplicates) },
      ],
      { empty: "no storage is alive" },
    );
    const made = panel("Live ledger", { class: "ledger" }, this.ledger.node, this.stored.node);
    setText(made.note, "exact counts, also of what no monitor has seen");
    return made.panel;
  }

  typePanel() {
    this.types = new Table(
      "Rows by type",
      [
        { title: "rows", text: (row) => row.name.replaceAll("_", " ") },
        { title: "seen", number: true, text: (row) => count(row.rows) },
      ],
      { empty: "no row yet" },
    );
    const made = panel("Rows by type", { class: "row-types" }, this.types.node);
    this.typeNote = made.note;
    return made.panel;
  }

  // What this tab shows, for the server.

  watched() {
    const types = this.packetTypes.map(({ box }, type) => (box.checked ? type : -1)).filter((type) => type >= 0);
    return {
      pixels: this.quantity.value || null,
      histogram: this.selection,
      packets: this.held
        ? null
        : { count: Number(this.packetCount.value), types: types.length === TYPES.length ? null : types },
    };
  }

  submitSelection() {
    const wanted = {};
    for (const name of SELECTION) {
      const text = this.entries[name].value.trim();
      const number = Number(text);
      if (text && !(Number.isInteger(number) && number >= 0 && number <= 255)) {
        setText(
          this.selectionProblem,
          `${name}: expected a whole number from 0 to 255, or nothing for all, found ${text}`,
        );
        this.selectionProblem.hidden = false;
        this.entries[name].focus();
        return;
      }
      wanted[name] = text ? number : null;
    }
    this.choose(wanted);
  }

  // Selects channels for the ADC histogram, and shows them in the map.
  choose(wanted) {
    this.selection = { ...Object.fromEntries(SELECTION.map((name) => [name, null])), ...wanted };
    this.selectionProblem.hidden = true;
    for (const name of SELECTION) this.entries[name].value = this.selection[name] ?? "";
    const { io_group, io_channel, chip, channel } = this.selection;
    if (known(io_group) && known(io_channel) && known(chip)) {
      const there = this.map.locate({ io_group, io_channel, chip_id: chip, channel_id: channel ?? 0 });
      this.map.selection = there && known(channel) ? this.map.cursor : null;
    } else this.map.selection = null;
    this.map.draw();
    this.exact = null;
    this.app.rewatch();
    this.showHistogram();
    if (known(channel) && known(chip) && known(io_group) && known(io_channel))
      this.askExact({ io_group, io_channel, chip_id: chip, channel_id: channel }, true);
  }

  // The exact numbers of the channel under the pointer, once it rests there, and one question at a time.
  hover(channel) {
    clearTimeout(this.resting);
    this.resting = setTimeout(() => this.askExact(channel, false), 150);
  }

  async askExact(channel, selected) {
    if (this.asking) {
      this.next = [channel, selected];
      return;
    }
    this.asking = true;
    try {
      const found = await this.live.request(
        "pixel",
        {
          io_group: channel.io_group,
          io_channel: channel.io_channel,
          chip: channel.chip_id,
          channel: channel.channel_id,
        },
        { kind: "run_data" },
      );
      const spread = `${digits(found.mean_adc, 4)} ± ${digits(found.std, 3)} counts`;
      const adc = `mean ADC ${known(found.mean_adc) ? spread : "not known"}`;
      const text = found.seen_packets
        ? `${rate(found.rate)} now, ${rate(found.mean_rate)} in the run, ${count(found.seen_packets, "packets seen")}, ${adc}`
        : "no packet seen in this run";
      this.map.addExact(channel, text);
      if (selected) {
        this.exact = found;
        this.showHistogram();
      }
    } catch (error) {
      this.map.addExact(channel, error.message);
    } finally {
      this.asking = false;
      const { next } = this;
      this.next = null;
      if (next) this.askExact(...next);
    }
  }

  // Data.

  takePixels(header, values) {
    if (header.name !== "pixels" || header.quantity !== this.quantity.value) return;
    this.pixelsAt = performance.now();
    this.map.setValues(header, values);
    this.showMapNote(header);
  }

  showMapNote(header = this.map.header) {
    const channels = header ? count(header.shape[0] * header.shape[1], "channels") : "";
    const cover = header
      ? `${channels} of ${plural(header.shape[0], "chip")}, run ${header.run ?? "none"}, ${seen(header.seen)}`
      : this.quantity.value
        ? "waiting for the monitor"
        : "off";
    const since = header ? (performance.now() - this.pixelsAt) / 1000 : 0;
    const old = since > OLD + 1;
    setText(this.mapNote, `${cover}${old ? `, OLD: ${age(since)}` : ""}`);
    this.map.frame.classList.toggle("old", old);
  }

  async useLayout() {
    const facts = this.live.state.layout;
    setOptions(this.arrangement, facts ? ARRANGEMENTS : ARRANGEMENTS.slice(1));
    if (facts && !this.wantsGrid) this.arrangement.value = "layout";
    if (!facts || this.wantsGrid) {
      this.map.setLayout(null);
      return;
    }
    try {
      this.map.setLayout(await getLayout(facts));
    } catch (error) {
      this.map.setLayout(null);
      setText(this.mapNote, error.message);
    }
  }

  show() {
    this.update(new Set(Object.keys(this.live.state)));
  }

  update(changed) {
    const { monitor } = this.live.state;
    if (monitor) {
      this.summary = monitor;
      this.summaryAt = this.live.received.monitor;
    }
    if (changed.has("chips") && this.live.state.chips) this.map.setChips(this.live.state.chips);
    if (changed.has("layout")) this.useLayout();
    if (changed.has("monitor")) this.showSummary();
    if (changed.has("history")) this.showRates();
    if (changed.has("histogram")) this.showHistogram();
    if (changed.has("packets") && !this.held) this.showPackets();
    if (changed.has("ledger")) this.showLedger();
    this.tick();
  }

  tick() {
    const since = (performance.now() - this.summaryAt) / 1000;
    const problem =
      this.live.state.monitor_problem || (this.live.state.monitor ? "" : "the online monitor has not answered yet");
    const old = since > OLD || Boolean(problem) || !this.live.fresh;
    const parts = [];
    if (!this.live.fresh) parts.push("no word from the web server");
    else if (problem) parts.push(problem);
    if (this.summary) parts.push(`the figures below are ${age(since)} old`);
    setText(this.stale, old ? `OLD: ${parts.join("; ")}` : "");
    this.stale.hidden = !old;
    this.node.classList.toggle("old", old);
    this.showMapNote();
  }

  showSummary() {
    const { summary } = this;
    if (!summary) {
      for (const table of [this.groups, this.hottest, this.dead, this.sync, this.spread, this.types])
        table.update(null, () => "");
      return;
    }
    const groups = summary.io_groups ?? [];
    this.groups.update(groups, (row) => row.io_group);
    const layout = summary.layout ? [`layout ${summary.layout}`] : [];
    const run = known(summary.run) ? `run ${summary.run}${summary.kind ? ` (${summary.kind})` : ""}` : "no run yet";
    setText(
      this.groupNote,
      `${[run, ...layout].join(", ")}, rates, packets and rows exact; FIFO flags: ${seen(summary.seen)}`,
    );
    setText(this.rateNote, `${rate(summary.rate)} now, ${rate(summary.mean_rate)} over the run, exact`);
    const rates = summary.channel_rates;
    if (rates?.edges?.length) {
      this.channelRates.say("");
      this.channelRates.set({ series: [{ name: "channels", edges: rates.edges, counts: rates.channels }] });
      setText(
        this.channelRateNote,
        `of the last second; ${plural(rates.silent, "channel")} without a packet in it, ${seen(summary.seen)}`,
      );
    } else this.channelRates.say("no packet in this run yet");
    this.hottest.update(summary.hottest, channelName);
    setText(this.hottestNote, seen(summary.seen));
    this.dead.update(summary.dead, channelName);
    setText(
      this.deadNote,
      known(summary.dead_channels)
        ? `${plural(summary.dead_channels, "channel")} stopped, with the rate before`
        : "not known",
    );
    this.sync.update(summary.sync, (row) => row.io_group);
    this.spread.update(summary.spread, (row) => row.io_group);
    setText(this.clockNote, seen(summary.seen));
    const types = Object.entries(summary.rows_by_type ?? {}).map(([name, rows]) => ({ name, rows }));
    this.types.update(types, (row) => row.name);
    setText(
      this.typeNote,
      `${seen(summary.seen)}${summary.late_blocks ? `, ${plural(summary.late_blocks, "late block")}` : ""}`,
    );
    const messages = `${summary.run} ${summary.messages}`;
    if (messages !== this.messageKey) {
      this.messageKey = messages;
      this.askMessages();
    }
  }

  async askMessages() {
    try {
      const found = await this.live.request("messages", { count: 100 }, { kind: "run_data" });
      setText(this.messageNote, `${found.length} of the run, the newest first`);
      this.messages.replaceChildren(
        ...found
          .reverse()
          .map((message) =>
            element(
              "li",
              {},
              element("time", { title: utc(message.time) }, clock(message.time)),
              element("span", {}, message.producer),
              element("span", { class: "text" }, message.text),
            ),
          ),
      );
    } catch (error) {
      this.messageKey = "";
      setText(this.messageNote, error.message);
    }
  }

  showRates() {
    const { history } = this.live.state;
    if (!history?.times.length) {
      this.rates[this.scale.value].say("no rate yet");
      return;
    }
    const names = Object.keys(history.io_groups)
      .filter((name) => name !== "0") // INFO messages
      .sort((one, other) => one - other);
    const entries = [
      { name: "total", colour: "var(--text)" },
      ...names.map((name) => ({ name: `io_group ${name}`, colour: groupColour(name), dash: name > COLOURS.length })),
    ];
    this.rateLegend.update(entries);
    const newest = history.times.at(-1);
    const from = Math.max(
      0,
      history.times.findIndex((time) => time >= newest - Number(this.span.value)),
    );
    const text = getComputedStyle(document.documentElement).getPropertyValue("--text").trim();
    const lines = [];
    if (!this.rateLegend.hidden.has("total"))
      lines.push({ name: "total", values: history.total.slice(from), colour: text, width: 1.5 });
    for (const name of names) {
      if (!this.rateLegend.hidden.has(`io_group ${name}`))
        lines.push({
          name,
          values: history.io_groups[name].slice(from),
          colour: groupColour(name),
          dash: Number(name) > COLOURS.length ? "dashed" : undefined,
        });
    }
    const chart = this.rates[this.scale.value];
    chart.say("");
    chart.set(withGaps(history.times.slice(from), lines));
  }

  showHistogram() {
    const found = this.live.state.histogram;
    const same = found && SELECTION.every((name) => (found.of?.[name] ?? null) === (this.selection[name] ?? null));
    const where =
      SELECTION.filter((name) => this.selection[name] !== null)
        .map((name) => `${name} ${this.selection[name]}`)
        .join(", ") || "all channels";
    const chart = this.adc[this.adcLog.value];
    if (!same || found.problem || !found.entries) {
      chart.say(!same ? "waiting for the monitor" : found.problem || `no data packet of ${where} was seen in this run`);
      this.adcFacts.fill([["selection", where]]);
      setText(this.adcNote, "");
      return;
    }
    const { counts } = found;
    const [first, last] = [counts.findIndex((n) => n > 0), counts.findLastIndex((n) => n > 0)];
    const margin = Math.max(2, Math.round((last - first) * 0.05));
    const [low, high] = [Math.max(0, first - margin), Math.min(counts.length, last + margin + 1)];
    chart.say("");
    chart.set({
      series: [
        {
          name: where,
          edges: Array.from({ length: high - low + 1 }, (_, bin) => low + bin - 0.5),
          counts: counts.slice(low, high),
        },
      ],
    });
    const facts = [
      ["selection", where],
      ["entries", count(found.entries, "packets")],
      ["mean", `${digits(found.mean, 5)} ADC counts`],
      ["std", `${digits(found.std, 4)} ADC counts`],
    ];
    if (found.merged_channels)
      facts.push([
        "missing",
        `${plural(found.merged_channels, "channel")} share a histogram with others of their chip`,
        "warning",
      ]);
    if (this.exact) facts.push(["rate", `${rate(this.exact.rate)} now, ${rate(this.exact.mean_rate)} in the run`]);
    this.adcFacts.fill(facts);
    setText(this.adcNote, `run ${found.run ?? "none"}, ${seen(found.seen)}`);
  }

  showPackets() {
    const found = this.live.state.packets;
    if (!found || found.problem) {
      setText(this.packetNote, found?.problem ?? "waiting for the monitor");
      return;
    }
    const { rows } = found;
    const wanted = [...this.packetFilter.value.matchAll(/(\w+)\s*=\s*(\d+)/g)].map(([, name, value]) => [
      { chip: "chip_id", channel: "channel_id", type: "packet_type" }[name] ?? name,
      value,
    ]);
    const shown = rows.filter((row) => wanted.every(([name, value]) => String(row[name]) === value));
    const configuration = rows.some((row) => row.packet_type === 2 || row.packet_type === 3);
    const columns = PACKET_COLUMNS.filter(
      (name) => name in (rows[0] ?? {}) && (configuration || !name.startsWith("register")),
    );
    setText(this.packetNote, `${shown.length} of ${rows.length} rows, the newest first${this.held ? ", held" : ""}`);
    this.packetBox.replaceChildren(
      shown.length
        ? element(
            "table",
            { "aria-label": "Last packets" },
            element(
              "thead",
              {},
              element(
                "tr",
                {},
                ...columns.map((name) =>
                  element(
                    "th",
                    { scope: "col", class: name === "packet_type" ? null : "number" },
                    name.replaceAll("_", " "),
                  ),
                ),
              ),
            ),
            element(
              "tbody",
              {},
              ...[...shown]
                .reverse()
                .map((row) =>
                  element(
                    "tr",
                    { "data-level": row.valid_parity === 0 && row.packet_type < 4 ? "warning" : null },
                    ...columns.map((name) =>
                      element(
                        "td",
                        { class: name === "packet_type" ? null : "number" },
                        name === "packet_type" ? (TYPES[row[name]] ?? String(row[name])) : String(row[name]),
                      ),
                    ),
                  ),
                ),
            ),
          )
        : element("p", { class: "empty" }, rows.length ? "no row fits the filter" : "no packet yet"),
    );
  }

  showLedger() {
    const { ledger } = this.live.state;
    const rows = (part) =>
      ledger ? Object.entries(ledger[part] ?? {}).map(([name, counts]) => ({ name, ...counts })) : null;
    this.ledger.update(rows("producers"), (row) => row.name);
    this.stored.update(rows("storages"), (row) => row.name);
  }
}

// Times and lines with an empty point wherever nothing was heard for some seconds, so that lines do not bridge a gap.
function withGaps(times, lines) {
  const x = [];
  const values = lines.map(() => []);
  times.forEach((time, at) => {
    if (at && time - times[at - 1] > 4) {
      x.push(times[at - 1] + 1);
      for (const column of values) column.push(null);
    }
    x.push(time);
    values.forEach((column, line) => column.push(lines[line].values[at]));
  });
  return { x, lines: lines.map((line, at) => ({ ...line, values: values[at] })) };
}
