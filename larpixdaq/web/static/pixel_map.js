// The map of all channels on a canvas: one byte a channel becomes one colour, at the pixel's position in the pixel
// layout, or as chips x channels in a band for each io_group. 409,600 channels are painted in a few ms (docs/monitor.md).
//
// A screen pixel that covers several channels shows the highest of them, so that a single hot channel never disappears.

import { COLOURS, heatColours } from "./charts.js";
import { button, element, setText } from "./elements.js";
import { channelName, count, digits, known, rate } from "./format.js";

const GAP = 4; // cells between bands or panels
const LABEL = 18; // CSS pixels for the name of an io_group
const MAX_ZOOM = 64;
const NOWHERE = 0xffffffff;

// The number that a code stands for; null when no packet was seen. Scales: {low, high} is logarithmic from code 1 to
// 255, {low, high, linear: true} is linear; {step} counts from 0.
export function decode(scale, code) {
  if (!code) return null;
  if (scale?.linear) return scale.low + ((scale.high - scale.low) * (code - 1)) / 254;
  if (known(scale?.low)) return scale.low * (scale.high / scale.low) ** ((code - 1) / 254);
  return code * (scale?.step ?? 1);
}

// Codes and scale of values, of which NaN and, in logarithmic scale, 0 are none.
export function encode(values, logarithmic) {
  let [low, high] = [Infinity, -Infinity];
  const usable = (value) => Number.isFinite(value) && (!logarithmic || value > 0);
  for (const value of values) {
    if (usable(value)) {
      if (value < low) low = value;
      if (value > high) high = value;
    }
  }
  if (!(low < high)) [low, high] = [Number.isFinite(low) ? low : 1, (Number.isFinite(low) ? low : 1) * 1.01 + 1e-6];
  const place = logarithmic
    ? (value) => Math.log(value / low) / Math.log(high / low)
    : (value) => (value - low) / (high - low);
  const codes = Uint8Array.from(values, (value) => (usable(value) ? 1 + Math.round(254 * place(value)) : 0));
  return { codes, scale: logarithmic ? { low, high } : { low, high, linear: true } };
}

export const QUANTITIES = {
  rate: { title: "rate", text: (value) => rate(value), none: "no packet seen" },
  mean_adc: { title: "mean ADC", text: (value) => `${digits(value, 3)} ADC counts`, none: "no data packet seen" },
  packets: { title: "packets", text: (value) => count(Math.round(value), "packets"), none: "no packet seen" },
  mean: { title: "mean ADC", text: (value) => `${digits(value, 4)} ADC counts`, none: "no data packet seen" },
  std: { title: "std of ADC", text: (value) => `${digits(value, 3)} ADC counts`, none: "no data packet seen" },
};

export class PixelMap {
  // `hover(channel)` is called when the pointer or the cursor rests on a channel, `select(channel)` on a click or
  // Enter.
  constructor({ hover = () => {}, select = () => {} } = {}) {
    this.hover = hover;
    this.select = select;
    this.canvas = element("canvas", {
      tabindex: "0",
      role: "application",
      "aria-label":
        "Map of all channels. Arrow keys move the cursor from channel to channel, plus and minus zoom, Enter selects the channel, Home shows all.",
    });
    this.tip = element("div", { class: "tip", hidden: true });
    this.frame = element("div", { class: "map" }, this.canvas, this.tip);
    this.legend = element("div", { class: "map-legend" });
    this.info = element("p", { class: "map-info", "aria-live": "polite" });
    this.tools = element(
      "span",
      { class: "buttons" },
      button("+", () => this.zoomBy(2), { "aria-label": "zoom in", title: "zoom in (+)" }),
      button("−", () => this.zoomBy(0.5), { "aria-label": "zoom out", title: "zoom out (−)" }),
      button("all", () => this.showAll(), { title: "show all channels (Home)" }),
    );
    this.node = element("div", {}, this.frame, this.info, this.legend);
    this.chips = [];
    this.layout = null;
    this.channels = 64;
    this.header = null;
    this.values = null;
    this.palette = heatColours();
    this.zoom = 1;
    this.centre = [0.5, 0.5];
    this.cursor = null;
    this.selection = null;
    this.placed = "";
    this.image = document.createElement("canvas");
    this.listen();
    new ResizeObserver(() => this.resize()).observe(this.frame);
  }

