// Elements of the page. All texts go into text nodes: nothing that comes from outside is ever parsed as HTML.

// Makes an element. Attributes: `class`, `on` {event: handler}, `data` {name: value}; null or false leaves one out.
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "on") for (const [event, handler] of Object.entries(value)) made.addEventListener(event, handler);
    else if (name === "data") Object.assign(made.dataset, value);
    else if (name === "value") made.value = value;
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return made;
}

export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

// Sets an attribute only when it changes, so that screen readers stay quiet; null removes it.
export function setAttribute(node, name, value) {
  if (value === null || value === undefined || value === false) node.removeAttribute(name);
  else if (node.getAttribute(name) !== String(value)) node.setAttribute(name, value);
}

export function button(text, click, attributes = {}) {
  return element("button", { type: "button", on: { click }, ...attributes }, text);
}

let nextField = 0;

// A labelled input. Returns {row, input}.
export function field(label, input, hint = "") {
  input.id ||= `field-${(nextField += 1)}`;
  const row = element("div", { class: "field" }, element("label", { for: input.id }, label), input);
  if (hint) {
    const text = element("small", { id: `${input.id}-hint` }, hint);
    input.setAttribute("aria-describedby", text.id);
    row.append(text);
  }
  return { row, input };
}

export const input = (attributes = {}) =>
  element("input", { type: "text", autocomplete: "off", spellcheck: "false", ...attributes });

export function select(options, attributes = {}) {
  const made = element("select", attributes);
  setOptions(made, options);
  return made;
}

// Replaces the options, [value, text] or a text, only if they differ; the chosen value stays if it still exists.
export function setOptions(made, options) {
  const wanted = options.map((option) => (Array.isArray(option) ? option : [option, option]));
  const present = [...made.options].map((option) => [option.value, option.textContent]);
  if (JSON.stringify(wanted) === JSON.stringify(present)) return;
  const chosen = present.length ? made.value : null;
  made.replaceChildren(...wanted.map(([value, text]) => element("option", { value }, text)));
  if (wanted.some(([value]) => value === chosen)) made.value = chosen;
}

// A titled part of a tab. Returns {panel, body, note}; `note` is a short text beside the title.
let nextPanel = 0;
export function panel(title, attributes = {}, ...children) {
  const heading = element("h2", { id: `panel-${(nextPanel += 1)}` }, title);
  const note = element("span", { class: "note" });
  const tools = element("span", { class: "tools" });
  const body = element("div", { class: "body" }, ...children);
  const made = element(
    "section",
    { ...attributes, class: `panel ${attributes.class ?? ""}`.trim(), "aria-labelledby": heading.id },
    element("header", {}, heading, note, tools),
    body,
  );
  return { panel: made, body, note, tools };
}

// A table that keeps its rows by key, so that focus and selection survive an update, and changes only texts that
// differ. Columns: {title, text(row), number, wide, level(row), hint(row), node(row)}; `node` makes an element once for
// each row. Texts of `wide` columns are broken into lines.
export class Table {
  constructor(label, columns, { empty = "none", className = "" } = {}) {
    this.columns = columns;
    this.rows = new Map();
    this.body = element("tbody");
    this.empty = element("p", { class: "empty" }, empty);
    this.table = element(
      "table",
      { class: className, "aria-label": label },
      element(
        "thead",
        {},
        element(
          "tr",
          {},
          ...columns.map((column) =>
            element("th", { scope: "col", class: column.number ? "number" : null }, column.title),
          ),
        ),
      ),
      this.body,
    );
    this.node = element("div", { class: "table" }, this.table, this.empty);
    this.emptyText = empty;
    this.update(null, () => "");
  }

  // `items`: the rows, or null while they are not known.
  update(items, keyOf) {
    const known = Array.isArray(items);
    const rows = new Map();
    for (const item of known ? items : []) {
      const key = String(keyOf(item));
      if (rows.has(key)) continue;
      const row = this.rows.get(key) ?? this.make(item);
      this.fill(row, item);
      rows.set(key, row);
    }
    for (const [key, row] of this.rows) if (rows.get(key) !== row) row.line.remove();
    let at = this.body.firstChild;
    for (const row of rows.values()) {
      if (row.line === at) at = at.nextSibling;
      else this.body.insertBefore(row.line, at);
    }
    this.rows = rows;
    this.table.hidden = rows.size === 0;
    this.empty.hidden = rows.size > 0;
    setText(this.empty, known ? this.emptyText : "not known yet");
  }

  make(item) {
    const row = { item };
    row.cells = this.columns.map((column) => {
      const cell = element("td", { class: column.number ? "number" : column.wide ? "wide" : null });
      if (column.node) cell.append(column.node(item, row));
      return cell;
    });
    row.line = element("tr", {}, ...row.cells);
    return row;
  }

  fill(row, item) {
    row.item = item;
    this.columns.forEach((column, place) => {
      const cell = row.cells[place];
      if (column.text) setText(cell, column.text(item));
      if (column.level) setAttribute(cell, "data-level", column.level(item) || null);
      if (column.hint) setAttribute(cell, "title", column.hint(item) || null);
      column.renew?.(cell, item);
    });
  }
}

