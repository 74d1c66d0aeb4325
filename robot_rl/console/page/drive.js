// Pads, keys and gamepads to one sample, fifty times a second while something is held. Nothing is ever sent twice.
//
// Letting go is a hand-back: the policy goes on. Whatever takes the page away from the person (another window, a hidden tab, an
// unplugged gamepad) is a loss instead: the page falls silent, the robot holds, and a person says when the policy may go on.

const AXES = ["x", "y", "z", "roll", "pitch", "yaw"];
const KEYS = { w: ["x", 1], s: ["x", -1], a: ["y", 1], d: ["y", -1], r: ["z", 1], f: ["z", -1], q: ["yaw", 1], e: ["yaw", -1] };
const DEADBAND = 0.12;
const FAST_MS = 20, SLOW_MS = 200;
const SILENT_MS = 500; // longer than any device may be silent before it counts as lost

export class Drive {
  constructor(link, changed) {
    this.link = link;
    this.changed = changed;
    this.mine = false; // this page has the seat
    this.latched = false; // took over with the button
    this.pads = new Map(); // pointer to axes
    this.keys = new Set();
    this.button = false;
    this.gripper = false;
    this.pad = null;
    this.sent = 0;
    this.was = false;
    setInterval(() => this.step(), FAST_MS);
    this.silentUntil = 0;
    this.endedAt = 0;
    for (const name of ["blur", "pagehide", "gamepaddisconnected"]) addEventListener(name, () => this.lose());
    document.addEventListener("visibilitychange", () => document.hidden && this.lose());
    link.on("close", () => this.lose());
  }

  lose() {
    if (this.was) this.silentUntil = performance.now() + SILENT_MS;
    this.letGo();
  }

  letGo() {
    this.pads.clear();
    this.keys.clear();
    this.latched = this.button = this.gripper = false;
    for (const pad of document.querySelectorAll(".held")) pad.classList.remove("held");
    for (const knob of document.querySelectorAll(".pad i")) knob.style.transform = "";
    this.step();
  }

  attachPad(element) {
    const knob = element.querySelector("i");
    const move = (event) => {
      const box = element.getBoundingClientRect();
      const limit = (v) => Math.max(-1, Math.min(1, v));
      const right = limit((event.clientX - box.left - box.width / 2) / (box.width * 0.36));
      const up = limit(-(event.clientY - box.top - box.height / 2) / (box.height * 0.36));
      this.pads.set(event.pointerId, { [element.dataset.x]: -right, [element.dataset.y]: up });
      knob.style.transform = `translate(${right * 110}%,${-up * 110}%)`;
    };
    element.addEventListener("pointerdown", (event) => {
      event.preventDefault();
      element.setPointerCapture(event.pointerId);
      element.classList.add("held");
      move(event);
      this.step();
    });
    element.addEventListener("pointermove", (event) => this.pads.has(event.pointerId) && move(event));
    for (const end of ["pointerup", "pointercancel", "lostpointercapture"])
      element.addEventListener(end, (event) => {
        this.pads.delete(event.pointerId);
        element.classList.remove("held");
        knob.style.transform = "";
        this.step();
      });
  }

  attachHold(element, name) {
    const set = (on) => (event) => {
      event.preventDefault();
      if (on) element.setPointerCapture(event.pointerId);
      this[name] = on;
      element.classList.toggle("held", on);
      this.step();
    };
    element.addEventListener("pointerdown", set(true));
    for (const end of ["pointerup", "pointercancel", "lostpointercapture"]) element.addEventListener(end, set(false));
  }

  key(event, down) {
    const key = event.key.toLowerCase();
    if (key === " " || key === "g" || key in KEYS) {
      if (event.ctrlKey || event.metaKey || event.altKey) return false;
      if (down) this.keys.add(key); else this.keys.delete(key);
      this.step();
      return true;
    }
    return false;
  }

  gamepad() {
    const pad = [...(navigator.getGamepads?.() ?? [])].find((p) => p?.connected && p.mapping === "standard");
    this.pad = pad?.id ?? null;
    if (!pad) return null;
    const stick = (i) => (Math.abs(pad.axes[i] ?? 0) < DEADBAND ? 0 : pad.axes[i]);
    return {
      held: Boolean(pad.buttons[5]?.pressed),
      gripper: Boolean(pad.buttons[2]?.pressed),
      axes: { x: -stick(1), y: -stick(0), z: -stick(3), yaw: -stick(2) },
    };
  }

  step() {
    const pad = this.gamepad();
    const keys = this.keys.has(" ") || this.latched;
    const held = this.mine && (this.latched || this.button || this.pads.size > 0 || this.keys.has(" ") || Boolean(pad?.held));
    const sum = Object.fromEntries(AXES.map((a) => [a, 0]));
    const add = (axes) => { for (const [name, value] of Object.entries(axes)) sum[name] += value; };
    for (const axes of this.pads.values()) add(axes);
    if (keys) for (const key of this.keys) if (KEYS[key]) add({ [KEYS[key][0]]: KEYS[key][1] });
    if (pad && (pad.held || this.latched)) add(pad.axes);
    const gripper = this.gripper || (keys && this.keys.has("g")) || Boolean(pad?.gripper);
    const now = performance.now();
    if (this.mine && now >= this.silentUntil && (held || this.was || now - this.sent >= SLOW_MS)) {
      const axes = AXES.map((a) => (held ? Math.round(1000 * Math.max(-1, Math.min(1, sum[a]))) / 1000 : 0));
      this.link.drive(axes, held, gripper);
      this.sent = now;
    }
    if (held !== this.was) { this.was = held; this.endedAt = now; this.changed(held); }
  }
}
