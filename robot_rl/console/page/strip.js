// How it goes, while a finger (or an arrow key) says so: a number from -1 to 1, twenty times a second. Untouched, it says nothing.

const PERIOD_MS = 50;
const KEY_STEP = 0.25;

export class Strip {
  constructor(element, link) {
    this.element = element;
    this.link = link;
    this.mine = false;
    this.value = null;
    const move = (event) => {
      const box = element.getBoundingClientRect();
      this.set(Math.max(-1, Math.min(1, (2 * (event.clientX - box.left)) / box.width - 1)));
    };
    element.addEventListener("pointerdown", (event) => {
      if (!this.mine) return;
      event.preventDefault();
      element.setPointerCapture(event.pointerId);
      move(event);
      this.link.feel(this.value);
    });
    element.addEventListener("pointermove", (event) => this.value !== null && element.hasPointerCapture(event.pointerId) && move(event));
    for (const end of ["pointerup", "pointercancel", "lostpointercapture", "keyup", "blur"]) element.addEventListener(end, () => this.set(null));
    element.addEventListener("keydown", (event) => {
      const way = { ArrowLeft: -KEY_STEP, ArrowRight: KEY_STEP }[event.key];
      if (!way || !this.mine) return;
      event.preventDefault();
      this.set(Math.max(-1, Math.min(1, (this.value ?? 0) + way)));
    });
    addEventListener("blur", () => this.set(null));
    setInterval(() => this.mine && this.value !== null && this.link.feel(this.value), PERIOD_MS);
  }

  allow(mine) {
    if (this.mine === mine) return;
    this.mine = mine;
    this.element.setAttribute("aria-disabled", String(!mine));
    if (!mine) this.set(null);
  }

  set(value) {
    this.value = value === null ? null : Math.round(1000 * value) / 1000;
    const shown = this.value ?? 0, bar = this.element.querySelector("i");
    bar.style.width = `${50 * Math.abs(shown)}%`;
    bar.style.left = `${shown < 0 ? 50 + 50 * shown : 50}%`;
    this.element.classList.toggle("bad", shown < 0);
    this.element.setAttribute("aria-valuenow", Math.round(100 * shown));
  }
}
