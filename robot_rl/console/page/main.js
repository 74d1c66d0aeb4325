// The page: log in, connect, show the state, pass on what is pressed.

import { Cameras } from "./cameras.js";
import { curve, gate, traces } from "./chart.js";
import { Drive } from "./drive.js";
import { Compare, Queue, get } from "./episodes.js";
import { Link } from "./link.js";
import { Strip } from "./strip.js";

const $ = (id) => document.getElementById(id);
const put = (id, text) => { const e = $(id); if (e.textContent !== String(text)) e.textContent = text; };
const percent = (v) => `${Math.round(100 * v)} %`;
const CONTROL = {
  autonomous: "Policy drives", requested: "Help is requested", human: "A person drives", handback: "Handing back", estop: "Emergency stop",
};
let state = null;

function toast(answer) {
  const box = $("toast");
  box.textContent = answer.text || (answer.ok ? "done" : "refused");
  box.className = answer.ok ? "on" : "on no";
  clearTimeout(toast.timer);
  toast.timer = setTimeout(() => { box.className = ""; }, answer.ok ? 1600 : 4200);
}

async function begin() {
  const me = await get("/api/me");
  const given = new URLSearchParams(location.hash.slice(1)).get("token");
  if (given) history.replaceState(null, "", location.pathname);
  if (!me.inside && !(given && (await login(given)))) {
    $("login").hidden = false;
    $("token").focus();
    $("login").onsubmit = async (event) => {
      event.preventDefault();
      if (await login($("token").value)) location.reload(); else put("login-problem", "This is not the token.");
    };
    return;
  }
  $("app").hidden = false;
  run();
}

async function login(token) {
  const answer = await fetch("/api/login", { method: "POST", credentials: "same-origin", body: JSON.stringify({ token }) });
  return answer.ok;
}

