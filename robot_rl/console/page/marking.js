// Plays one recorded episode at a time. What is marked is the frame that is on the screen, by its number.

const $ = (id) => document.getElementById(id);
const screen = $("screen");
const pen = screen.getContext("2d");
const HOLD = " ";
let reel = null, pictures = [], at = 0, timer = 0, last = -1, flags = [], readings = [], mode = "", holding = false;

async function load(next) {
  if (!next) next = await (await fetch("/api/reel")).json();
  reel = next;
  stop();
  $("said").textContent = reel.said;
  $("problem").textContent = "";
  if (reel.finished) {
    $("ask").textContent = "Done. You can close this page.";
    $("instruction").textContent = "";
    for (const id of ["play", "save", "skip"]) $(id).disabled = true;
    return;
  }
  const feedback = reel.task === "feedback";
  $("ask").textContent = feedback ? "Move the slider with what happens" : "Hold space while success is on the screen";
  $("instruction").textContent = `${reel.instruction} · ${reel.left} to go`;
  $("slider").hidden = !feedback;
  $("modes").hidden = feedback || !reel.modes.length;
  mode = "";
  $("modes").replaceChildren(...reel.modes.map((name, i) => {
    const button = document.createElement("button");
    button.textContent = `${i + 1}: ${name}`;
    button.onclick = () => choose(name);
    button.dataset.mode = name;
    return button;
  }));
  at = 0; last = -1; flags = Array(reel.frames).fill(false); readings = Array(reel.frames).fill(null);
  $("value").value = 0;
  $("save").disabled = true;
  $("play").disabled = true;
  pictures = await Promise.all(Array.from({ length: reel.frames }, (_, k) => picture(k)));
  $("play").disabled = false;
  show(0);
}

async function picture(k) {
  const answer = await fetch(`/api/reel/${encodeURIComponent(reel.episode)}/${k}.jpg`);
  if (!answer.ok) throw new Error(`frame ${k} did not come`);
  return createImageBitmap(await answer.blob());
}

function show(k) {
  at = k;
  const image = pictures[k];
  screen.width = image.width; screen.height = image.height;
  pen.drawImage(image, 0, 0);
  screen.classList.toggle("held", holding);
  if (timer) {
    last = Math.max(last, k);
    if (reel.task === "mark") flags[k] = holding;
    else readings[k] = Number($("value").value);
  }
  const bar = $("bar");
  bar.querySelector("i").style.left = `${(100 * k) / Math.max(reel.frames - 1, 1)}%`;
  for (const old of bar.querySelectorAll("span")) old.remove();
  for (const [first, end] of stretches()) {
    const span = document.createElement("span");
    span.style.left = `${(100 * first) / reel.frames}%`;
    span.style.width = `${(100 * (end - first + 1)) / reel.frames}%`;
    bar.append(span);
  }
}

function stretches() {
  const out = [];
  flags.forEach((on, k) => {
    if (!on) return;
    if (out.length && out[out.length - 1][1] === k - 1) out[out.length - 1][1] = k;
    else out.push([k, k]);
  });
  return out;
}

function play() {
  if (!reel || reel.finished || $("play").disabled || timer) return;
  if (at >= reel.frames - 1) at = 0;
  $("play").textContent = "Pause (P)";
  timer = setInterval(() => {
    if (at + 1 >= reel.frames) { stop(); return; }
    show(at + 1);
  }, 1000 / reel.hz);
  show(at);
}

function stop() {
  clearInterval(timer);
  timer = 0;
  $("play").textContent = "Play (P)";
  $("save").disabled = last < 0;
}

function choose(name) {
  mode = mode === name ? "" : name;
  for (const button of $("modes").children) button.setAttribute("aria-pressed", button.dataset.mode === mode);
}

async function say(message) {
  stop();
  const answer = await fetch("/api/reel", { method: "POST", body: JSON.stringify({ episode: reel.episode, ...message }) });
  const body = await answer.json();
  if (!answer.ok) { $("problem").textContent = body.error; return; }
  await load(body);
}

function save() {
  if (!reel || reel.finished || last < 0) return;
  if (reel.task === "mark") say({ first: 0, last, success: stretches(), mode });
  else say({ readings });
}

$("play").onclick = () => (timer ? stop() : play());
$("save").onclick = save;
$("skip").onclick = () => reel && !reel.finished && say({ leave_out: true });
$("value").oninput = () => { $("shown").textContent = Number($("value").value).toFixed(2); };
addEventListener("keydown", (event) => {
  if (event.key === HOLD) { event.preventDefault(); if (!event.repeat) { holding = true; if (!timer) play(); else show(at); } }
  else if (event.key === "p") { timer ? stop() : play(); }
  else if (event.key === "Enter") { event.preventDefault(); save(); }
  else if (event.key === "n") $("skip").click();
  else if (/^[1-9]$/.test(event.key) && reel?.modes?.[event.key - 1]) choose(reel.modes[event.key - 1]);
});
addEventListener("keyup", (event) => { if (event.key === HOLD) { holding = false; screen.classList.remove("held"); } });
addEventListener("blur", () => { holding = false; });
load().catch((error) => { $("problem").textContent = String(error); });
