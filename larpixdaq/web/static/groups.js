// Components in groups by module or host, in the order of the web server: the worst first. A group without a problem is
// one line; one with a problem shows the components that have it. The box has a fixed height, so that nothing around it
// moves, and the order stays while somebody points at it.

import { button, element, setAttribute, setText } from "./elements.js";

const HELD = 5000; // ms for which the order stays after the pointer was moved over the groups

export class Groups {
  // `makeTable` makes a Table of components with a label.
  constructor(makeTable) {
    this.makeTable = makeTable;
    this.rows = new Map(); // by name of the group
    this.unfolded = false; // all groups
    this.moved = -Infinity;
    this.node = element("div", { class: "groups", role: "group", "aria-label": "Groups of components", tabindex: "0" });
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

  // `groups`: as in the section of the state. `components`: all components, by name.
  update(groups, components) {
    this.components = components;
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
        row.choice = null; // what somebody folded or unfolded in another state of the group
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
      row.choice = this.shows(row) !== "none" ? "none" : row.level ? null : "all";
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
    return row.choice ?? (this.unfolded ? "all" : row.level ? "bad" : "none");
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
      row.table = this.makeTable(`Components of ${group.name}`);
      row.members.append(row.table.node, row.rest);
    }
    const shown = group.members.filter((member) => shows === "all" || member.level);
    row.table.update(
      shown
        .filter((member) => this.components.has(member.name))
        .map((member) => ({ ...this.components.get(member.name), problems: member.problems })),
      (component) => `${component.name} ${component.alive}`,
    );
    const rest = group.members.length - shown.length;
    row.rest.hidden = !rest;
    setText(row.rest, `Show ${rest} more`);
  }
}