  setChips(chips) {
    this.chips = chips;
    this.place();
  }

  setLayout(layout) {
    this.layout = layout;
    this.placed = "";
    this.place();
  }

  // `values`: a code for each channel; `exact`: the numbers themselves, if they are known.
  setValues(header, values, exact = null) {
    this.header = header;
    this.values = values;
    this.exact = exact;
    this.channels = header.shape[1];
    this.place();
    this.draw();
  }

  clear() {
    this.header = this.values = null;
    this.draw();
  }

  // Gives every channel a cell: `cellX`, `cellY` by chip and channel, and `owner`, the channel of each cell.
  place() {
    const key = `${this.chips.length} ${this.channels} ${this.layout?.key ?? ""}`;
    if (key === this.placed || !this.chips.length) return;
    this.placed = key;
    const size = this.chips.length * this.channels;
    this.cellX = new Uint32Array(size).fill(NOWHERE);
    this.cellY = new Uint32Array(size).fill(NOWHERE);
    this.indexOf = new Map(this.chips.map((chip, index) => [chip.join("-"), index]));
    this.panels = [];
    this.uniform = Boolean(this.layout);
    if (this.layout) this.placeByLayout();
    if (!this.panels.length) {
      this.uniform = false;
      this.placeAsGrid();
    }
    this.owner = new Int32Array(this.columns * this.rows).fill(-1);
    for (let index = 0; index < size; index += 1) {
      if (this.cellX[index] !== NOWHERE) this.owner[this.cellY[index] * this.columns + this.cellX[index]] = index;
    }
    this.bins = null;
    this.draw();
  }

  groups() {
    const groups = new Map();
    this.chips.forEach(([group, channel, chip], index) => {
      if (!groups.has(group)) groups.set(group, []);
      groups.get(group).push({ index, channel, chip });
    });
    return [...groups].sort(([one], [other]) => one - other);
  }

  placeAsGrid() {
    let top = 0;
    this.columns = 0;
    for (const [group, chips] of this.groups()) {
      chips.sort((one, other) => one.channel - other.channel || one.chip - other.chip);
      let left = 0;
      chips.forEach(({ index, channel }, place) => {
        if (place && chips.length > 16 && chips[place - 1].channel !== channel) left += 1;
        for (let at = 0; at < this.channels; at += 1) {
          this.cellX[index * this.channels + at] = left;
          this.cellY[index * this.channels + at] = top + at;
        }
        left += 1;
      });
      this.panels.push({ name: `io_group ${group}`, left: 0, top, columns: left, rows: this.channels });
      this.columns = Math.max(this.columns, left);
      top += this.channels + GAP;
    }
    this.rows = Math.max(1, top - GAP);
  }

