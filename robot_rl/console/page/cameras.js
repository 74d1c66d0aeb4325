// Pictures: decoded off the main thread, handed to the canvas as they are, and acknowledged with the animation frame that shows them, so that
// the server never sends more than is shown.

const HEAD = 32;
const OLD_MS = 1500;

export class Cameras {
  constructor(place, stats) {
    this.place = place;
    this.stats = stats;
    this.parts = window.frameParts = {};
    this.shown = new Map();
    setInterval(() => this.look(), 500);
    document.addEventListener("visibilitychange", () => (document.hidden ? this.socket?.close() : this.connect()));
  }

  connect() {
    if (document.hidden || (this.socket && this.socket.readyState < 2)) return;
    const socket = this.socket = new WebSocket(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/ws/frames?page=${this.page ?? 0}`);
    socket.binaryType = "arraybuffer";
    socket.onmessage = (event) => this.frame(socket, event.data);
    socket.onclose = () => setTimeout(() => this.connect(), 700);
  }

  // The person at the controls is sent more pictures than those who watch: the server has to know whose page this is.
  of(page) {
    this.page = page;
    this.socket?.close();
    this.connect();
  }

  view(name) {
    let found = this.shown.get(name);
    if (!found) {
      const figure = document.createElement("figure");
      figure.className = "camera";
      figure.dataset.camera = name;
      const canvas = document.createElement("canvas");
      const caption = document.createElement("figcaption");
      const rate = document.createElement("span");
      caption.append(name.replace(/_/g, " "), rate);
      figure.append(canvas, caption);
      const after = [...this.place.children].find((c) => c.dataset.camera > name);
      this.place.insertBefore(figure, after ?? null);
      found = { figure, canvas, context: canvas.getContext("bitmaprenderer", { alpha: false }), rate, at: 0, times: [], late: [], number: 0 };
      this.shown.set(name, found);
    }
    return found;
  }

  async frame(socket, data) {
    const began = performance.now();
    const head = new DataView(data, 0, HEAD);
    const length = head.getUint16(4, true);
    const number = Number(head.getBigUint64(8, true));
    const stamp = Number(head.getBigUint64(16, true)) / 1e6, encoded = Number(head.getBigUint64(24, true)) / 1e6;
    const name = new TextDecoder().decode(new Uint8Array(data, HEAD, length));
    const view = this.view(name);
    try {
      const picture = await createImageBitmap(new Blob([new Uint8Array(data, HEAD + length)], { type: "image/jpeg" }));
      if (number > view.number) {
        view.number = number;
        if (view.canvas.width !== picture.width || view.canvas.height !== picture.height) {
          view.canvas.width = picture.width;
          view.canvas.height = picture.height;
          view.figure.style.aspectRatio = `${picture.width} / ${picture.height}`;
        }
        view.context.transferFromImageBitmap(picture);
        requestAnimationFrame(() => { this.count(name, view, stamp, encoded, began); this.seen(socket, name, number, began); });
        return;
      }
      picture.close();
    } catch { /* a damaged picture is skipped; the next one comes */ }
    this.seen(socket, name, number, began);
  }

  seen(socket, camera, number, began) {
    const took = Math.min(1e6, performance.now() - began);
    if (socket.readyState === 1) socket.send(JSON.stringify({ type: "seen", camera, number, took }));
  }

  // Ages, and what they are made of: encoding, the way here, showing (milliseconds).
  count(name, view, stamp, encoded, began) {
    const now = performance.timeOrigin + performance.now();
    view.at = performance.now();
    view.times.push(view.at);
    if (view.times.length > 40) view.times.shift();
    view.late.push(now - stamp);
    if (view.late.length > 40) view.late.shift();
    (this.stats[name] ??= []).push(now - stamp);
    const parts = (this.parts[name] ??= []), arrived = performance.timeOrigin + began;
    parts.push([encoded - stamp, arrived - encoded, now - arrived]);
    for (const kept of [this.stats[name], parts]) if (kept.length > 2000) kept.shift();
  }

  look() {
    const here = ["localhost", "127.0.0.1", "[::1]"].includes(location.hostname);
    for (const view of this.shown.values()) {
      const old = performance.now() - view.at > OLD_MS;
      view.figure.classList.toggle("old", old);
      const span = view.times.length > 1 ? (view.times.at(-1) - view.times[0]) / (view.times.length - 1) : 0;
      const middle = [...view.late].sort((a, b) => a - b)[view.late.length >> 1];
      // Two machines' clocks differ: only where they are one is the age of a picture known.
      view.rate.textContent = old || !span ? "" : `${Math.round(1000 / span)} Hz${here ? ` · ${Math.round(middle)} ms` : ""}`;
    }
  }
}
