// Two small charts as SVG: rewards over steps, and success with its interval.

const NS = "http://www.w3.org/2000/svg";
const COLOURS = ["var(--blue)", "var(--good)", "var(--amber)", "#8b5cf6", "#64748b"];

function node(svg, name, attributes, text) {
  const made = document.createElementNS(NS, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  svg.append(made);
  return made;
}

export function traces(svg, key, sources, last, now) {
  const width = 1000, height = 100, names = Object.keys(sources).sort();
  svg.replaceChildren();
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const values = names.flatMap((n) => sources[n].map((p) => p[1])).filter((v) => v !== null);
  const low = Math.min(0, ...values), high = Math.max(1, ...values), end = Math.max(1, last);
  const px = (step) => (step / end) * width, py = (v) => height - 6 - ((v - low) / (high - low)) * (height - 14);
  node(svg, "line", { class: "grid", x1: 0, x2: width, y1: py(0), y2: py(0) });
  key?.replaceChildren();
  names.forEach((name, i) => {
    const points = sources[name].filter((p) => p[1] !== null);
    const colour = COLOURS[i % COLOURS.length];
    if (points.length > 1) {
      node(svg, "polyline", { class: "line", style: `stroke:${colour}`, points: points.map((p) => `${px(p[0]).toFixed(1)},${py(p[1]).toFixed(1)}`).join(" ") });
    } else if (points.length) {
      node(svg, "line", { class: "line", style: `stroke:${colour}`, x1: px(points[0][0]), x2: px(points[0][0]), y1: py(0), y2: py(points[0][1]) });
    }
    if (key) {
      const entry = document.createElement("span");
      entry.className = "key";
      const mark = document.createElement("i");
      mark.style.background = colour;
      const newest = points.at(-1)?.[1];
      entry.append(mark, newest === undefined ? name : `${name} ${Number(newest).toPrecision(3)}`);
      key.append(entry);
    }
  });
  if (!names.length && key) key.textContent = "none yet";
  if (now !== undefined) node(svg, "line", { class: "now", x1: now * width, x2: now * width, y1: 0, y2: height });
}

export function curve(svg, points, text) {
  const box = svg.getBoundingClientRect(), width = Math.max(240, box.width), height = Math.max(110, box.height);
  const left = 36, right = 8, top = 8, floor = height - 20;
  svg.replaceChildren();
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const first = points[0]?.x ?? 0, end = Math.max(first + 1, points.at(-1)?.x ?? 1);
  const px = (x) => left + ((x - first) / (end - first)) * (width - left - right), py = (v) => floor - v * (floor - top);
  for (const share of [0, 0.5, 1]) {
    node(svg, "line", { class: "grid", x1: left, x2: width - right, y1: py(share), y2: py(share) });
    node(svg, "text", { x: left - 6, y: py(share) + 4, "text-anchor": "end" }, `${100 * share}%`);
  }
  if (!points.length) {
    node(svg, "text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, text);
    return;
  }
  const upper = points.map((p) => `${px(p.x).toFixed(1)},${py(p.high).toFixed(1)}`);
  const lower = points.map((p) => `${px(p.x).toFixed(1)},${py(p.low).toFixed(1)}`).reverse();
  node(svg, "polygon", { class: "band", points: [...upper, ...lower].join(" ") });
  node(svg, "polyline", { class: "line", points: points.map((p) => `${px(p.x).toFixed(1)},${py(p.rate).toFixed(1)}`).join(" ") });
  node(svg, "text", { x: left, y: height - 4 }, `episode ${first}`);
  node(svg, "text", { x: width - right, y: height - 4, "text-anchor": "end" }, `${points.at(-1).x}`);
}

const EVENTS = { promoted: "var(--good)", rejected: "var(--bad)", rolled_back: "var(--amber)" };

// One bar for each decision of the gate: from the lower to the upper bound of the version's success, and what it had to reach.
export function gate(svg, points) {
  const box = svg.getBoundingClientRect(), width = Math.max(240, box.width), height = Math.max(110, box.height);
  const left = 36, right = 8, top = 8, floor = height - 20;
  svg.replaceChildren();
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const slot = (width - left - right) / points.length, py = (v) => floor - v * (floor - top);
  for (const share of [0, 0.5, 1]) {
    node(svg, "line", { class: "grid", x1: left, x2: width - right, y1: py(share), y2: py(share) });
    node(svg, "text", { x: left - 6, y: py(share) + 4, "text-anchor": "end" }, `${100 * share}%`);
  }
  points.forEach((p, i) => {
    const x = left + (i + 0.5) * slot, wide = Math.min(14, 0.6 * slot), colour = EVENTS[p.event] ?? "var(--soft)";
    const bar = node(svg, "rect", {
      x: x - wide / 2, width: wide, y: py(p.high ?? p.rate), height: Math.max(1, py(p.low ?? p.rate) - py(p.high ?? p.rate)), rx: 2, fill: colour, "fill-opacity": 0.3,
    });
    node(bar, "title", {}, `v${p.version} ${p.event.replace("_", " ")}: ${Math.round(100 * p.rate)} % of ${p.n}`);
    node(svg, "circle", { cx: x, cy: py(p.rate), r: 3, fill: colour });
    if (p.reference !== null) node(svg, "line", { class: "reach", x1: x - slot / 2, x2: x + slot / 2, y1: py(p.reference), y2: py(p.reference) });
  });
  node(svg, "text", { x: left, y: height - 4 }, `v${points[0].version}`);
  node(svg, "text", { x: width - right, y: height - 4, "text-anchor": "end" }, `v${points.at(-1).version}`);
}
