// Panel Snapshots: configurations of all chips, by name in the run catalogue, as `larpixdaq snapshot` has them.

import { Facts, Table, ask, button, element, field, input, panel, select, setAttribute, setOptions } from "./elements.js";
import { count, cut, plural, utc } from "./format.js";

const SHOWN = 2000; // differences in the table
const NAMED = 20; // chips that are named
const NOW = ["", "the wanted values of now"];

export class SnapshotPanel {
  // `tab`: the tab Configuration, which chooses the producer and has the comparison.
  constructor(tab) {
    this.tab = tab;
    this.name = input({ placeholder: "calibrated", size: "14" });
    this.comment = input({ placeholder: "cold, 500 V", size: "20" });
    this.chosen = select([], { "aria-label": "Snapshot" });
    this.other = select([NOW], { "aria-label": "Compare with" });
    this.skip = element("input", { type: "checkbox" });
    this.list = new Table(
      "Snapshots of the catalogue",
      [
        { title: "name", wide: true, text: (row) => row.name },
        { title: "time, UTC", text: (row) => utc(row.time).slice(0, 16) },
        { title: "chips", number: true, text: (row) => count(row.chips) },
        { title: "generation", text: (row) => row.asic },
        { title: "by", wide: true, text: (row) => row.operator },
        { title: "comment", wide: true, text: (row) => row.comment },
      ],
      { empty: "no snapshot yet" },
    );
    this.facts = new Facts("Result");
    this.differences = new Table(
      "Differences from the snapshot",
      [
        { title: "chip", text: (row) => row.chip },
        { title: "register", text: (row) => row.register },
        { title: "snapshot", number: true, text: (row) => count(row.snapshot) },
        { title: "compared with", number: true, text: (row) => count(row.other) },
      ],
      { empty: "no difference" },
    );
    this.differences.node.hidden = true;
    this.compareButton = button("Compare", () => this.compare());
    this.loadButton = tab.changing("Load…", () => this.load());
    this.removeButton = tab.changing("Remove…", () => this.remove(), { class: "danger" });
    const made = panel(
      "Snapshots",
      { class: "snapshots" },
      element("p", { class: "note" }, "The wanted register values of all chips, by name in the run catalogue."),
      element(
        "div",
        { class: "row" },
        field("Name", this.name).row,
        field("Comment", this.comment).row,
        tab.changing("Save a snapshot", () => this.save()),
      ),
      element("div", { class: "scroll-box" }, this.list.node),
      element(
        "div",
        { class: "row" },
        field("Snapshot", this.chosen).row,
        field("Compare with", this.other).row,
        this.compareButton,
      ),
      element(
        "div",
        { class: "row" },
        field("leave out chips that are not here", this.skip).row,
        this.loadButton,
        this.removeButton,
      ),
      this.facts.node,
      element("div", { class: "scroll-box" }, this.differences.node),
    );
    this.node = made.panel;
    this.note = made.note;
    this.show([]);
  }

  // Asks the core for the list.
  async renew() {
    const found = await this.tab.requests.try("list of snapshots", "snapshots", {}, { quiet: true });
    if (found) this.show(found);
  }

  show(found) {
    const names = found.map((snapshot) => snapshot.name);
    this.list.update(found.toReversed(), (row) => row.name);
    setOptions(this.chosen, names.toReversed());
    setOptions(this.other, [NOW, ...names.toReversed()]);
    this.empty = !names.length;
    this.update();
  }

  update() {
    const no = !this.tab.producer.value || this.empty;
    setAttribute(this.compareButton, "disabled", no);
    for (const made of [this.loadButton, this.removeButton])
      setAttribute(made, "disabled", no || !this.tab.app.mayChange);
  }

  async save() {
    const name = this.name.value.trim();
    const params = { name, comment: this.comment.value.trim() };
    const found = await this.tab.do(`save snapshot ${name}`, "save_snapshot", params);
    if (!found) return;
    await this.renew();
    this.chosen.value = found.name;
    this.say([["saved", `${found.name}: ${plural(found.chips, "chip")}`]]);
  }

  async compare() {
    const [name, other] = [this.chosen.value, this.other.value];
    const params = { snapshot: name, other: other || null };
    const found = await this.tab.do(`compare snapshot ${name}`, "compare_snapshot", params);
    if (!found) return;
    this.say([
      [
        "result",
        found.same ? `${name} and ${other || NOW[1]} are the same` : `${name} and ${other || NOW[1]} differ`,
        found.same ? "" : "warning",
      ],
      ["compared", plural(found.chips, "chip")],
      ["different", plural(found.different, "register"), found.different ? "warning" : ""],
      ...chips("only in the snapshot", found.missing),
      ...chips("not in the snapshot", found.new),
      ...moved(found.moved),
      ...(found.different > SHOWN ? [["shown", `the first ${count(Math.min(SHOWN, found.differences.length))}`]] : []),
    ]);
    this.differences.node.hidden = false;
    this.differences.update(found.differences.slice(0, SHOWN), (row) => `${row.chip} ${row.address}`);
  }

  async load() {
    const name = this.chosen.value;
    const skip = this.skip.checked;
    const lines = [
      "Its values become the wanted ones of the chips that it has, and registers that differ are written and read back.",
      "Registers of the network stay as they are.",
    ];
    const params = { snapshot: name, skip_missing: skip };
    const question = { title: `Load the snapshot ${name}?`, lines, action: "Load", danger: true };
    const found = await this.tab.doAfter(question, `load snapshot ${name}`, "load_snapshot", params);
    if (!found) return;
    this.say([
      ["loaded", `${name}: ${found.ok ? "every register has its value" : "NOT as wanted"}`, found.ok ? "" : "alarm"],
      ["written", plural(found.written, "register")],
      ...chips("left out, not here", found.missing),
      ...chips("not in the snapshot, unchanged", found.unchanged, ""),
      ...moved(found.moved),
    ]);
    this.tab.showComparison(found, `snapshot ${name}`);
    if (this.tab.chip) this.tab.showChip();
  }

  async remove() {
    const name = this.chosen.value;
    const question = { title: `Remove the snapshot ${name}?`, action: "Remove", danger: true };
    if (!(await ask(question))) return;
    const found = await this.tab.requests.try(`remove snapshot ${name}`, "remove_snapshot", { name });
    if (!found) return;
    this.say([["removed", name]]);
    this.renew();
  }

  say(facts) {
    this.facts.fill(facts);
    this.differences.node.hidden = true;
  }
}

function chips(title, keys, level = "warning") {
  if (!keys?.length) return [];
  const more = keys.length > NAMED ? `, and ${count(keys.length - NAMED)} more` : "";
  return [[title, `${plural(keys.length, "chip")}: ${cut(keys.slice(0, NAMED).join(", "), 400)}${more}`, level]];
}

const moved = (keys) =>
  chips(
    "on another io_channel",
    Object.entries(keys ?? {}).map(([key, here]) => `${key} as ${here}`),
    "",
  );
