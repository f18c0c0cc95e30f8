// Panel Find a network: the chips of tiles and a network round what does not work, with pictures of the tiles.

import { Facts, Progress, Table, element, field, input, panel, setText } from "./elements.js";
import { count, plural } from "./format.js";

const DRAWN = 16; // tiles, those with the most faults
const FAULTS = 50; // lines
const PITCH = 24;
const COLOURS = ["#3b528b", "#21908c", "#5ec962", "#e0a100"]; // of the io_channels of a tile
const SHAPES = ["10x10", "10x16", "5x5"];
const LEGEND =
  "Colour: io_channel of the tile that leads to the chip; empty circle: no answer; red edge: left out; thick stub: " +
  "root; line: link in use; red line: broken, or with a dot at the end that hears: works only in this direction.";

// The shape of a tile as a person writes it: a name, or a JSON object with rows, columns and roots; null for none.
export function parseShape(text) {
  const trimmed = text.trim();
  if (!trimmed) return null;
  if (!trimmed.startsWith("{")) return trimmed;
  try {
    return JSON.parse(trimmed);
  } catch (error) {
    throw new Error(`shape: expected a name such as 10x10 or a JSON object: ${error.message}`, { cause: error });
  }
}

export class NetworkPanel {
  // `tab`: the tab Configuration. `numbers`: makes a list of numbers of a text.
  constructor(tab, numbers) {
    this.tab = tab;
    this.numbers = numbers;
    this.group = input({ placeholder: "all", size: "6" });
    this.tiles = input({ placeholder: "those on", size: "8" });
    this.shape = input({ placeholder: "10x10", size: "10", list: "tile-shapes" });
    this.exclude = input({ placeholder: "none", size: "14" });
    this.file = input({ placeholder: "named by the time", size: "18" });
    this.reset = element("input", { type: "checkbox" });
    this.reset.checked = true;
    this.progress = new Progress("progress of the discovery");
    this.facts = new Facts("Network that was found");
    this.table = new Table(
      "Tiles",
      [
        { title: "io_group", number: true, text: (row) => String(row.io_group) },
        { title: "tile", number: true, text: (row) => String(row.tile) },
        { title: "chips", number: true, text: (row) => `${count(row.chips)} of ${count(row.rows * row.columns)}` },
        {
          title: "roots",
          wide: true,
          text: (row) =>
            Object.entries(row.roots)
              .map(([channel, chip]) => `${channel}: ${chip}`)
              .join(", ") || "none answers",
          level: (row) => (Object.keys(row.roots).length ? "" : "alarm"),
        },
        {
          title: "faults",
          number: true,
          text: (row) => count(row.faults),
          level: (row) => (row.faults ? "warning" : ""),
        },
      ],
      { empty: "no tile" },
    );
    this.table.node.hidden = true;
    this.faults = element("ul", { class: "faults", "aria-label": "Faults" });
    this.pictures = element("div", { class: "tiles" });
    this.legend = element("p", { class: "note", hidden: true }, LEGEND);
    const made = panel(
      "Find a network",
      { class: "network" },
      element(
        "div",
        { class: "row" },
        field("io_group", this.group).row,
        field("tiles, from 0", this.tiles).row,
        field("shape", this.shape).row,
        element("datalist", { id: "tile-shapes" }, ...SHAPES.map((value) => element("option", { value }))),
        field("leave out chips", this.exclude).row,
      ),
      element(
        "div",
        { class: "row" },
        field("New board file, on the producer's machine", this.file).row,
        field("reset the chips", this.reset).row,
        tab.changing("Find the network…", () => this.find()),
        tab.aborting(),
      ),
      this.progress.node,
      this.facts.node,
      this.table.node,
      element("div", { class: "scroll-box" }, this.faults),
      element("div", { class: "scroll-box tall" }, this.pictures),
      this.legend,
    );
    this.node = made.panel;
    this.note = made.note;
  }

  find() {
    return this.tab.guarded("find the network", async () => {
      const excluded = this.exclude.value.split(/[\s,;]+/).filter(Boolean);
      const params = {
        file: this.file.value.trim() || null,
        tiles: this.numbers(this.tiles.value, "tiles"),
        io_group: this.numbers(this.group.value, "io_group"),
        shape: parseShape(this.shape.value),
        exclude: excluded.length ? excluded : null,
        reset: this.reset.checked,
      };
      const lines = [
        `Tiles ${this.tiles.value || "that are on"} of io_group ${this.group.value || "all"}: ` +
          "the chips that are found replace those that are known.",
        params.reset
          ? "All chips of these boards are reset: they lose their configuration."
          : "Without a reset: only for tiles that have just got their power.",
        ...this.tab.runLine(),
      ];
      const question = { title: "Find the network?", lines, action: "Find the network", danger: true };
      const found = await this.tab.doAfter(question, "find the network", "discover_network", params, {
        progress: this.progress,
      });
      if (!found) return;
      this.show(found);
      this.tab.getBoards();
    });
  }

