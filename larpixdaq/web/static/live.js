// The connection to the web server: one WebSocket with a snapshot of the state and then changes, requests and their
// responses, and arrays in binary frames. It reconnects by itself; after a gap the new snapshot replaces everything.

// Seconds without a message after which the page says so, and after which the connection is made anew.
export const SILENT = 3;
const HANGING = 10;
const RETRY = [0.2, 0.5, 1, 2];
const KEPT_HISTORY = 3600;
const KEPT_LOG = 200;

// Header and values of a binary frame: the length of the header (u32, little-endian), the header in JSON, the values.
export function splitFrame(data) {
  const length = new DataView(data).getUint32(0, true);
  return {
    header: JSON.parse(new TextDecoder().decode(new Uint8Array(data, 4, length))),
    values: new Uint8Array(data, 4 + length),
  };
}

export async function inflate(header, values) {
  if (header.coding !== "deflate-raw") return values.slice();
  const stream = new Blob([values]).stream().pipeThrough(new DecompressionStream("deflate-raw"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

export class Live {
  constructor(address) {
    this.address = address;
    this.state = {};
    this.viewer = { name: "", role: "" };
    this.received = {}; // when each section last came, by performance.now()
    this.connected = false;
    this.heard = -Infinity;
    this.lostAt = performance.now();
    this.listeners = { change: [], pixels: [], connection: [] };
    this.pending = new Map();
    this.sequence = 0;
    this.attempt = 0;
    this.nextId = 0;
    this.watched = {};
    this.socket = null;
    this.clock = 0; // seconds of the web server's clock before that of the browser
  }

  // Unix seconds by the clock of the web server's host.
  now() {
    return Date.now() / 1000 + this.clock;
  }

  on(event, listener) {
    this.listeners[event].push(listener);
  }

  emit(event, ...values) {
    for (const listener of this.listeners[event]) listener(...values);
  }

  // Seconds since a section came; Infinity if it never has. `silence`: since anything came.
  age(section) {
    return section in this.received ? (performance.now() - this.received[section]) / 1000 : Infinity;
  }

  get silence() {
    return (performance.now() - this.heard) / 1000;
  }

  // Whether what the page shows is the present state, as far as the web server knows it.
  get fresh() {
    return this.connected && this.silence < SILENT;
  }

  start() {
    this.connect();
    setInterval(() => {
      if (this.connected && this.silence > HANGING) this.drop();
    }, 1000);
  }

  connect() {
    const socket = new WebSocket(this.address);
    socket.binaryType = "arraybuffer";
    this.socket = socket;
    socket.onmessage = (event) => {
      if (socket === this.socket) this.take(event.data);
    };
    socket.onclose = (event) => {
      if (socket === this.socket) this.lost(event);
    };
  }

  drop() {
    const socket = this.socket;
    socket.close();
    this.lost({ code: 0 });
  }

  lost(event) {
    this.socket = null;
    if (this.connected) this.lostAt = performance.now();
    this.connected = false;
    for (const request of [...this.pending.values()]) {
      request.fail(
        "ConnectionLost",
        "the connection to the web server was lost: what has become of the request is not known, look at the state",
      );
    }
    this.emit("connection", event);
    const delay = RETRY[Math.min(this.attempt, RETRY.length - 1)];
    this.attempt += 1;
    setTimeout(() => this.connect(), delay * 1000);
  }

  take(data) {
    this.heard = performance.now();
    if (typeof data !== "string") {
      this.takeArray(data);
      return;
    }
    const message = JSON.parse(data);
    if (message.time) this.clock = message.time - Date.now() / 1000;
    if (message.type === "snapshot") this.takeSnapshot(message);
    else if (message.type === "delta") this.takeDelta(message);
    else if (message.type === "response") this.pending.get(message.id)?.respond(message);
  }

  takeSnapshot(message) {
    this.sequence = message.sequence;
    this.viewer = message.viewer ?? this.viewer;
    this.state = message.state;
    this.received = {};
    for (const section of Object.keys(this.state)) this.received[section] = this.heard;
    this.connected = true;
    this.attempt = 0;
    this.send({ type: "watch", ...this.watched });
    this.emit("connection", null);
    this.emit("change", new Set(Object.keys(this.state)));
  }

  takeDelta(message) {
    if (message.sequence !== this.sequence + 1) {
      this.drop();
      return;
    }
    this.sequence = message.sequence;
    const changed = new Set();
    for (const [section, value] of Object.entries(message.set ?? {})) {
      this.state[section] = value;
      this.received[section] = this.heard;
      changed.add(section);
    }
    for (const [section, items] of Object.entries(message.append ?? {})) {
      if (section === "history") this.appendHistory(items);
      else this.state[section] = [...(this.state[section] ?? []), ...items].slice(-KEPT_LOG);
      this.received[section] = this.heard;
      changed.add(section);
    }
    if (changed.size) this.emit("change", changed);
  }

  // Adds points to the history. An io_group that is new, or has no point, gets null there, so that all columns have one
  // length.
  appendHistory(items) {
    const history = (this.state.history ??= { times: [], total: [], io_groups: {} });
    for (const item of items) {
      const length = history.times.push(item.time);
      history.total.push(item.total);
      for (const name of Object.keys(item.rates ?? {})) history.io_groups[name] ??= new Array(length - 1).fill(null);
      for (const [name, column] of Object.entries(history.io_groups)) column.push(item.rates?.[name] ?? null);
    }
    const extra = history.times.length - KEPT_HISTORY;
    if (extra > 60) {
      for (const column of [history.times, history.total, ...Object.values(history.io_groups)]) column.splice(0, extra);
    }
  }

  async takeArray(data) {
    const { header, values } = splitFrame(data);
    const content = await inflate(header, values);
    if (content.length === header.shape.reduce((product, side) => product * side, 1))
      this.emit("pixels", header, content);
  }

  send(message) {
    if (this.socket?.readyState !== WebSocket.OPEN) return false;
    this.socket.send(JSON.stringify(message));
    return true;
  }

  // Says what the page shows now: only that is fetched and sent.
  watch(wanted) {
    if (JSON.stringify(wanted) === JSON.stringify(this.watched)) return;
    this.watched = wanted;
    if (this.connected) this.send({ type: "watch", ...wanted });
  }

  // Requests an action of the core (no component, no kind), of a component by name, or of the first of a kind. Resolves
  // with the value of the result; rejects with an Error whose name is the class of the error. `report` gets every
  // response.
  request(action, params = {}, { component = "", kind = "", report = () => {} } = {}) {
    const id = `page-${(this.nextId += 1)}`;
    return new Promise((resolve, reject) => {
      const fail = (name, text) => {
        this.pending.delete(id);
        const error = new Error(text);
        error.name = name;
        reject(error);
      };
      const respond = (response) => {
        report(response);
        if (response.kind === "result") {
          this.pending.delete(id);
          resolve(response.value);
        } else if (response.kind === "error") fail(response.error || "Error", response.text);
      };
      this.pending.set(id, { respond, fail });
      if (!this.send({ type: "request", id, action, params, component, kind })) {
        fail("ConnectionLost", "there is no connection to the web server: the request was not sent");
      }
    });
  }
}

// The answer of the web server to a GET, as JSON. Rejects with its one line.
export async function get(path) {
  const response = await fetch(path, { credentials: "same-origin" });
  if (response.status === 401) {
    location.assign("/login");
  }
  const answer = await response.json().catch(() => ({ error: `${path}: the web server answered ${response.status}` }));
  if (!response.ok) throw new Error(answer.error ?? `${path}: the web server answered ${response.status}`);
  return answer;
}