  // One panel for each io_group, because the anodes of a detector lie behind each other.
  placeByLayout() {
    const { pitch, positions } = this.layout;
    const sides = [];
    for (const [group, chips] of this.groups()) {
      const cells = [];
      for (const { index } of chips) {
        const place = positions(this.chips[index]);
        if (!place) continue;
        for (let at = 0; at < Math.min(this.channels, place.x.length); at += 1) {
          if (known(place.x[at]) && known(place.y[at]))
            cells.push([index * this.channels + at, place.x[at] / pitch, place.y[at] / pitch]);
        }
      }
      if (!cells.length) continue;
      const [left, right] = extent(cells, 1);
      const [bottom, top] = extent(cells, 2);
      sides.push({
        name: `io_group ${group}`,
        cells,
        left,
        top,
        columns: Math.round(right - left) + 1,
        rows: Math.round(top - bottom) + 1,
      });
    }
    if (!sides.length) return;
    const width = Math.max(...sides.map((side) => side.columns)) + GAP;
    const tallest = Math.max(...sides.map((side) => side.rows));
    const { best, scale } = this.panelsInRow(sides.length, width, tallest + GAP);
    this.panelSize = { count: sides.length, width, height: tallest + GAP, best };
    const label = Math.max(GAP, Math.ceil(LABEL / scale)); // rows above each panel, for its name
    const height = tallest + label;
    this.columns = best * width - GAP;
    this.rows = Math.ceil(sides.length / best) * height;
    sides.forEach((side, place) => {
      const left = (place % best) * width;
      const top = Math.floor(place / best) * height + label;
      for (const [index, x, y] of side.cells) {
        this.cellX[index] = left + Math.round(x - side.left);
        this.cellY[index] = top + Math.round(side.top - y);
      }
      this.panels.push({ name: side.name, left, top, columns: side.columns, rows: side.rows });
    });
  }

  // The number of panels beside each other with which they are largest, and the CSS pixels of a cell then.
  panelsInRow(panels, width, height) {
    const [wide, high] = [this.frame.clientWidth || 1000, this.frame.clientHeight || 500];
    const scale = (n) => Math.min(wide / (n * width), high / (Math.ceil(panels / n) * height));
    let best = 1;
    for (let n = 2; n <= panels; n += 1) if (scale(n) > scale(best)) best = n;
    return { best, scale: scale(best) };
  }

  resize() {
    const { count: panels, width, height, best } = this.panelSize ?? {};
    if (this.uniform && this.panelsInRow(panels, width, height).best !== best) {
      this.placed = "";
      this.place();
    }
    this.draw();
  }

  // The view: cells are scaled by `scaleX` and `scaleY` CSS pixels, and the cell at `left`, `top` is at the corner of the
  // canvas.
  view() {
    const margin = this.uniform ? 0 : LABEL;
    const width = this.frame.clientWidth - margin;
    const height = this.frame.clientHeight;
    let [scaleX, scaleY] = [width / this.columns, height / this.rows];
    if (this.uniform) scaleX = scaleY = Math.min(scaleX, scaleY);
    scaleX *= this.zoom;
    scaleY *= this.zoom;
    const at = (centre, cells, scale, size) => {
      const shown = size / scale;
      if (shown >= cells) return (cells - shown) / 2;
      return Math.min(Math.max(centre * cells - shown / 2, 0), cells - shown);
    };
    return {
      margin,
      width,
      height,
      scaleX,
      scaleY,
      left: at(this.centre[0], this.columns, scaleX, width),
      top: at(this.centre[1], this.rows, scaleY, height),
    };
  }

  // Cells that share a screen pixel are put into one bin of `factorX` x `factorY` cells.
  binning(view) {
    const ratio = window.devicePixelRatio || 1;
    const factorX = Math.max(1, Math.ceil(1 / (view.scaleX * ratio) - 1e-9));
    const factorY = Math.max(1, Math.ceil(1 / (view.scaleY * ratio) - 1e-9));
    if (this.bins?.factorX === factorX && this.bins.factorY === factorY) return this.bins;
    const columns = Math.ceil(this.columns / factorX);
    const rows = Math.ceil(this.rows / factorY);
    const bin = new Uint32Array(this.cellX.length);
    const empty = columns * rows; // one bin more, for channels that have no place
    for (let index = 0; index < bin.length; index += 1) {
      bin[index] =
        this.cellX[index] === NOWHERE
          ? empty
          : Math.floor(this.cellY[index] / factorY) * columns + Math.floor(this.cellX[index] / factorX);
    }
    this.bins = { factorX, factorY, columns, rows, bin, codes: new Int16Array(empty + 1) };
    return this.bins;
  }

