// The controls' websocket: state and ticks in, drive and ask out. Reconnects by itself; what was held is let go of then.

const PATIENCE_MS = 8000;

export class Link {
  constructor() {
    this.handlers = { state: [], open: [], close: [], hello: [] };
    this.asks = new Map();
    this.tick = 0;
    this.tickAt = 0;
    this.seq = 0;
    this.connection = 0;
    this.wait = 250;
  }

  on(name, handler) { this.handlers[name].push(handler); }
  say(name, value) { for (const handler of this.handlers[name]) handler(value); }
  get open() { return this.socket?.readyState === WebSocket.OPEN; }
  get fresh() { return this.open && performance.now() - this.tickAt < 400; }

  connect() {
    const socket = this.socket = new WebSocket(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/ws`);
    socket.onmessage = (event) => this.hear(JSON.parse(event.data));
    socket.onopen = () => { this.seq = 0; this.wait = 250; this.say("open"); };
    socket.onclose = () => {
      for (const ask of this.asks.values()) ask({ ok: false, text: "the connection was lost" });
      this.asks.clear();
      this.connection = 0;
      this.say("close");
      setTimeout(() => this.connect(), this.wait);
      this.wait = Math.min(4000, this.wait * 2);
    };
  }

  hear(message) {
    if (message.type === "tick") { this.tick = message.t; this.tickAt = performance.now(); }
    else if (message.type === "state") this.say("state", message);
    else if (message.type === "hello") { this.connection = message.connection; this.say("hello", message.connection); }
    else if (message.type === "answer") { this.asks.get(message.id)?.(message); this.asks.delete(message.id); }
    else if (message.type === "refused") console.warn("refused:", message.text);
  }

  drive(axes, held, gripper) {
    // What waits in the socket would arrive late and all at once: it is not sent at all.
    if (!this.open || !this.tick || this.socket.bufferedAmount > 2000) return;
    this.socket.send(JSON.stringify({ type: "drive", seq: ++this.seq, echo: this.tick, held, axes, gripper }));
  }

  feel(value) {
    if (this.open && this.socket.bufferedAmount < 2000) this.socket.send(JSON.stringify({ type: "feel", value }));
  }

  ask(name, values = {}) {
    if (!this.open) return Promise.resolve({ ok: false, text: "not connected" });
    const random = crypto.getRandomValues(new Uint8Array(12));
    const id = Array.from(random, (b) => b.toString(16).padStart(2, "0")).join("");
    return new Promise((resolve) => {
      this.asks.set(id, resolve);
      setTimeout(() => { if (this.asks.delete(id)) resolve({ ok: false, text: "no answer yet" }); }, PATIENCE_MS);
      this.socket.send(JSON.stringify({ type: "ask", id, name, values }));
    });
  }
}
