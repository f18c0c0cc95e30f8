// Rows of a table in groups by module or host, the worst group first. A folded group is one line; one with a problem
// shows the rows that have it. The box has a fixed height, so that nothing around it moves, and the order stays while
// somebody points at it.

import { button, element, setAttribute, setText } from "./elements.js";
import { rank, worst } from "./health.js";

const HELD = 5000; // ms for which the order stays after the pointer was moved over the groups
const MANY = 12; // maximum rows of a table without groups, as in component_groups.py

// Puts items into groups by name, in the order in which the web server has the groups of components: the worst first,
// then the one with more problems, then by name. `about(items)` returns two texts, `state` and `figures`.
export function makeGroups(items, { nameOf, levelOf, about }) {
  const byName = new Map();
  for (const item of items) {
    const name = nameOf(item);
    if (!byName.has(name)) byName.set(name, []);
    byName.get(name).push({ item, level: levelOf(item) });
  }
  const groups = [...byName].map(([name, members]) => {
    members.sort((one, other) => rank(other.level) - rank(one.level));
    const level = worst(members.map((member) => member.level));
    return { name, level, members, ...about(members.map((member) => member.item)) };
  });
  const bad = (group) => group.members.filter((member) => member.level).length;
  return groups.sort(
    (one, other) =>
      rank(other.level) - rank(one.level) ||
      bad(other) - bad(one) ||
      one.name.localeCompare(other.name, "en", { numeric: true }),
  );
}

// The name of the group of each component; null when a table with so many rows needs no groups. `groups`: those of the
// components, as in the section of the state.
export function groupNames(groups, rows) {
  if (!groups || rows <= MANY) return null;
  return new Map(groups.flatMap((group) => group.members.map((member) => [member.name, group.name])));
}

export class Groups {
  // `makeTable` makes a Table with a label, `keyOf(item)` the key of a row. `folded`: groups with a problem are folded,
  // too, until somebody unfolds them.
  constructor(label, makeTable, keyOf, { folded = false } = {}) {
    this.label = label;
    this.makeTable = makeTable;
    this.keyOf = keyOf;
    this.folded = folded;
    this.rows = new Map(); // by name of the group
    this.unfolded = false; // all groups
    this.moved = -Infinity;
    this.node = element("div", {
      class: "groups",
      role: "group",
      "aria-label": `${label} in groups`,
      tabindex: "0",
    });
    this.node.addEventListener("pointermove", () => {
      this.moved = performance.now();
    });
    this.toggleAll = button("Unfold all", () => {
      this.unfolded = !this.unfolded;
      for (const row of this.rows.values()) {
        row.choice = null;
        this.fill(row);
      }
      setText(this.toggleAll, this.unfolded ? "Fold" : "Unfold all");
    });
  }

  // `groups`: [{name, level, state, figures, members: [{item, level}]}], or null while the rows need no groups.
  update(groups) {
    this.node.hidden = this.toggleAll.hidden = !groups;
    if (!groups) return;
    const held = this.rows.size > 0 && performance.now() - this.moved < HELD;
    const places = new Map([...this.rows.keys()].map((name, place) => [name, place]));
    const place = (group) => places.get(group.name) ?? places.size;
    const ordered = held ? [...groups].sort((one, other) => place(one) - place(other)) : groups;
    const rows = new Map();
    for (const group of ordered) {
      const row = this.rows.get(group.name) ?? this.make(group);
      row.group = group;
      if (!held && row.level !== group.level) {
        row.level = group.level;
        if (!this.folded) row.choice = null; // what somebody folded or unfolded in another state of the group
      }
      this.fill(row);
      rows.set(group.name, row);
    }
    for (const [name, row] of this.rows) if (!rows.has(name)) row.node.remove();
    this.rows = rows;
    const focused = document.activeElement;
    let at = this.node.firstChild;
    for (const row of rows.values()) {
      if (row.node === at) at = at.nextSibling;
      else this.node.insertBefore(row.node, at);
    }
    // A moved node loses the focus.
    if (focused !== document.activeElement && this.node.contains(focused)) focused.focus({ preventScroll: true });
  }

  make(group) {
    const row = { group, level: group.level, choice: null, table: null };
    row.toggle = button(group.name, () => {
      const usual = this.folded || !row.level ? "all" : null;
      row.choice = this.shows(row) !== "none" ? "none" : usual;
      this.fill(row);
    });
    row.word = element("b");
    row.state = element("span");
    row.figures = element("span", { class: "note" });
    row.rest = button("", () => {
      row.choice = "all";
      this.fill(row);
    });
    row.members = element("div", { class: "members", hidden: true });
    row.node = element(
      "section",
      { class: "group", "aria-label": group.name },
      element("header", {}, element("h3", {}, row.toggle), row.word, row.state, row.figures),
      row.members,
    );
    return row;
  }

  // Which members are shown: "none", "bad" or "all".
  shows(row) {
    return row.choice ?? (this.unfolded ? "all" : row.level && !this.folded ? "bad" : "none");
  }

  fill(row) {
    const { group } = row;
    const shows = this.shows(row);
    setText(row.word, group.level.toUpperCase());
    setAttribute(row.word, "data-level", group.level || null);
    for (const part of ["state", "figures"]) {
      setText(row[part], group[part]);
      setAttribute(row[part], "title", group[part]);
    }
    setAttribute(row.toggle, "aria-expanded", String(shows !== "none"));
    row.members.hidden = shows === "none";
    if (shows === "none") return;
    if (!row.table) {
      row.table = this.makeTable(`${this.label} of ${group.name}`);
      row.members.append(row.table.node, row.rest);
    }
    const shown = group.members.filter((member) => shows === "all" || member.level);
    row.table.update(
      shown.map((member) => member.item),
      this.keyOf,
    );
    const rest = group.members.length - shown.length;
    row.rest.hidden = !rest;
    setText(row.rest, `Show ${rest} more`);
  }
}
