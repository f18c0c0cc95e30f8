// Tab Configuration: boards and their power, chips, networks and registers, snapshots, and any other action.

import {
  Facts,
  Progress,
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
import { count, cut, inline, known, plural } from "./format.js";
import { components } from "./health.js";
import { NetworkPanel } from "./network.js";
import { SnapshotPanel } from "./snapshots.js";

const SHOWN = 2000; // differences in a table
const QUERIES = new Set([
  "state",
  "components",
  "actions",
  "status",
  "run_info",
  "alarms",
  "packet_rate",
  "packets",
  "messages",
  "adc_histogram",
  "summary",
  "pixel_map",
  "pixel",
  "list_routines",
  "board_status",
  "get_boards",
  "ping",
  "retrieve_configuration",
  "retrieve_pixel_layout",
  "compare_snapshot",
  "disabled_channels",
  "retrieve_snapshot",
  "snapshots",
  "records",
]);

// A text of the form as a list of chip keys; null for all.
export function chipsOf(text) {
  const chips = text.split(/[\s,;]+/).filter(Boolean);
  return !chips.length || (chips.length === 1 && chips[0] === "all") ? null : chips;
}

const valueText = (value) =>
  Array.isArray(value)
    ? value.every((part) => part === value[0]) && value.length > 1
      ? `${value.length} × ${value[0]}`
      : value.join(" ")
    : value === undefined || value === null
      ? "–"
      : String(value);

// A value as a person writes it: a number, several numbers with blanks or commas between them, or "64 × 0" for 64 equal
// ones.
export function parseValue(text) {
  const repeated = /^\s*(\d+)\s*[×x*]\s*(\d+)\s*$/.exec(text);
  if (repeated) return new Array(Number(repeated[1])).fill(Number(repeated[2]));
  const parts = text.trim().split(/[\s,]+/);
  const numbers = parts.map((part) => Number(part));
  if (!text.trim() || numbers.some((number) => !Number.isInteger(number) || number < 0))
    throw new Error(`expected whole numbers, found ${cut(text, 40) || "nothing"}`);
  return numbers.length === 1 ? numbers[0] : numbers;
}

export class ConfigurationTab {
  constructor(app) {
    this.app = app;
    this.live = app.live;
    this.requests = app.requests;
    this.known = {}; // register: {wanted, confirmed} of the chip shown
    this.chip = "";
    this.producer = select([], { "aria-label": "Producer" });
    this.changes = []; // buttons that change something
    this.aborts = []; // buttons that end a long action of this page
    const boards = this.boardPanel(); // first, because it has the choice of the producer
    this.network = new NetworkPanel(this, numbers);
    this.snapshots = new SnapshotPanel(this);
    this.node = element(
      "div",
      { class: "grid configuration-grid" },
      element("div", { class: "column" }, boards, this.actionPanel()),
      element("div", { class: "column" }, this.chipPanel(), this.network.node, this.registerPanel()),
      element("div", { class: "column" }, this.comparePanel(), this.snapshots.node),
    );
  }

  // A button that changes something: greyed out without the right to.
  changing(text, click, attributes = {}) {
    const made = button(text, click, attributes);
    this.changes.push(made);
    return made;
  }

  // Requests an action of the chosen producer; a failure is shown, and null is returned.
  do(title, action, params = {}, options = {}) {
    return this.requests.try(title, action, params, { component: this.producer.value, ...options });
  }

  // As do(), after a confirmation. With a `progress`, that shows how the request goes, and it can be aborted.
  async doAfter(question, title, action, params, { progress = null } = {}) {
    if (!(await ask(question))) return null;
    if (!progress) return this.do(title, action, params);
    const show = (hidden) => this.aborts.forEach((made) => (made.hidden = hidden));
    progress.say("sent");
    show(false);
    const report = (response) => progress.report(response);
    return this.requests
      .run(title, action, params, { component: this.producer.value, report })
      .catch((error) => {
        progress.say(error.message, "alarm"); // also without a response, when the connection is lost
        return null;
      })
      .finally(() => show(true));
  }

  // A button that ends the action on chips or boards that this page has requested.
  aborting() {
    const made = this.changing("Abort…", () => this.abort(), { class: "danger", hidden: true });
    this.aborts.push(made);
    return made;
  }

  async abort() {
    const lines = [
      "The running action on chips or boards, or the running routine, ends at once. The readout continues.",
    ];
    const question = { title: "Abort the action?", lines, action: "Abort", danger: true };
    if (await ask(question)) this.do("abort", "abort_routine");
  }

  // A line of a question, while a run is going on.
  runLine() {
    const { run } = this.live.state.status ?? {};
    return run ? [`Run ${run.run} is going on: what the chips send meanwhile goes into it.`] : [];
  }

  boardPanel() {
    this.boardFacts = new Facts("Boards and chips");
    this.boards = new Table(
      "Boards of the producer",
      [
        { title: "io_group", number: true, text: (row) => String(row.io_group) },
        { title: "kind", text: (row) => row.kind },
        { title: "board", wide: true, text: (row) => row.name },
        { title: "revision", number: true, text: (row) => String(row.revision ?? "not known") },
      ],
      { empty: "the producer reads no board" },
    );
    this.networks = new Table(
      "Networks",
      [
        { title: "io_group", number: true, text: (row) => String(row.io_group) },
        { title: "io_channel", number: true, text: (row) => String(row.io_channel) },
        { title: "chips", number: true, text: (row) => count(row.chips) },
      ],
      { empty: "no chip is known: load a board file" },
    );
    this.status = element("div", {
      class: "table board-status",
      tabindex: "0",
      role: "region",
      "aria-label": "Status of the boards",
    });
    this.group = input({ placeholder: "all", size: "6", inputmode: "numeric" });
    this.tiles = input({ placeholder: "all", size: "8" });
    this.vdda = input({ placeholder: "as it is", size: "8", inputmode: "numeric" });
    this.vddd = input({ placeholder: "as it is", size: "8", inputmode: "numeric" });
    this.ramp = element("input", { type: "checkbox" });
    this.limits = input({ placeholder: "vdda_ma=600 vdda_mv=1700-1900", size: "26" });
    this.powerProgress = new Progress("progress of the power-up");
    this.length = input({ value: "256", size: "6", inputmode: "numeric" });
    this.ratio = input({ placeholder: "2", size: "5", inputmode: "numeric" });
    this.channel = input({ placeholder: "all", size: "5", inputmode: "numeric" });
    const made = panel(
      "Boards",
      { class: "board-control" },
      element(
        "div",
        { class: "row" },
        field("Producer", this.producer).row,
        field("io_group", this.group).row,
        button("Known boards", () => this.getBoards()),
        button("Ping", () => this.ping()),
        button("Status and supplies", () => this.boardStatus()),
      ),
      this.boards.node,
      this.boardFacts.node,
      this.status,
      element("h3", {}, "Power"),
      element(
        "div",
        { class: "row" },
        field("tiles", this.tiles).row,
        field("VDDA DAC", this.vdda).row,
        field("VDDD DAC", this.vddd).row,
        field("ramp", this.ramp).row,
        this.changing("Power on…", () => this.power(true)),
        this.changing("Power off…", () => this.power(false), { class: "danger" }),
      ),
      element(
        "div",
        { class: "row" },
        field("limits of the power-up", this.limits).row,
        this.changing("Power up…", () => this.powerUp()),
        this.aborting(),
      ),
      this.powerProgress.node,
      element("h3", {}, "Reset and UART clock"),
      element(
        "div",
        { class: "row" },
        field("reset, ticks", this.length).row,
        this.changing("Reset chips…", () => this.reset(), { class: "danger" }),
        field("io_channel", this.channel).row,
        field("ticks a bit", this.ratio).row,
        this.changing("Set UART clock…", () => this.uartClock()),
      ),
    );
    this.producer.addEventListener("change", () => this.getBoards());
    return made.panel;
  }

  chipPanel() {
    this.boardFile = input({ placeholder: "tile.json", size: "24" });
    this.layoutFile = input({ placeholder: "layout-2.4.0.yaml", size: "24" });
    const made = panel(
      "Chips and networks",
      { class: "chip-files" },
      element(
        "div",
        { class: "row" },
        field("Board file, on the producer's machine", this.boardFile).row,
        this.changing("Load board file…", () => this.loadBoard()),
        this.changing("Bring up networks…", () => this.configureNetwork()),
      ),
      element(
        "div",
        { class: "row" },
        field("Pixel layout, on the producer's machine", this.layoutFile).row,
        this.changing("Load pixel layout", () => this.loadLayout()),
      ),
      element("div", { class: "scroll-box" }, this.networks.node),
    );
    return made.panel;
  }

  registerPanel() {
    this.chipName = input({ placeholder: "1-1-11", size: "10", list: "chip-keys" });
    this.keys = element("datalist", { id: "chip-keys" });
    this.registerFilter = input({
      placeholder: "part of a register's name",
      size: "20",
      "aria-label": "Filter of registers",
    });
    this.registerFilter.addEventListener("input", () => this.showRegisters());
    this.registers = new Table(
      "Registers of the chip",
      [
        { title: "register", text: (row) => row.name },
        {
          title: "wanted",
          wide: true,
          text: (row) => cut(valueText(row.wanted), 60),
          hint: (row) => valueText(row.wanted),
        },
        {
          title: "read last",
          wide: true,
          text: (row) => cut(valueText(row.confirmed), 60),
          hint: (row) => valueText(row.confirmed),
          level: (row) =>
            row.confirmed !== undefined && valueText(row.confirmed) !== valueText(row.wanted) ? "warning" : "",
        },
        {
          title: "new value",
          node: (row) => {
            const entry = input({ size: "10", "aria-label": `New value of ${row.name}`, data: { register: row.name } });
            entry.addEventListener("input", () => this.countChanges());
            return entry;
          },
        },
      ],
      { empty: "no register is known of this chip" },
    );
    this.everyChip = element("input", { type: "checkbox" });
    this.writeButton = this.changing("Write…", () => this.writeChanges(), { class: "primary" });
    const show = element(
      "form",
      { class: "row" },
      field("Chip", this.chipName).row,
      this.keys,
      element("button", { type: "submit" }, "Show known values"),
      this.changing("Read from the chip", () => this.readChip()),
      this.registerFilter,
    );
    show.addEventListener("submit", (event) => {
      event.preventDefault();
      this.showChip();
    });
    const made = panel(
      "Registers",
      { class: "registers" },
      show,
      element("div", { class: "scroll-box" }, this.registers.node),
      element(
        "div",
        { class: "row" },
        field("to all known chips", this.everyChip).row,
        this.writeButton,
        this.changing("Write all wanted values…", () => this.writeWanted()),
      ),
    );
    this.registerNote = made.note;
    return made.panel;
  }

  comparePanel() {
    this.compareChips = input({ placeholder: "all", size: "20" });
    this.compareRegisters = input({ placeholder: "all", size: "20" });
    this.compareFacts = new Facts("Result of the comparison");
    this.differences = new Table(
      "Differences",
      [
        { title: "chip", text: (row) => row.chip },
        { title: "register", text: (row) => row.register },
        { title: "wanted", wide: true, number: true, text: (row) => String(row.expected) },
        {
          title: "found",
          number: true,
          text: (row) => (known(row.found) ? String(row.found) : "no answer"),
          level: () => "warning",
        },
      ],
      { empty: "no difference was found" },
    );
    this.differences.node.hidden = true;
    const made = panel(
      "Compare",
      { class: "compare" },
      element(
        "div",
        { class: "row" },
        field("Chips", this.compareChips).row,
        field("Registers", this.compareRegisters).row,
        this.changing("Read and compare", () => this.compare("validate_configuration")),
        this.changing("Write anew what differs…", () => this.enforce()),
      ),
      this.compareFacts.node,
      element("div", { class: "scroll-box" }, this.differences.node),
    );
    this.compareNote = made.note;
    return made.panel;
  }

  actionPanel() {
    this.target = select([], { "aria-label": "Component" });
    this.action = select([], { "aria-label": "Action" });
    this.params = element("textarea", { rows: "2", cols: "40", spellcheck: "false", placeholder: '{"count": 10}' });
    this.answer = element("div", { class: "scroll-box" });
    this.target.addEventListener("change", () => this.showActions());
    const form = element(
      "form",
      { class: "row" },
      field("Component", this.target).row,
      field("Action", this.action).row,
      field("Parameters, as a JSON object", this.params).row,
      element("button", { type: "submit" }, "Request…"),
    );
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.callAction();
    });
    return panel("Any action", { class: "any-action" }, form, this.answer).panel;
  }

  // Boards.

  groups() {
    return numbers(this.group.value, "io_group");
  }

  // Runs a handler that reads the form; a wrong entry becomes one line.
  async guarded(title, work) {
    try {
      return await work();
    } catch (error) {
      this.requests.add(title).show("error", error.message);
      return null;
    }
  }

  async getBoards() {
    const found = await this.do("known boards", "get_boards", {}, { quiet: true });
    if (!found) return;
    this.boards.update(found.boards, (row) => row.io_group);
    this.networks.update(found.networks, (row) => `${row.io_group} ${row.io_channel}`);
    this.boardFacts.fill([
      ["board", found.board || "none loaded"],
      ["file", found.file || "–"],
      ["chips", `${count(found.chips)} of generation ${found.asic}`],
    ]);
    this.askKeys(found);
  }

  async askKeys(found) {
    if (!found.chips) return;
    const name = { 1: "global_threshold" }[found.asic] ?? "threshold_global";
    const values = await this.do("known chips", "retrieve_configuration", { registers: name }, { quiet: true });
    const keys = Object.keys(values ?? {});
    this.keys.replaceChildren(...keys.slice(0, 10_000).map((key) => element("option", { value: key })));
    if (!this.chipName.value && keys.length) this.chipName.value = keys[0];
  }

  ping() {
    return this.guarded("ping", async () => {
      const found = await this.do("ping", "ping", { io_group: this.groups() });
      if (found)
        this.status.replaceChildren(
          resultNode(
            Object.entries(found).map(([io_group, answers]) => ({
              io_group: Number(io_group),
              answers: answers ? "yes" : "NO ANSWER",
            })),
          ),
        );
    });
  }

  boardStatus() {
    return this.guarded("status of boards", async () => {
      const found = await this.do("status of boards", "board_status", { io_group: this.groups() });
      if (found) this.showStatus(found);
    });
  }

  showStatus(found) {
    const shown = ([name]) => !["supplies", "uncertain", "doubts"].includes(name);
    const facts = found.map((board) => Object.fromEntries(Object.entries(board).filter(shown)));
    const supplies = found.flatMap((board) =>
      (board.supplies ?? []).map((supply) => ({
        io_group: board.io_group,
        ...withUnits(supply, board.uncertain ?? []),
      })),
    );
    const doubts = [...new Set(found.flatMap((board) => board.doubts ?? []))];
    this.status.replaceChildren(
      transposed(facts, "io_group"),
      ...(supplies.length ? [resultNode(supplies)] : []),
      ...doubts.map((doubt) => element("p", { data: { level: "warning" } }, doubt)),
    );
  }

  power(on) {
    return this.guarded("power", async () => {
      const params = { on, tiles: numbers(this.tiles.value, "tiles"), io_group: this.groups() };
      if (on)
        Object.assign(params, {
          vdda_dac: number(this.vdda.value, "VDDA DAC"),
          vddd_dac: number(this.vddd.value, "VDDD DAC"),
          ramp: this.ramp.checked,
        });
      const where = `tiles ${this.tiles.value || "all"} of io_group ${this.group.value || "all"}`;
      const found = await this.doAfter(
        {
          title: `Power ${on ? "on" : "off"}?`,
          lines: [
            where,
            on
              ? `VDDA DAC ${params.vdda_dac ?? "as it is"}, VDDD DAC ${params.vddd_dac ?? "as it is"}${params.ramp ? ", in steps from 0" : ""}`
              : "The chips lose their configuration.",
          ],
          action: `Power ${on ? "on" : "off"}`,
          danger: !on,
        },
        `power ${on ? "on" : "off"}`,
        "power",
        params,
      );
      if (found) this.showStatus(found);
    });
  }

  powerUp() {
    return this.guarded("power up", async () => {
      const params = {
        tiles: numbers(this.tiles.value, "tiles"),
        vdda_dac: number(this.vdda.value, "VDDA DAC"),
        vddd_dac: number(this.vddd.value, "VDDD DAC"),
        limits: parseLimits(this.limits.value),
        io_group: this.groups(),
      };
      const settings = "of the producer's settings";
      const lines = [
        `Tiles ${this.tiles.value || settings} of io_group ${this.group.value || "all"}, from 0 V up in steps, ` +
          "each step measured. A tile that fails is switched off.",
        `VDDA DAC ${params.vdda_dac ?? settings}, VDDD DAC ${params.vddd_dac ?? settings}.`,
        `Limits: ${this.limits.value.trim() || settings}.`,
        "The chips of boards on which no tile was on are reset at the end.",
        ...this.runLine(),
      ];
      const question = { title: "Power up?", lines, action: "Power up" };
      const found = await this.doAfter(question, "power up", "power_up", params, { progress: this.powerProgress });
      if (found) this.showPower(found);
    });
  }

  showPower(found) {
    const names = [...new Set(found.tiles.flatMap(Object.keys))].filter((name) => !["state", "fault"].includes(name));
    const titles = Object.keys(withUnits(Object.fromEntries(names.map((name) => [name, 0])), found.uncertain));
    const table = new Table("Tiles after the power-up", [
      ...names.map((name, at) => ({
        title: titles[at].replace("_dac", " DAC"),
        text: (row) => inline(row[name]),
        number: true,
      })),
      { title: "state", text: (row) => row.state, level: (row) => (row.state === "on" ? "" : "alarm") },
      { title: "remark", wide: true, text: (row) => row.fault, level: (row) => (row.state === "on" ? "" : "alarm") },
    ]);
    table.update(found.tiles, (row) => `${row.io_group} ${row.tile}`);
    const on = found.tiles.filter((row) => row.state === "on").length;
    this.powerProgress.say(`${on} of ${plural(found.tiles.length, "tile")} on`, found.ok ? null : "alarm");
    this.status.replaceChildren(
      table.node,
      ...found.doubts.map((doubt) => element("p", { data: { level: "warning" } }, doubt)),
    );
  }

  reset() {
    return this.guarded("reset", async () => {
      const params = { length: number(this.length.value, "reset, ticks") ?? 256, io_group: this.groups() };
      const found = await this.doAfter(
        {
          title: "Reset the chips?",
          lines: [
            `For ${params.length} ticks of the chips' clock, io_group ${this.group.value || "all"}. They may lose their configuration.`,
          ],
          action: "Reset chips",
          danger: true,
        },
        "reset",
        "reset",
        params,
      );
      if (found) this.status.replaceChildren(resultNode(found));
    });
  }

  uartClock() {
    return this.guarded("UART clock", async () => {
      const ratio = number(this.ratio.value, "ticks a bit");
      if (ratio === null) throw new Error("ticks a bit: expected a whole number from 1 to 255, found nothing");
      const params = { ratio, io_channel: numbers(this.channel.value, "io_channel"), io_group: this.groups() };
      const found = await this.doAfter(
        {
          title: "Set the UART clock?",
          lines: [
            `${ratio} clock ticks a bit, io_channel ${this.channel.value || "all"} of io_group ${this.group.value || "all"}.`,
            "Chips with another setting are not heard then.",
          ],
          action: "Set UART clock",
        },
        "UART clock",
        "set_uart_clock",
        params,
      );
      if (found) this.status.replaceChildren(resultNode(found));
    });
  }

  async loadBoard() {
    const file = this.boardFile.value.trim();
    const found = await this.doAfter(
      {
        title: "Load this board file?",
        lines: [`${file || "(no name)"}: its chips replace those that are known.`],
        action: "Load board file",
      },
      `load board ${file}`,
      "load_board",
      { file },
    );
    if (found) this.getBoards();
  }

  async configureNetwork() {
    const found = await this.doAfter(
      {
        title: "Bring up the networks?",
        lines: ["All chips of the board file are configured, root first, and read back."],
        action: "Bring up networks",
      },
      "bring up networks",
      "configure_network",
    );
    if (found) this.showComparison(found, "networks");
  }

  async loadLayout() {
    const name = this.layoutFile.value.trim();
    const found = await this.do(`pixel layout ${name}`, "load_pixel_layout", { name });
    if (found)
      this.boardFacts.fill([
        ["pixel layout", `${found.name}, version ${found.version ?? "not known"}`],
        ["pixels", count(found.pixels)],
        ["tiles", count(found.tiles)],
        ["pitch", known(found.pitch) ? `${found.pitch} mm` : "not known"],
        ["x", `${found.x?.join(" to ") || "–"} mm`],
        ["y", `${found.y?.join(" to ") || "–"} mm`],
      ]);
  }

  // Registers.

  async showChip() {
    const chip = this.chipName.value.trim();
    if (!chip) {
      this.chipName.focus();
      return;
    }
    const found = await this.do(`known values of ${chip}`, "retrieve_configuration", { chip }, { quiet: true });
    if (!found) return;
    [[this.chip, this.known]] = Object.entries(found);
    this.registers.update([], () => "");
    this.showRegisters();
  }

  showRegisters() {
    const names = [...new Set([...Object.keys(this.known.wanted ?? {}), ...Object.keys(this.known.confirmed ?? {})])];
    const text = this.registerFilter.value.toLowerCase();
    const rows = names
      .filter((name) => name.toLowerCase().includes(text))
      .map((name) => ({ name, wanted: this.known.wanted?.[name], confirmed: this.known.confirmed?.[name] }));
    this.registers.update(rows, (row) => row.name);
    const different = names.filter(
      (name) =>
        this.known.confirmed?.[name] !== undefined &&
        valueText(this.known.confirmed[name]) !== valueText(this.known.wanted?.[name]),
    ).length;
    const unread = names.filter((name) => this.known.confirmed?.[name] === undefined).length;
    setText(
      this.registerNote,
      this.chip
        ? `chip ${this.chip}: ${plural(names.length, "register")}, ${different} read back different, ${unread} never read back`
        : "",
    );
    this.countChanges();
  }

  async readChip() {
    const chip = this.chipName.value.trim();
    if (!chip) {
      this.chipName.focus();
      return;
    }
    if (await this.do(`read ${chip}`, "read_configuration", { chip })) this.showChip();
  }

  edited() {
    return [...this.registers.node.querySelectorAll("input[data-register]")]
      .filter((entry) => entry.value.trim())
      .map((entry) => [entry.dataset.register, entry.value]);
  }

  countChanges() {
    const edits = this.edited().length;
    setText(this.writeButton, edits ? `Write ${plural(edits, "register")}…` : "Write…");
  }

  writeChanges() {
    return this.guarded("write registers", async () => {
      const edited = this.edited();
      if (!edited.length) throw new Error("no new value is given");
      const values = Object.fromEntries(
        edited.map(([name, text]) => {
          try {
            return [name, parseValue(text)];
          } catch (error) {
            throw new Error(`${name}: ${error.message}`, { cause: error });
          }
        }),
      );
      const where = this.everyChip.checked ? "all" : this.chip;
      const lines = Object.entries(values).map(
        ([name, value]) => `${name}: ${valueText(this.known.wanted?.[name])} → ${valueText(value)}`,
      );
      const written = await this.doAfter(
        {
          title: `Write ${plural(lines.length, "register")} of ${where === "all" ? "ALL known chips" : `chip ${where}`}?`,
          lines: [...lines.slice(0, 12), ...(lines.length > 12 ? [`and ${lines.length - 12} more`] : [])],
          action: "Write",
          danger: where === "all",
        },
        `write registers of ${where}`,
        "send_configuration",
        { updates: { [where]: values } },
      );
      if (written) await this.readBack(where === "all" ? this.chip : where, Object.keys(values));
    });
  }

  // Chips do not confirm a write: only a value that was read back is known.
  async readBack(chip, registers) {
    await this.do(`read back ${chip}`, "read_configuration", { chip, registers });
    await this.showChip();
  }

  async writeWanted() {
    const chip = chipsOf(this.chipName.value);
    await this.doAfter(
      {
        title: "Write all wanted values?",
        lines: [
          chip ? `All registers of ${chip.join(", ")}.` : "All registers of ALL known chips.",
          "Chips do not confirm a write: compare afterwards.",
        ],
        action: "Write",
        danger: !chip,
      },
      "write wanted values",
      "write_configuration",
      { chip },
    );
  }

  // Comparison.

  selection() {
    const registers = this.compareRegisters.value
      .split(/[\s,;]+/)
      .filter(Boolean)
      .map((name) => (/^\d+$/.test(name) ? Number(name) : name));
    return { chip: chipsOf(this.compareChips.value), registers: registers.length ? registers : null };
  }

  async compare(action, title = "compare") {
    const found = await this.do(title, action, this.selection());
    if (found) this.showComparison(found, title);
  }

  async enforce() {
    const { chip } = this.selection();
    if (
      await ask({
        title: "Write anew what differs?",
        lines: [
          `Registers of ${chip ? chip.join(", ") : "all chips"} are read, and those that differ from the wanted`,
          "values are written, three times at most.",
        ],
        action: "Write what differs",
      })
    )
      await this.compare("enforce_configuration", "write anew what differs");
  }

  showComparison(found, title) {
    const facts = [
      [
        "result",
        found.ok ? "every register that was read has its wanted value" : "NOT as wanted",
        found.ok ? "" : "alarm",
      ],
      ["read", `${plural(found.registers, "register")} of ${plural(found.chips, "chip")}`],
      ["different", plural(found.different, "register"), found.different ? "warning" : ""],
    ];
    if (known(found.written)) facts.push(["written anew", plural(found.written, "register")]);
    if (known(found.tries)) facts.push(["tries", count(found.tries)]);
    const lists = {
      silent: "silent chips",
      unanswered: "without an answer",
      answered_twice: "answered twice",
      contradicting: "contradicting",
      board_errors: "errors of boards",
    };
    for (const [name, words] of Object.entries(lists))
      if (found[name]?.length)
        facts.push([words, `${found[name].length}: ${cut(found[name].join(", "), 400)}`, "warning"]);
    for (const [name, words] of Object.entries({
      asked_again: "read more than once",
      bad_parity: "with bad parity, ignored",
      strange_answers: "without a question, ignored",
      without_magic: "without the magic word, ignored",
    }))
      if (found[name]) facts.push([words, count(found[name]), "warning"]);
    this.compareFacts.fill(facts);
    setText(this.compareNote, title);
    this.differences.node.hidden = false;
    this.differences.update(found.differences.slice(0, SHOWN), (row) => `${row.chip} ${row.address}`);
    if (found.differences.length < found.different || found.differences.length > SHOWN)
      setText(
        this.compareNote,
        `${title}: the first ${Math.min(SHOWN, found.differences.length)} of ${count(found.different)} differences`,
      );
  }

  // Any action.

  showActions() {
    const actions = this.live.state.actions?.[this.target.value] ?? [];
    setOptions(this.action, actions);
  }

  callAction() {
    return this.guarded("request", async () => {
      const text = this.params.value.trim();
      let params;
      try {
        params = text ? JSON.parse(text) : {};
      } catch (error) {
        throw new Error(`parameters: expected a JSON object: ${error.message}`, { cause: error });
      }
      const [component, action] = [this.target.value, this.action.value];
      if (
        !QUERIES.has(action) &&
        !(await ask({
          title: `Request ${action} of ${component}?`,
          lines: [`Parameters: ${text || "none"}`],
          action: "Request",
        }))
      )
        return;
      const found = await this.requests
        .run(`${action} of ${component}`, action, params, { component: component === "core" ? "" : component })
        .catch((error) => error);
      this.answer.replaceChildren(
        found instanceof Error ? element("p", { class: "problem lines" }, found.message) : resultNode(found),
      );
    });
  }

  show() {
    this.update(new Set(["status", "actions"]));
    this.snapshots.renew();
    if (this.producer.value && !this.asked) {
      this.asked = true;
      this.getBoards();
    }
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
      if (this.producer.value && this.producer.value !== before && this.asked) this.getBoards();
    }
    if (changed.has("actions") && this.live.state.actions) {
      setOptions(this.target, Object.keys(this.live.state.actions));
      this.showActions();
    }
    for (const made of this.changes) setAttribute(made, "disabled", !this.app.mayChange || !this.producer.value);
    this.snapshots.update();
  }
}