  draw() {
    if (this.queued) return;
    this.queued = true;
    requestAnimationFrame(() => {
      this.queued = false;
      this.paint();
    });
  }

  paint() {
    const ratio = window.devicePixelRatio || 1;
    const [width, height] = [this.frame.clientWidth, this.frame.clientHeight];
    if (!width || !height) return;
    if (this.canvas.width !== Math.round(width * ratio) || this.canvas.height !== Math.round(height * ratio)) {
      this.canvas.width = Math.round(width * ratio);
      this.canvas.height = Math.round(height * ratio);
    }
    const context = this.canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    if (!this.panels?.length || !this.values) {
      this.legend.hidden = true;
      delete this.canvas.dataset.shown;
      return;
    }
    const began = performance.now();
    const view = this.view();
    const bins = this.binning(view);
    this.range = this.findRange();
    this.paintImage(bins);
    context.imageSmoothingEnabled = false;
    context.save();
    context.beginPath();
    context.rect(view.margin, 0, view.width, view.height);
    context.clip();
    context.drawImage(
      this.image,
      view.margin - view.left * view.scaleX,
      -view.top * view.scaleY,
      bins.columns * bins.factorX * view.scaleX,
      bins.rows * bins.factorY * view.scaleY,
    );
    context.restore();
    this.paintLabels(context, view);
    this.paintCursor(context, view);
    this.drawLegend(bins);
    this.canvas.dataset.shown = `${this.header.quantity} ${this.header.time}`;
    this.took = performance.now() - began;
  }

  // The lowest and highest code, rounded outwards to sixteenths of the scale so that colours do not flicker.
  findRange() {
    let [low, high] = [256, 0];
    for (const code of this.values) {
      if (code) {
        if (code < low) low = code;
        if (code > high) high = code;
      }
    }
    if (!high) return [1, 255];
    const step = 16;
    return [
      Math.max(1, Math.floor((low - 1) / step) * step + 1),
      Math.min(255, Math.max(2, Math.ceil(high / step) * step)),
    ];
  }

  colours() {
    const style = getComputedStyle(this.canvas);
    const rgb = (name) => {
      const value = style.getPropertyValue(name).trim();
      return [1, 3, 5].map((at) => parseInt(value.slice(at, at + 2), 16));
    };
    const pack = ([r, g, b]) => (0xff000000 | (b << 16) | (g << 8) | r) >>> 0;
    const [low, high] = this.range;
    const table = new Uint32Array(257);
    table[0] = 0; // no channel here: transparent
    table[1] = pack(rgb("--silent-pixel"));
    for (let code = 1; code < 256; code += 1) {
      table[code + 1] = pack(this.palette[Math.min(255, Math.max(0, Math.round(((code - low) / (high - low)) * 255)))]);
    }
    return table;
  }

  paintImage(bins) {
    const { codes, bin, columns, rows } = bins;
    const values = this.values;
    codes.fill(-1);
    const size = Math.min(values.length, bin.length);
    for (let index = 0; index < size; index += 1) {
      const at = bin[index];
      if (values[index] > codes[at]) codes[at] = values[index];
    }
    if (this.image.width !== columns || this.image.height !== rows) {
      this.image.width = columns;
      this.image.height = rows;
      this.bitmap = null;
    }
    const context = this.image.getContext("2d");
    this.bitmap ??= context.createImageData(columns, rows);
    const pixels = new Uint32Array(this.bitmap.data.buffer);
    const table = this.colours();
    for (let at = 0; at < pixels.length; at += 1) pixels[at] = table[codes[at] + 1];
    context.putImageData(this.bitmap, 0, 0);
  }

