// Charts with BokehJS, as Bokeh's wheel brings it. It is loaded when the first chart is shown.
//
// Each chart belongs to a <div> with a label for screen readers, is drawn only while it is visible, and takes the
// colours of the page: a change of the theme makes it anew.

import { element } from "./elements.js";

// Ten colours that differ in lightness too, so that they can be told apart in both themes and without colour vision.
export const COLOURS = [
  "#3b8eea",
  "#e8a33d",
  "#2fb47c",
  "#d9609a",
  "#8c7ae6",
  "#7fbf3f",
  "#d9534f",
  "#3fc1c9",
  "#b08968",
  "#97a6b5",
];

let loading = null;

function script(path) {
  return new Promise((resolve, reject) => {
    const made = element("script", { src: path });
    made.addEventListener("load", resolve);
    made.addEventListener("error", () => reject(new Error(`${path} could not be loaded: plots cannot be shown`)));
    document.head.append(made);
  });
}

export function bokeh() {
  loading ??= script("/bokeh/bokeh.min.js")
    .then(() => script("/bokeh/bokeh-api.min.js"))
    .then(() => {
      window.Bokeh.logger.set_level("error"); // otherwise each figure writes lines into the console
      return window.Bokeh;
    });
  return loading;
}

// How times are written below an axis.
const TIMES = {
  milliseconds: "%H:%M:%S.%3N",
  seconds: "%H:%M:%S",
  minsec: "%H:%M:%S",
  minutes: "%H:%M",
  hourmin: "%H:%M",
  hours: "%H:%M",
  days: "%m-%d",
};

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// All charts of the page, for a change of the theme. A chart that was removed from the page leaves by itself.
const charts = new Set();

// Draws what was set while its tab was hidden.
export function drawCharts() {
  for (const chart of [...charts]) chart.draw();
}

// Makes all charts anew, in the colours of the page.
export function redrawCharts() {
  for (const chart of [...charts]) chart.renew();
}

class Chart {
  constructor(label, options) {
    this.options = { height: 240, x: "", y: "", time: false, log: false, logX: false, bottom: 0, ...options };
    this.box = element("div", { class: "chart", role: "img", "aria-label": label });
    this.note = element("p", { class: "empty" }, "nothing to show yet");
    this.node = element("div", { class: "chart-box" }, this.box, this.note);
    this.box.style.height = `${this.options.height}px`;
    this.data = null;
    this.figure = null;
    this.view = null;
    this.waiting = false;
    for (const chart of charts) if (chart.view && !document.contains(chart.box)) chart.release();
    charts.add(this);
  }

  // Sets a text in place of the chart; "" shows the chart.
  say(text) {
    this.note.textContent = text;
    this.note.hidden = !text;
    this.box.classList.toggle("old", Boolean(text));
  }

  set(data) {
    this.data = data;
    if (!this.waiting) {
      this.waiting = true;
      requestAnimationFrame(() => {
        this.waiting = false;
        this.draw();
      });
    }
  }

  async draw() {
    if (!this.box.isConnected || this.box.offsetParent === null || this.data === null || this.making) return;
    if (this.figure === null || this.shape(this.data) !== this.drawn) {
      this.making = true;
      try {
        await this.make(this.shape(this.data));
      } catch (error) {
        this.say(error.message);
        return;
      } finally {
        this.making = false;
      }
    }
    this.fill(this.data);
  }

  // What makes another figure necessary when it changes.
  shape() {
    return "";
  }

  renew() {
    if (!this.view) return;
    this.release();
    charts.add(this);
    this.draw();
  }

  // Gives the memory of the figure back.
  release() {
    const { documents } = window.Bokeh;
    const place = documents.indexOf(this.figure.document);
    if (place >= 0) documents.splice(place, 1);
    this.view.remove();
    this.figure = this.view = null;
    charts.delete(this);
  }

  async make(shape) {
    const Bokeh = await bokeh();
    const { height, x, y, time, log, logX } = this.options;
    const figure = Bokeh.Plotting.figure({
      height,
      sizing_mode: "stretch_width",
      tools: "pan,box_zoom,wheel_zoom,reset,save",
      active_scroll: null,
      active_drag: "box_zoom",
      toolbar_location: "above",
      x_axis_type: time ? "datetime" : logX ? "log" : "linear",
      y_axis_type: log ? "log" : "linear",
      x_axis_label: x,
      y_axis_label: y,
      background_fill_color: null,
      border_fill_color: null,
      outline_line_color: css("--line"),
      min_border: 4,
      y_range: new Bokeh.DataRange1d(this.options.bottom === null ? {} : { start: this.options.bottom }),
    });
    figure.toolbar.autohide = true;
    figure.toolbar.logo = null;
    for (const axis of figure.axes) {
      axis.setv({
        axis_line_color: css("--line"),
        major_tick_line_color: css("--line"),
        minor_tick_line_color: null,
        major_label_text_color: css("--text"),
        axis_label_text_color: css("--muted"),
        axis_label_text_font_style: "normal",
        axis_label_text_font_size: "13px",
        major_label_text_font_size: "13px",
      });
    }
    for (const grid of figure.grids) grid.setv({ grid_line_color: css("--line"), grid_line_alpha: 0.5 });
    const plain = [...(time || logX ? [] : figure.xaxes), ...(log ? [] : figure.yaxes)];
    for (const axis of plain) axis.formatter = new Bokeh.NumeralTickFormatter({ format: "0,0.[00000]" });
    if (time) for (const axis of figure.xaxes) axis.formatter = new Bokeh.DatetimeTickFormatter(TIMES);
    this.build(Bokeh, figure);
    if (this.view) {
      this.release();
      charts.add(this);
    }
    this.box.replaceChildren();
    this.view = await Bokeh.Plotting.show(figure, this.box);
    this.figure = figure;
    this.drawn = shape;
  }
}