function number(text, what) {
  if (!text.trim()) return null;
  const value = Number(text);
  if (!Number.isInteger(value) || value < 0)
    throw new Error(`${what}: expected a whole number, found ${cut(text, 40)}`);
  return value;
}

function numbers(text, what) {
  const parts = text.split(/[\s,;]+/).filter(Boolean);
  return parts.length ? parts.map((part) => number(part, what)) : null;
}

// Limits of monitors as a person writes them, "vdda_ma=600 vdda_mv=1700-1900": a highest value or a range; null for
// none.
export function parseLimits(text) {
  const parts = text.split(/[\s,;]+/).filter(Boolean);
  const limits = parts.map((part) => {
    const match = /^(\w+)=(\d+(?:\.\d+)?)(?:-(\d+(?:\.\d+)?))?$/.exec(part);
    if (!match) throw new Error(`limits: expected vdda_ma=600 or vdda_mv=1700-1900, found ${cut(part, 40)}`);
    const [, name, first, last] = match;
    return [name, last === undefined ? Number(first) : [Number(first), Number(last)]];
  });
  return limits.length ? Object.fromEntries(limits) : null;
}

// The names of supplies with their units: vdda_mv becomes "vdda, mV", with a question mark if its scale is uncertain.
function withUnits(supply, uncertain) {
  const unit = (name) => name.replace(/_(m[va]|uv)$/, (_, short) => `, ${{ mv: "mV", ma: "mA", uv: "µV" }[short]}`);
  const title = (name) => unit(name) + (uncertain.includes(name) ? " ?" : "");
  return Object.fromEntries(Object.entries(supply).map(([name, value]) => [title(name), value]));
}

// A table with a column for each of the rows.
function transposed(rows, head) {
  const names = [...new Set(rows.flatMap(Object.keys))].filter((name) => name !== head);
  const table = new Table("Status of the boards", [
    { title: head, text: (row) => row.name.replace(/_s$/, ", s").replaceAll("_", " ") },
    ...rows.map((one, at) => ({ title: String(one[head]), wide: true, text: (row) => row.texts[at] })),
  ]);
  const texts = (name) =>
    rows.map((row) => (row[name] === true ? "yes" : row[name] === false ? "no" : inline(row[name])));
  table.update(
    names.map((name) => ({ name, texts: texts(name) })),
    (row) => row.name,
  );
  return table.node;
}