  // Shows a result of discover_network.
  show(found) {
    const faults = found.faults.length;
    this.facts.fill([
      ["found", `${plural(found.chips, "chip")} on ${plural(found.tiles.length, "tile")}`],
      ["without a chip", plural(found.missing, "position"), found.missing ? "warning" : ""],
      ["faults", faults ? count(faults) : "none", faults ? "warning" : ""],
      ["board file", `${found.file}, which is loaded`],
      ["chips", found.state, found.state.startsWith("not known") ? "alarm" : ""],
      ["time", `${found.seconds} s`],
    ]);
    this.table.node.hidden = false;
    this.table.update(found.tiles, (row) => `${row.io_group} ${row.tile}`);
    const more = faults > FAULTS ? [element("li", {}, `and ${count(faults - FAULTS)} more`)] : [];
    this.faults.replaceChildren(...found.faults.slice(0, FAULTS).map((fault) => element("li", {}, fault)), ...more);
    const drawn = new Set(found.tiles.toSorted((one, other) => other.faults - one.faults).slice(0, DRAWN));
    this.pictures.replaceChildren(...found.tiles.filter((tile) => drawn.has(tile)).map(tileFigure));
    this.legend.hidden = false;
    setText(this.note, drawn.size < found.tiles.length ? `the ${DRAWN} tiles with the most faults are drawn` : "");
  }
}

function tileFigure(tile) {
  const title = `io_group ${tile.io_group} tile ${tile.tile}: ${tile.chips} of ${tile.rows * tile.columns} chips`;
  return element("figure", {}, element("figcaption", {}, title), tilePicture(tile, title));
}

// A tile as SVG: a circle for each position, row by row, and lines for its links.
export function tilePicture(tile, title) {
  const place = (chip) => {
    const row = Math.floor((chip - tile.first_id) / tile.row_step);
    return [PITCH * ((chip - tile.first_id) % tile.row_step) + 28, PITCH * row + 12];
  };
  const channels = new Map(tile.network.map(([chip, channel]) => [chip, channel]));
  const parts = [];
  const stroke = (path, used) =>
    svg("path", { d: path, class: used ? "used" : "bad", "stroke-dasharray": used ? null : "3 2" });
  const line = (one, other, used) => {
    const [[x1, y1], [x2, y2]] = [place(one), place(other)];
    parts.push(stroke(`M${x1} ${y1}L${x2} ${y2}`, used));
    return (share) => [x1 + share * (x2 - x1), y1 + share * (y2 - y1)];
  };
  for (const [chip, , parent] of tile.network) {
    const [x, y] = place(chip);
    if (parent) line(parent, chip, true);
    else parts.push(svg("path", { d: `M${x - 20} ${y}H${x}`, class: "used root" }));
  }
  for (const [one, other] of tile.broken) line(one, other, false);
  for (const [one, other] of tile.bad_links)
    if (one > 0) line(one, other, false);
    else {
      const [x, y] = place(other);
      parts.push(stroke(`M${x - 20} ${y}H${x}`, false));
    }
  for (const [one, other] of tile.one_way) {
    const [x, y] = line(one, other, false)(0.75);
    parts.push(svg("circle", { cx: x, cy: y, r: 3, class: "hears" }));
  }
  const excluded = new Set(tile.excluded);
  for (let at = 0; at < tile.rows * tile.columns; at += 1) {
    const chip = tile.first_id + Math.floor(at / tile.columns) * tile.row_step + (at % tile.columns);
    const [x, y] = place(chip);
    const channel = channels.get(chip);
    const fill = channel === undefined ? null : COLOURS[(channel - 1) % COLOURS.length];
    const kind = `chip${fill ? "" : " silent"}${excluded.has(chip) ? " excluded" : ""}`;
    const words = fill ? `io_channel ${channel}` : excluded.has(chip) ? "left out" : "no answer";
    parts.push(svg("circle", { cx: x, cy: y, r: 8, class: kind, fill }, svg("title", {}, `chip ${chip}: ${words}`)));
  }
  const [width, height] = [PITCH * tile.columns + 24, PITCH * tile.rows + 4];
  const attributes = { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": title };
  return svg("svg", attributes, ...parts);
}

function svg(tag, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== null) made.setAttribute(name, value);
  made.append(...children);
  return made;
}