// A list of names and values, made once and filled again and again: fill([["began", "12:00", level?, hint?], ...]).
export class Facts {
  constructor(label) {
    this.node = element("dl", { class: "facts", "aria-label": label });
    this.entries = new Map();
  }

  fill(facts) {
    const names = facts.map(([name]) => name);
    if (JSON.stringify(names) !== JSON.stringify([...this.entries.keys()])) {
      this.entries = new Map(names.map((name) => [name, element("dd")]));
      this.node.replaceChildren(...[...this.entries].flatMap(([name, value]) => [element("dt", {}, name), value]));
    }
    for (const [name, text, level, hint] of facts) {
      setText(this.entries.get(name), text);
      setAttribute(this.entries.get(name), "data-level", level || null);
      setAttribute(this.entries.get(name), "title", hint || null);
    }
  }
}

// How a long request goes: its words, a bar, and at the end what has become of it.
export class Progress {
  constructor(label) {
    this.text = element("p", { class: "progress-line", role: "status" });
    this.bar = element("progress", { hidden: true, "aria-label": label });
    this.node = element("div", {}, this.text, this.bar);
  }

  // Shows a response. A progress without a share leaves the bar as it is.
  report(response) {
    const share = response.total ? ` (${response.done} of ${response.total})` : "";
    if (response.total) [this.bar.max, this.bar.value] = [response.total, response.done];
    this.bar.hidden = response.kind !== "progress" || (this.bar.hidden && !response.total);
    if (response.kind === "ack") this.say("accepted");
    else if (response.kind === "progress") this.say(`${response.text}${share}`);
    else if (response.kind === "error") this.say(response.text, "alarm");
    else this.say("done");
  }

  say(text, level = null) {
    setText(this.text, text);
    setAttribute(this.text, "data-level", level);
  }
}

// Asks for a confirmation, with optional fields [{name, label, input}]. Resolves with {name: value}, or null if the
// person has decided against it. The dialog keeps the focus inside; Escape closes it.
export function ask({ title, lines = [], action, danger = false, fields = [] }) {
  return new Promise((resolve) => {
    const heading = element("h2", { id: `dialog-${(nextPanel += 1)}` }, title);
    const yes = element("button", { type: "submit", class: danger ? "danger" : "primary" }, action);
    const no = button("Cancel", () => dialog.close());
    const form = element(
      "form",
      { method: "dialog" },
      heading,
      ...lines.map((line) => element("p", {}, line)),
      ...fields.map(({ label, input: entry, hint }) => field(label, entry, hint).row),
      element("div", { class: "buttons" }, no, yes),
    );
    const dialog = element("dialog", { "aria-labelledby": heading.id }, form);
    let answer = null;
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      answer = Object.fromEntries(
        fields.map(({ name, input: entry }) => [name, entry.type === "checkbox" ? entry.checked : entry.value]),
      );
      dialog.close();
    });
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(answer);
    });
    document.body.append(dialog);
    dialog.showModal();
    (fields[0]?.input ?? (danger ? no : yes)).focus();
  });
}

// Any result as nested lists and tables.
export function resultNode(value, depth = 0) {
  if (Array.isArray(value) && value.length && value.every(isPlain)) return rowsNode(value);
  if (isPlain(value) && Object.keys(value).length && depth < 4) {
    const entries = Object.entries(value);
    const list = element("dl", { class: "facts" });
    for (const [name, part] of entries.slice(0, 200)) {
      list.append(element("dt", {}, name), element("dd", {}, resultNode(part, depth + 1)));
    }
    if (entries.length <= 200) return list;
    return element("div", {}, list, element("p", { class: "note" }, `and ${entries.length - 200} more`));
  }
  const text = valueText(value);
  return element("span", { class: text.includes("\n") ? "lines" : null }, text);
}

const isPlain = (value) => value !== null && typeof value === "object" && !Array.isArray(value);

function valueText(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value === "string") return value;
  if (Array.isArray(value))
    return value.length > 300
      ? `${value.slice(0, 300).map(valueText).join(", ")}, … (${value.length})`
      : value.map(valueText).join(", ") || "–";
  if (typeof value === "object") return JSON.stringify(value);
  if (typeof value === "number" && !Number.isInteger(value)) return String(Number(value.toPrecision(6)));
  return String(value);
}

function rowsNode(rows) {
  const names = [...new Set(rows.slice(0, 200).flatMap(Object.keys))];
  const columns = names.map((name) => ({
    title: name,
    text: (row) => valueText(row[name]),
    wide: rows.some((row) => valueText(row[name]).length > 30),
    number: rows.every((row) => typeof row[name] === "number"),
  }));
  const table = new Table("result", columns);
  table.update(
    rows.slice(0, 200).map((row, place) => ({ ...row, "\u0000place": place })),
    (row) => row["\u0000place"],
  );
  if (rows.length > 200) table.node.append(element("p", { class: "note" }, `and ${rows.length - 200} more`));
  return table.node;
}