// Lines over time or any x: set({x: [...], lines: [{name, values, colour, dash, x}]}); a line may have an x of its own.
// In linear scale the y axis begins at 0.
export class Lines extends Chart {
  constructor(label, options) {
    super(label, { bottom: options.log ? null : 0, ...options });
  }

  shape({ lines }) {
    return JSON.stringify(lines.map((line) => [line.name, line.colour, line.dash]));
  }

  build(Bokeh, figure) {
    this.sources = this.data.lines.map((line, place) => {
      const source = new Bokeh.ColumnDataSource({ data: { x: [], y: [] } });
      figure.line(
        { field: "x" },
        { field: "y" },
        {
          source,
          line_color: line.colour ?? COLOURS[place % COLOURS.length],
          line_width: line.width ?? 2,
          line_dash: line.dash ?? "solid",
        },
      );
      return source;
    });
  }

  fill({ x, lines }) {
    const scale = this.options.time ? 1000 : 1;
    const usable = (value) => (value === null || (this.options.log && value <= 0) ? NaN : value);
    const common = Float64Array.from(x ?? [], (value) => value * scale);
    lines.forEach((line, place) => {
      const own = line.x ? Float64Array.from(line.x, (value) => value * scale) : common;
      this.sources[place].data = { x: own, y: Float64Array.from(line.values, usable) };
    });
  }
}

// Histograms with common or own edges: set({series: [{name, edges, counts, colour}]}). The first one is filled.
export class Histogram extends Chart {
  constructor(label, options) {
    super(label, { bottom: options.log ? 0.5 : 0, ...options });
  }

  shape({ series }) {
    return JSON.stringify(series.map((one) => [one.name, one.colour]));
  }

  build(Bokeh, figure) {
    this.sources = this.data.series.map((one, place) => {
      const source = new Bokeh.ColumnDataSource({ data: { left: [], right: [], top: [] } });
      const colour = one.colour ?? COLOURS[place];
      figure.quad(
        { field: "left" },
        { field: "right" },
        this.options.bottom,
        { field: "top" },
        { source, fill_color: colour, fill_alpha: place ? 0 : 0.55, line_color: colour, line_width: place ? 2 : 1 },
      );
      return source;
    });
  }

  fill({ series }) {
    series.forEach(({ edges, counts }, place) => {
      const bins = counts.map((_, bin) => bin).filter((bin) => counts[bin] > 0);
      this.sources[place].data = {
        left: Float64Array.from(bins, (bin) => edges[bin]),
        right: Float64Array.from(bins, (bin) => edges[bin + 1]),
        top: Float64Array.from(bins, (bin) => counts[bin]),
      };
    });
  }
}

// A legend whose entries switch lines on and off: a row of buttons that a keyboard reaches.
export class Legend {
  constructor(label, changed) {
    this.node = element("div", { class: "legend", role: "group", "aria-label": label });
    this.hidden = new Set();
    this.changed = changed;
    this.names = "";
  }

  update(entries) {
    const names = JSON.stringify(entries);
    if (names === this.names) return;
    this.names = names;
    this.node.replaceChildren(
      ...entries.map(({ name, colour, dash }) => {
        const swatch = element("span", { class: "swatch", data: { dash: dash ? "1" : "" } });
        swatch.style.setProperty("--swatch", colour);
        const entry = element(
          "button",
          { type: "button", "aria-pressed": String(!this.hidden.has(name)) },
          swatch,
          name,
        );
        entry.addEventListener("click", () => {
          if (!this.hidden.delete(name)) this.hidden.add(name);
          entry.setAttribute("aria-pressed", String(!this.hidden.has(name)));
          this.changed();
        });
        return entry;
      }),
    );
  }
}

// The colours of maps, from few to many, darker to lighter all the way: [r, g, b] of 256 steps.
const STOPS = [
  [0, [36, 31, 84]],
  [0.25, [38, 92, 138]],
  [0.5, [28, 148, 132]],
  [0.75, [118, 200, 86]],
  [1, [252, 231, 70]],
];

export function heatColours() {
  return Array.from({ length: 256 }, (_, step) => {
    const at = step / 255;
    const next = Math.max(
      1,
      STOPS.findIndex(([place]) => place >= at),
    );
    const [[from, low], [to, high]] = [STOPS[next - 1], STOPS[next]];
    return low.map((value, part) => Math.round(value + ((high[part] - value) * (at - from)) / (to - from)));
  });
}