  paintLabels(context, view) {
    const style = getComputedStyle(this.canvas);
    context.fillStyle = style.color;
    context.font = `13px ${style.fontFamily}`;
    for (const panel of this.panels) {
      const x = view.margin + (panel.left - view.left) * view.scaleX;
      const y = (panel.top - view.top) * view.scaleY;
      if (this.uniform) {
        context.textAlign = "left";
        const fits = panel.columns * view.scaleX > context.measureText(panel.name).width + 4;
        context.fillText(fits ? panel.name : panel.name.replace("io_group ", ""), Math.max(2, x), Math.max(13, y - 4));
        continue;
      }
      const [top, bottom] = [Math.max(0, y), Math.min(view.height, y + panel.rows * view.scaleY)];
      const name = bottom - top > 74 ? panel.name : panel.name.replace("io_group ", "");
      if (bottom - top < 12) continue;
      context.save();
      context.translate(13, (top + bottom) / 2);
      context.rotate(-Math.PI / 2);
      context.textAlign = "center";
      context.fillText(name, 0, 0);
      context.restore();
    }
  }

  paintCursor(context, view) {
    const outline = (index, colour, size) => {
      const [x, y] = this.screen(index, view);
      const [wide, high] = [Math.max(view.scaleX, 3), Math.max(view.scaleY, 3)];
      context.strokeStyle = colour;
      context.lineWidth = 2;
      context.strokeRect(x - wide / 2 - size, y - high / 2 - size, wide + 2 * size, high + 2 * size);
    };
    if (this.selection !== null) outline(this.selection, COLOURS[3], 5);
    delete this.canvas.dataset.cursor;
    if (this.cursor === null || this.cellX[this.cursor] === NOWHERE) return;
    outline(this.cursor, getComputedStyle(this.canvas).color, 2);
    const [x, y] = this.screen(this.cursor, view);
    this.canvas.dataset.cursor = `${x.toFixed(1)},${y.toFixed(1)}`;
  }

  // The centre of a channel's cell on the canvas, in CSS pixels.
  screen(index, view) {
    return [
      view.margin + (this.cellX[index] + 0.5 - view.left) * view.scaleX,
      (this.cellY[index] + 0.5 - view.top) * view.scaleY,
    ];
  }

  drawLegend(bins) {
    const { quantity, scale } = this.header;
    const { title, text, none } = QUANTITIES[quantity];
    const [low, high] = this.range;
    const merged = bins.factorX * bins.factorY;
    const key = JSON.stringify([quantity, scale, low, high, merged, this.layout?.key]);
    this.legend.hidden = false;
    if (key === this.legendKey) return;
    this.legendKey = key;
    const bar = element("span", { class: "bar" });
    const stops = [0, 64, 128, 191, 255].map((step) => `rgb(${this.palette[step].join(" ")})`);
    bar.style.background = `linear-gradient(to right, ${stops.join(", ")})`;
    const value = (code) => text(decode(scale, code));
    this.legend.replaceChildren(
      element("span", {}, `${title}: ${value(low)}`),
      bar,
      element("span", {}, value(high)),
      element("span", {}, element("i", { class: "silent-pixel" }), none),
      element(
        "span",
        { class: "note" },
        merged > 1
          ? `a point shows the highest of up to ${merged} channels: zoom in to see each`
          : "a point is one channel",
      ),
    );
  }

  // The channel at a flat index, with its value.
  channel(index) {
    const chip = this.chips[Math.floor(index / this.channels)];
    return { io_group: chip[0], io_channel: chip[1], chip_id: chip[2], channel_id: index % this.channels };
  }

  describe(index) {
    const channel = this.channel(index);
    const tile = this.layout?.positions(this.chips[Math.floor(index / this.channels)])?.tile;
    const { text, none } = QUANTITIES[this.header.quantity];
    const value =
      this.exact && this.values[index] ? this.exact[index] : decode(this.header.scale, this.values[index] ?? 0);
    const place = [
      `io_group ${channel.io_group}`,
      `io_channel ${channel.io_channel}`,
      ...(known(tile) ? [`tile ${tile}`] : []),
      `chip ${channel.chip_id}`,
      `channel ${channel.channel_id}`,
    ].join(", ");
    return `${place}: ${value === null ? none : `${this.exact ? "" : "about "}${text(value)}`}`;
  }