function run() {
  const link = new Link();
  const stats = (window.frameStats = {});
  const cameras = new Cameras($("cameras"), stats);
  const ask = async (name, values) => { const answer = await link.ask(name, values); toast(answer); return answer; };
  const drive = new Drive(link, () => show());
  const strip = new Strip($("strip"), link);
  let restLater = 0;
  $("rest-later").onclick = () => { restLater = performance.now() + 600000; show(); };
  const queue = new Queue(link, toast);
  const compare = new Compare(link, toast);

  const press = (id, name, values) => { $(id).onclick = () => ask(name, values?.()); };
  press("success", "success"); press("failure", "failure"); press("undo", "undo_label"); press("discard", "discard");
  press("start", "start_episode"); press("estop", "estop"); press("reset-estop", "reset_estop"); press("promote", "promote"); press("rollback", "rollback");
  press("ready", "ready"); press("next-phase", "next_phase");
  press("arm", "arm", () => ({ on: !state?.armed }));
  press("pause", "pause_learning", () => ({ on: !state?.learning_paused }));
  $("hold").onclick = async () => {
    const on = $("hold").getAttribute("aria-pressed") !== "true";
    if ((await ask("hold", { on })).ok) $("hold").setAttribute("aria-pressed", on);
  };
  $("operator").value = localStorage.getItem("operator") ?? "";
  const name = () => $("operator").value.trim() || "operator";
  const sit = async () => {
    localStorage.setItem("operator", name());
    const answer = await link.ask("take_seat", { operator: name() });
    if (!answer.ok) toast(answer);
    drive.mine = answer.ok;
    return answer.ok;
  };
  $("seat").onclick = () => (drive.mine ? ask("leave_seat") : sit());
  // This page drove, and was lost to the person: the robot holds until somebody hands it back or drives on.
  const left = () => drive.mine && state?.control === "human" && !drive.was && performance.now() - drive.endedAt > 800;
  $("take-over").onclick = async () => {
    if (drive.latched || drive.was || left()) {
      drive.letGo();
      ask("hand_back");
    } else if (drive.mine || (await sit())) {
      drive.latched = true;
      drive.step();
    }
    show();
  };
  for (const pad of document.querySelectorAll(".pad")) drive.attachPad(pad);
  drive.attachHold($("hold-drive"), "button");
  drive.attachHold($("gripper"), "gripper");
  $("instruction-form").onsubmit = (event) => { event.preventDefault(); ask("instruction", { text: $("instruction").value }); };
  $("note-form").onsubmit = async (event) => {
    event.preventDefault();
    if ((await ask("note", { text: $("note").value })).ok) { $("note").value = ""; notes(); }
  };

  const typing = (event) => /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName) && event.target.type !== "range";
  const shortcuts = { y: "success", n: "failure", u: "undo", t: "take-over" };
  addEventListener("keydown", (event) => {
    if (event.key === "Escape") { link.ask("estop").then(toast); event.preventDefault(); return; }
    if (typing(event) || document.body.dataset.tab !== "live") return;
    if (drive.key(event, true)) event.preventDefault();
    else if (!event.repeat && !event.ctrlKey && !event.metaKey && shortcuts[event.key.toLowerCase()]) $(shortcuts[event.key.toLowerCase()]).click();
  });
  addEventListener("keyup", (event) => { if (drive.key(event, false) && !typing(event)) event.preventDefault(); });

  for (const button of document.querySelectorAll("[data-view]"))
    button.onclick = () => {
      drive.letGo();
      document.body.dataset.tab = button.dataset.view;
      for (const other of document.querySelectorAll("[data-view]")) other === button ? other.setAttribute("aria-current", "page") : other.removeAttribute("aria-current");
      compare.leave();
      if (button.dataset.view === "label") queue.load(!queue.chosen);
      if (button.dataset.view === "compare") compare.load();
      if (button.dataset.view === "notes") notes();
    };

  async function notes() {
    const rows = await get("/api/notes").catch(() => []);
    $("notes").replaceChildren(...rows.map((row) => {
      const item = document.createElement("li"), text = document.createElement("p"), who = document.createElement("span"), when = document.createElement("time");
      item.className = row.kind;
      when.textContent = new Date(row.stamp_ns / 1e6).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
      who.textContent = row.who;
      text.textContent = row.text;
      item.append(when, who, text);
      return item;
    }));
  }

  async function drawCurve() {
    const found = await get("/api/curve").catch(() => null);
    if (!found) return;
    const last = found.points.at(-1);
    curve($("curve"), found.points, found.hidden ? "hidden while policies are compared" : "no judged episode yet");
    put("curve-text", last ? `${percent(last.rate)} of the last ${last.n}, 95 % interval ${percent(last.low)} to ${percent(last.high)}` : "");
  }

  async function drawGate() {
    const found = await get("/api/gate").catch(() => null);
    $("gate-panel").hidden = !found?.points.length;
    if (!found?.points.length) return;
    const last = found.points.at(-1);
    gate($("gate-curve"), found.points);
    put("gate-text", `v${last.version} ${last.event.replace("_", " ")}, ${percent(last.rate)} of ${last.n}${last.reference === null ? "" : ` against ${percent(last.reference)}`}`);
  }

  function show() {
    if (!state) return;
    const mine = state.seat !== null && state.seat.connection === link.connection && link.connection > 0;
    drive.mine = mine;
    strip.allow(mine && ["running", "paused"].includes(state.episode.state));
    $("rest").hidden = !mine || !state.rest || performance.now() < restLater;
    if (state.rest) put("rest-text", `${state.rest} minutes at the controls: time for a break, or for somebody else.`);
    if (!mine && drive.latched) drive.letGo();
    put("robot", state.robot || "robot_rl");
    put("run", [state.run, state.phase].filter(Boolean).join(" · "));
    const driving = drive.was;
    const control = $("control");
    const held = state.control === "autonomous" && !["running", "paused"].includes(state.episode.state);
    control.dataset.state = state.control === "human" && driving ? "you" : held ? "hold" : state.control;
    put("control-text", state.control === "human" && driving ? "You drive" : left() ? "The robot holds" : held ? "The robot waits" : CONTROL[state.control] ?? state.control);
    put("control-detail", state.seat ? `${mine ? "you are" : `${state.seat.operator} is`} at the controls` : "nobody is at the controls");
    const episode = state.episode;
    put("episode", episode.index ? `${episode.index} ${episode.state === "running" ? "" : `· ${episode.outcome && episode.outcome !== "none" ? episode.outcome : episode.state}`}` : "–");
    put("step", episode.index ? episode.step : "–");
    put("guard", state.guard ? `${state.guard}${state.armed ? "" : ", not armed"}` : "–");
    $("guard").title = state.guard_reason;
    put("watchers", state.watchers);
    traces($("traces"), $("trace-key"), state.traces, Math.max(20, episode.step));
    $("no-cameras").hidden = state.cameras.length > 0 || cameras.shown.size > 0;

    put("seat", mine ? "Leave the controls" : "Take the controls");
    $("seat").disabled = !mine && state.seat !== null;
    $("operator").disabled = mine;
    put("take-over", drive.latched || (driving && mine) || left() ? "Hand back" : "Take over");
    $("take-over").classList.toggle("mine", drive.latched || driving);
    $("take-over").disabled = !mine && state.seat !== null;
    for (const id of ["success", "failure", "undo", "discard", "start", "hold", "arm", "reset-estop", "promote", "rollback", "pause", "hold-drive", "gripper"]) $(id).disabled = !mine;
    const running = ["running", "paused"].includes(episode.state);
    $("start").disabled ||= running || (state.flow && !["preflight", "report"].includes(state.flow.phase));
    put("arm", state.armed ? "Disarm" : "Arm");
    const stopped = state.control === "estop" || state.guard === "estop";
    $("estop").classList.toggle("latched", stopped);
    $("reset-estop").disabled ||= !stopped;
    if (document.activeElement !== $("instruction")) $("instruction").value = state.task;
    $("instruction").disabled = !mine;
    $("pad-text").textContent = drive.pad ? `${drive.pad}: the right shoulder button drives, left stick moves, right stick lifts and turns, X is the gripper.` : "No gamepad. Press a button of one that is connected; its right shoulder button drives.";

    const weights = state.weights, of = (v) => (v ? `v${v}` : "base");
    const hidden = state.blind;
    put("acting", hidden ? "hidden" : of(weights.acting));
    put("promoted", hidden ? "hidden" : of(weights.promoted));
    put("newest", hidden ? "hidden" : weights.newest ? `v${weights.newest}` : "–");
    put("candidate", hidden ? "hidden" : weights.candidate ? `v${weights.candidate}, ${percent(weights.share)}` : "–");
    put("pause", state.learning_paused ? "Resume learning" : "Pause learning");
    put("learner", hidden ? "Who acts is hidden until the comparison is over." : Object.entries(state.learner).slice(0, 4).map(([k, v]) => `${k.replace(/_/g, " ")} ${v}`).join(" · "));
    for (const id of ["promote", "rollback", "pause"]) $(id).disabled ||= hidden;
    flow(state.flow, mine);

    const problem = stopped ? `Emergency stop: ${state.guard_reason || "latched"}` : state.problems.join("; ") || state.console_problem;
    banner(problem, stopped);
  }

  function banner(text, stop) {
    const lost = !link.open;
    $("banner").hidden = !lost && !text;
    $("banner").className = stop && !lost ? "" : "warn";
    put("banner", lost ? "The connection is lost. Nothing you press reaches the robot; what drove it holds." : text);
  }

  function flow(found, mine) {
    $("flow").hidden = !found;
    if (!found) return;
    const at = found.phases.findIndex(([name]) => name === found.phase);
    $("phases").replaceChildren(...found.phases.map(([, title], i) => {
      const item = document.createElement("li");
      item.textContent = item.title = title;
      item.className = i < at ? "done" : i === at ? "now" : "";
      return item;
    }));
    put("flow-title", found.title);
    put("prompt", found.prompt);
    $("countdown").hidden = found.countdown === null;
    if (found.countdown !== null) put("countdown", Math.ceil(found.countdown));
    $("checks").replaceChildren(...found.checks.map((check) => {
      const item = document.createElement("li"), title = document.createElement("b"), text = document.createElement("span");
      item.className = check.ok ? "ok" : "";
      title.textContent = check.name;
      text.textContent = check.text;
      item.append(title, text);
      return item;
    }));
    $("flow-progress").hidden = !found.total;
    if (found.total) { $("flow-progress").max = found.total; $("flow-progress").value = found.done; }
    const counted = found.total ? `${found.done} of ${found.total} episodes` : found.phase === "training" ? `${found.done} episodes` : "";
    const driven = found.phase === "training" && found.driven !== null ? `; a person drove ${percent(found.driven)} of the last steps` : "";
    put("flow-count", found.blind ? `${counted}. Which policy acts is hidden.` : counted + driven);
    put("flow-problem", found.problem);
    put("ready", found.phase === "preflight" ? "Begin the session" : "Ready");
    $("ready").hidden = found.phase === "report";
    $("ready").disabled = !mine || (found.phase !== "preflight" && found.stage !== "prompt") || (found.phase === "preflight" && found.checks.some((c) => !c.ok));
    $("next-phase").hidden = found.phase !== "training" && !found.hopeless;
    put("next-phase", found.hopeless ? "End without a result" : "End training");
    $("next-phase").disabled = !mine || ["running", "starting", "label"].includes(found.stage);
    $("report").hidden = found.phase !== "report";
    const compared = found.result?.comparison;
    if (compared && !$("flow-result").childElementCount) {
      const rates = document.createElement("div");
      rates.className = "rates";
      for (const [who, title] of [["old", "old policy"], ["new", "new policy"]]) {
        const cell = document.createElement("div"), value = document.createElement("b"), text = document.createElement("span");
        value.textContent = percent(compared[who].success);
        text.textContent = `${title}, ${compared[who].successes} of ${compared[who].n}`;
        cell.append(value, text);
        rates.append(cell);
      }
      const verdict = document.createElement("p"), sign = (v) => `${v > 0 ? "+" : ""}${Math.round(100 * v)}`;
      verdict.textContent = `${compared.verdict} Difference ${sign(compared.difference)} points, 95 % interval ${sign(compared.interval[0])} to ${sign(compared.interval[1])}.`;
      $("flow-result").append(rates, verdict);
    } else if (!compared) $("flow-result").replaceChildren();
  }

  link.on("state", (next) => {
    const judged = state && (state.episode.id !== next.episode.id || state.episode.state !== next.episode.state || state.episode.outcome !== next.episode.outcome);
    if (!state || judged || state.blind !== next.blind) { drawCurve(); drawGate(); queue.count(); }
    state = next;
    show();
  });
  link.on("open", () => show());
  link.on("close", () => { drive.mine = false; banner("", false); });
  setInterval(() => {
    $("link").classList.toggle("on", link.fresh);
    put("link-text", !link.open ? "connecting" : link.fresh ? "live" : "slow");
    if (state?.control === "human") show();
    if (link.open && $("banner").textContent.startsWith("The connection")) show();
  }, 250);
  setInterval(() => { if (!document.hidden) { drawCurve(); drawGate(); queue.count(); } }, 15000);
  addEventListener("resize", () => { drawCurve(); drawGate(); });
  window.page = { link, drive, get state() { return state; } };
  link.on("hello", (page) => cameras.of(page));
  link.connect();
}

begin();
