// Recorded episodes: the queue to label, the film to scrub through, pairs to compare.

import { traces } from "./chart.js";

const $ = (id) => document.getElementById(id);

export async function get(path) {
  const answer = await fetch(path, { credentials: "same-origin" });
  const body = await answer.json();
  if (!answer.ok) throw new Error(body.error ?? answer.statusText);
  return body;
}

function film(place, episode, cameras) {
  place.replaceChildren();
  const images = cameras.map((camera) => {
    const figure = document.createElement("figure");
    figure.className = "camera";
    const image = new Image();
    image.alt = `${camera} of episode ${episode}`;
    image.onload = () => { figure.style.aspectRatio = `${image.naturalWidth} / ${image.naturalHeight}`; };
    const caption = document.createElement("figcaption");
    caption.textContent = camera.replace(/_/g, " ");
    figure.append(image, caption);
    place.append(figure);
    return [camera, image];
  });
  let wanted = null, busy = false;
  const load = async () => {
    if (busy) return;
    busy = true;
    while (wanted !== null) {
      const at = wanted;
      wanted = null;
      await Promise.all(images.map(async ([camera, image]) => {
        image.src = `/api/episodes/${encodeURIComponent(episode)}/${encodeURIComponent(camera)}.jpg?at=${at.toFixed(4)}`;
        await image.decode().catch(() => {});
      }));
    }
    busy = false;
  };
  return (at) => { wanted = at; load(); };
}

export class Queue {
  constructor(link, done) {
    this.link = link;
    this.done = done;
    this.chosen = null;
    $("unlabelled").onchange = $("reload").onclick = () => this.load();
    $("scrub").oninput = () => { this.stop(); this.seek(Number($("scrub").value)); };
    $("play").onclick = () => (this.timer ? this.stop() : this.play());
    $("label-success").onclick = () => this.label(true);
    $("label-failure").onclick = () => this.label(false);
    $("label-undo").onclick = async () => { this.done(await link.ask("undo_label")); this.load(); };
  }

  async count() {
    try {
      const rows = await get("/api/episodes?show=unlabelled");
      $("queue-count").textContent = rows.length || "";
    } catch { /* the next look tries again */ }
  }

  async load(next) {
    const rows = await get(`/api/episodes?show=${$("unlabelled").checked ? "unlabelled" : "all"}`).catch(() => []);
    $("episodes").replaceChildren(...rows.map((row) => {
      const item = document.createElement("li"), button = document.createElement("button"), tag = document.createElement("span"), facts = document.createElement("span");
      button.dataset.episode = row.id;
      tag.className = `tag ${row.success === true ? "good" : row.success === false ? "bad" : ""}`;
      tag.textContent = row.success === true ? "success" : row.success === false ? "failure" : "no label";
      facts.textContent = `${row.seconds.toFixed(1)} s${row.human ? " · with help" : ""}`;
      button.append(tag, `…${row.id.slice(-6)}`, facts);
      tag.style.marginLeft = "0";
      button.setAttribute("aria-selected", row.id === this.chosen);
      button.onclick = () => this.open(row.id);
      item.append(button);
      return item;
    }));
    $("no-episodes").hidden = rows.length > 0;
    if (next && rows.length) this.open(rows[0].id);
    if (!rows.length && next) $("player").hidden = true;
    this.count();
  }

  async open(episode) {
    this.stop();
    this.chosen = episode;
    for (const button of $("episodes").querySelectorAll("button")) button.setAttribute("aria-selected", button.dataset.episode === episode);
    const found = this.detail = await get(`/api/episodes/${encodeURIComponent(episode)}`);
    $("player").hidden = false;
    $("player-title").textContent = found.task || `Episode …${episode.slice(-6)}`;
    const helped = found.source.filter((s) => s === 1).length;
    $("player-facts").textContent = [`${found.steps} steps, ${found.seconds.toFixed(1)} s`, helped ? `${helped} by a person` : "", found.version > 0 ? `version ${found.version}` : found.version === 0 ? "base policy" : ""].filter(Boolean).join(" · ");
    this.show = film($("player-pictures"), episode, found.cameras);
    $("scrub").value = 0;
    this.seek(0);
  }

  seek(at) {
    this.show?.(at);
    traces($("player-traces"), null, this.detail.traces, this.detail.steps, at);
  }

  play() {
    let at = Number($("scrub").value);
    if (at >= 1) at = 0;
    const began = performance.now(), from = at, seconds = Math.max(0.5, this.detail.seconds);
    $("play").textContent = "Pause";
    this.timer = setInterval(() => {
      at = Math.min(1, from + (performance.now() - began) / 1000 / seconds);
      $("scrub").value = at;
      this.seek(at);
      if (at >= 1) this.stop();
    }, 100);
  }

  stop() {
    clearInterval(this.timer);
    this.timer = null;
    $("play").textContent = "Play";
  }

  async label(success) {
    if (!this.chosen) return;
    const answer = await this.link.ask("label_episode", { episode: this.chosen, success });
    this.done(answer);
    if (answer.ok) this.load($("unlabelled").checked);
  }
}

export class Compare {
  constructor(link, done) {
    this.link = link;
    this.done = done;
    this.count = 0;
    for (const button of document.querySelectorAll("[data-choice]")) button.onclick = () => this.choose(button.dataset.choice);
  }

  async load() {
    clearInterval(this.timer);
    const { pair, steps, cameras } = await get("/api/pair").catch(() => ({ pair: null }));
    this.pair = pair;
    $("pair").hidden = !pair;
    $("no-pair").hidden = Boolean(pair);
    for (const button of document.querySelectorAll("[data-choice]")) button.disabled = !pair;
    if (!pair) return;
    const shows = ["first", "second"].map((side) => [pair[side], film($(`pair-${side}`), pair[side].episode, cameras)]);
    const began = performance.now(), ms = 2500;
    const look = () => {
      const share = ((performance.now() - began) % ms) / ms;
      for (const [segment, show] of shows) show((segment.start + share * (segment.stop - segment.start)) / steps[segment.episode]);
    };
    look();
    this.timer = setInterval(look, 150);
  }

  leave() { clearInterval(this.timer); }

  async choose(choice) {
    if (!this.pair) return;
    const answer = await this.link.ask("prefer", { pair: this.pair.id, choice });
    if (choice !== "skip") this.done(answer);
    if (answer.ok && choice !== "skip") this.count += 1;
    $("pair-count").textContent = this.count ? `${this.count} compared since this page was opened` : "";
    if (answer.ok) this.load();
  }
}