  // Moves the cursor to a channel, or the first one of a chip, and shows it. Returns false if the map does not have it.
  locate({ io_group, io_channel, chip_id, channel_id }) {
    const chip = this.indexOf?.get(`${io_group}-${io_channel}-${chip_id}`);
    if (chip === undefined) return false;
    const index = chip * this.channels + (channel_id ?? 0);
    if (!(index < this.cellX.length) || this.cellX[index] === NOWHERE) return false;
    this.centre = [(this.cellX[index] + 0.5) / this.columns, (this.cellY[index] + 0.5) / this.rows];
    this.zoom = Math.max(
      this.zoom,
      Math.min(MAX_ZOOM, 8 / Math.min(this.view().scaleX / this.zoom, this.view().scaleY / this.zoom)),
    );
    this.moveTo(index);
    return true;
  }

  moveTo(index) {
    this.cursor = index;
    setText(this.info, `${channelName(this.channel(index))}: ${this.values ? this.describe(index) : "no data"}`);
    this.hover(this.channel(index));
    this.draw();
  }

  // A text after the description of the cursor's channel: the exact numbers of the monitor.
  addExact(channel, text) {
    if (this.cursor !== null && channelName(this.channel(this.cursor)) === channelName(channel)) {
      setText(this.info, `${channelName(channel)}: ${this.describe(this.cursor)} · ${text}`);
      if (!this.tip.hidden) this.tip.textContent = this.info.textContent;
    }
  }

  showAll() {
    this.zoom = 1;
    this.centre = [0.5, 0.5];
    this.draw();
  }

  // Zooms in or out around a point of the canvas (by default around the cursor or the middle).
  zoomBy(factor, x = null, y = null) {
    if (!this.panels?.length) return;
    const before = this.view();
    if (x === null)
      [x, y] =
        this.cursor === null ? [before.margin + before.width / 2, before.height / 2] : this.screen(this.cursor, before);
    const cell = [before.left + (x - before.margin) / before.scaleX, before.top + y / before.scaleY];
    this.zoom = Math.min(MAX_ZOOM, Math.max(1, this.zoom * factor));
    const after = this.view();
    this.centre = [
      (cell[0] - (x - after.margin) / after.scaleX + after.width / after.scaleX / 2) / this.columns,
      (cell[1] - y / after.scaleY + after.height / after.scaleY / 2) / this.rows,
    ];
    this.draw();
  }

  // The channel at a point of the canvas; null if there is none.
  at(x, y) {
    if (!this.panels?.length || !this.values) return null;
    const view = this.view();
    const column = Math.floor(view.left + (x - view.margin) / view.scaleX);
    const row = Math.floor(view.top + y / view.scaleY);
    if (x < view.margin || column < 0 || row < 0 || column >= this.columns || row >= this.rows) return null;
    const bins = this.binning(view);
    let found = null;
    for (let down = 0; down < bins.factorY; down += 1) {
      for (let across = 0; across < bins.factorX; across += 1) {
        const [c, r] = [
          Math.floor(column / bins.factorX) * bins.factorX + across,
          Math.floor(row / bins.factorY) * bins.factorY + down,
        ];
        const index = c < this.columns && r < this.rows ? this.owner[r * this.columns + c] : -1;
        if (index >= 0 && (found === null || this.values[index] > this.values[found])) found = index;
      }
    }
    return found;
  }

