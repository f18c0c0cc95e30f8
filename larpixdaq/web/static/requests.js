// The requests of this page: each with its progress and its end, in a strip at the bottom of the page.

import { button, element, setAttribute, setText } from "./elements.js";
import { clock, cut } from "./format.js";

const KEPT = 30;
const WORDS = { sent: "sent", ack: "accepted", progress: "in progress", result: "done", error: "FAILED" };

export class Requests {
  constructor(live, footer) {
    this.live = live;
    this.automatic = new Map(); // by component: the last request that the page has made by itself
    this.list = element("ol", { hidden: true, id: "request-list" });
    this.latest = element("span", { class: "latest", role: "status" }, "no request yet");
    this.toggle = button("Requests", () => this.open(this.list.hidden), {
      "aria-expanded": "false",
      "aria-controls": "request-list",
    });
    footer.append(element("div", { class: "strip" }, this.toggle, this.latest), this.list);
  }

  open(shown) {
    this.list.hidden = !shown;
    setAttribute(this.toggle, "aria-expanded", String(shown));
  }

  // Requests an action and shows how it goes. `title`: what a person calls it. Resolves with the value; a failure is
  // shown and then rejects. `quiet`: the page asks by itself, so that only a failure is shown. A producer works on one
  // request at a time: a person's request waits for those of the page, and is never refused because of them.
  async run(title, action, params = {}, options = {}) {
    const { component = "", quiet = false } = options;
    const before = this.automatic.get(component);
    const running = Promise.resolve(before).then(() => this.perform(title, action, params, options));
    if (quiet) {
      const done = running.catch(() => null);
      this.automatic.set(component, done);
      done.then(() => this.automatic.get(component) === done && this.automatic.delete(component));
    }
    return running;
  }

  async perform(title, action, params, { component = "", kind = "", report = () => {}, quiet = false }) {
    const entry = quiet ? null : this.add(title);
    try {
      const value = await this.live.request(action, params, {
        component,
        kind,
        report: (response) => {
          entry?.show(response.kind, response.kind === "progress" ? response.text : "", response.done, response.total);
          report(response);
        },
      });
      entry?.show("result", "");
      return value;
    } catch (error) {
      (entry ?? this.add(title)).show("error", error.message);
      throw error;
    }
  }

  // As run(), for the handlers of buttons: a failure is shown, and the promise resolves with null.
  try(...given) {
    return this.run(...given).catch(() => null);
  }

  add(title) {
    const word = element("b");
    const text = element("span", { class: "text" });
    const bar = element("progress", { hidden: true, "aria-label": `progress of ${title}` });
    const line = element(
      "li",
      {},
      element("time", {}, clock(this.live.now())),
      element("span", {}, title),
      word,
      bar,
      text,
    );
    this.list.prepend(line);
    while (this.list.children.length > KEPT) this.list.lastChild.remove();
    const show = (kind, said, done = 0, total = 0) => {
      setText(word, WORDS[kind] ?? kind);
      setAttribute(line, "data-kind", kind);
      if (said || kind !== "ack") setText(text, said ?? "");
      const going = kind === "progress" && total > 0;
      bar.hidden = !going;
      if (going) {
        bar.max = total;
        bar.value = done;
      }
      if (line === this.list.firstChild || kind === "error") {
        const share = going ? ` ${done} of ${total}` : "";
        const first = (said ?? "").split("\n")[0];
        setText(this.latest, `${title}: ${WORDS[kind] ?? kind}${share}${first ? `: ${cut(first, 300)}` : ""}`);
        setAttribute(this.latest, "data-kind", kind);
        setAttribute(this.latest, "title", said || null);
      }
    };
    show("sent", "");
    return { show };
  }
}