  listen() {
    let drag = null;
    const point = (event) => {
      const box = this.canvas.getBoundingClientRect();
      return [event.clientX - box.left, event.clientY - box.top];
    };
    this.canvas.addEventListener("pointerdown", (event) => {
      drag = { from: point(event), centre: this.centre, moved: false };
      this.canvas.setPointerCapture(event.pointerId);
    });
    this.canvas.addEventListener("pointermove", (event) => {
      const [x, y] = point(event);
      if (drag) {
        const [fromX, fromY] = drag.from;
        drag.moved ||= Math.hypot(x - fromX, y - fromY) > 4;
        if (drag.moved && this.panels?.length) {
          const view = this.view();
          this.centre = [
            drag.centre[0] - (x - fromX) / view.scaleX / this.columns,
            drag.centre[1] - (y - fromY) / view.scaleY / this.rows,
          ];
          this.draw();
        }
        return;
      }
      const index = this.at(x, y);
      this.tip.hidden = index === null;
      if (index === null) return;
      if (index !== this.cursor) this.moveTo(index);
      this.tip.textContent = this.info.textContent;
      const left = Math.min(x + 14, this.frame.clientWidth - this.tip.offsetWidth - 4);
      const top = y > 60 ? y - this.tip.offsetHeight - 8 : y + 18;
      this.tip.style.transform = `translate(${left}px, ${top}px)`;
    });
    this.canvas.addEventListener("pointerup", (event) => {
      const moved = drag?.moved;
      drag = null;
      if (!moved && this.at(...point(event)) !== null) this.choose(this.at(...point(event)));
    });
    this.canvas.addEventListener("pointerleave", () => {
      this.tip.hidden = true;
    });
    // Only with the focus or Ctrl, so that the page can be scrolled over the map.
    this.canvas.addEventListener(
      "wheel",
      (event) => {
        if (document.activeElement !== this.canvas && !event.ctrlKey) return;
        event.preventDefault();
        this.zoomBy(event.deltaY < 0 ? 1.25 : 0.8, ...point(event));
      },
      { passive: false },
    );
    this.canvas.addEventListener("keydown", (event) => this.key(event));
  }

  choose(index) {
    this.selection = index;
    this.moveTo(index);
    this.select(this.channel(index));
  }

  key(event) {
    const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const { key } = event;
    if (!this.panels?.length || !this.values || event.ctrlKey || event.altKey || event.metaKey) return;
    if (key in steps) this.step(steps[key], event.shiftKey ? 8 : 1);
    else if (key === "+" || key === "=") this.zoomBy(2);
    else if (key === "-") this.zoomBy(0.5);
    else if (key === "Home") this.showAll();
    else if (key === "Enter" && this.cursor !== null) this.choose(this.cursor);
    else return;
    event.preventDefault();
  }

  // The next channel in this direction, over gaps.
  step([across, down], cells) {
    if (this.cursor === null) {
      const first = this.owner.findIndex((index) => index >= 0);
      if (first >= 0) this.moveTo(this.owner[first]);
      return;
    }
    let [x, y] = [this.cellX[this.cursor], this.cellY[this.cursor]];
    let found = this.cursor;
    for (let left = cells; ;) {
      x += across;
      y += down;
      if (x < 0 || y < 0 || x >= this.columns || y >= this.rows) break;
      const index = this.owner[y * this.columns + x];
      if (index >= 0) {
        found = index;
        left -= 1;
        if (!left) break;
      }
    }
    this.moveTo(found);
    this.keepInView();
  }

  keepInView() {
    const view = this.view();
    const [x, y] = this.screen(this.cursor, view);
    if (x < view.margin || x > view.margin + view.width || y < 0 || y > view.height) {
      this.centre = [(this.cellX[this.cursor] + 0.5) / this.columns, (this.cellY[this.cursor] + 0.5) / this.rows];
    }
  }
}

function extent(cells, part) {
  let [low, high] = [Infinity, -Infinity];
  for (const cell of cells) {
    if (cell[part] < low) low = cell[part];
    if (cell[part] > high) high = cell[part];
  }
  return [low, high];
}
