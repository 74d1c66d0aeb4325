"""The report's sections, each one function from a run to HTML; one that a run has nothing for is empty or says so."""

from __future__ import annotations

import base64
import json
import math
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from robot_rl import __version__
from robot_rl.evaluation import plots
from robot_rl.evaluation.plots import DASH, THIN, count, percent
from robot_rl.evaluation.report_assets import ARROW
from robot_rl.evaluation.report_text import duration, legend_entry, note, p_value, percentage_points, section, span
from robot_rl.evaluation.results import EpisodeLine, EvaluationLine, lowest_acting_minus_base, steps_to
from robot_rl.evaluation.run_record import RunRecord
from robot_rl.evaluation.statistics import PairedComparison, SuccessRate, wilson

VIDEO_BUDGET_BYTES = 32 << 20
VIDEO_PAIRS = 4
SCALARS_SHOWN = 9
FAILURES_SHOWN = 20
# What a reader looks for first; other scalars follow in alphabetical order.
SCALAR_ORDER = (
    "human_steps",
    "critic_loss",
    "actor_loss",
    "alpha",
    "temperature",
    "entropy",
    "q",
    "error",
    "steps_per_second",
    "updates_per_second",
)


def header(run: RunRecord) -> str:
    base, policy, paired = run.base_rate, run.policy_rate, run.paired()
    name = run.task or run.path.resolve().name
    env_id = str(run.result.extra.get("env_id", "")) if run.result is not None else ""
    kicker = " · ".join(escape(x) for x in ("Post-training report", env_id, run.path.resolve().name if run.task else "") if x)
    out = [f'<header><p class="kicker">{kicker}</p><h1>{escape(name)}</h1>']
    if base is not None or policy is not None:
        cells = []
        for css, who, rate in (("before", "Base policy", base), ("after", "After post-training", policy)):
            if rate is None:
                continue
            interval = f"{span(rate.interval, 1 if rate.rate > 0.9 else 0)}"
            cells.append(
                f'<div class="rate {css}"><b>{percent(rate.rate)}</b>'
                f"<span>{who}<br>{rate.successes} of {rate.n}, {interval}</span></div>"
            )
        out.append(f'<div class="hero">{ARROW.join(cells)}</div>')
    if paired is not None:
        out.append(_lead(paired))
    elif run.result is None:
        out.append('<p class="lead">This run has no final evaluation yet; the page shows what it has so far.</p>')
    return "".join(out) + _facts(run, paired) + "</header>"


def _lead(paired: PairedComparison) -> str:
    def starts(n: int) -> str:
        return "no start" if n == 0 else "1 start" if n == 1 else f"{n} starts"

    return (
        f'<p class="lead">On {paired.n} held-out starts that training never saw, post-training newly solved '
        f"<strong>{starts(paired.new_wins)}</strong> and lost <strong>{starts(paired.old_wins)}</strong>; "
        f"{paired.both} were solved by both, {paired.neither or 'none'} by neither.</p>"
    )


def _facts(run: RunRecord, paired: PairedComparison | None) -> str:
    facts: list[tuple[str, str, str]] = []
    if paired is not None:
        low, high = percentage_points(paired.interval.low), percentage_points(paired.interval.high)
        facts.append(
            ("Paired difference", f"{percentage_points(paired.difference)} points", f"95{THIN}% interval {low} to {high}")
        )
        facts.append(
            ("Exact McNemar test, one-sided", f"p = {p_value(paired.p_value)}", f"{paired.new_wins} against {paired.old_wins}")
        )
    if run.env_steps:
        facts.append(("Environment steps", count(run.env_steps), ""))
    if math.isfinite(run.wall_seconds) and run.wall_seconds > 0:
        facts.append(("Wall time", duration(run.wall_seconds), ""))
    acting = [(e.env_steps, e.rate) for e in run.evaluations if e.who == "acting"]
    reached = run.result.steps_to if run.result is not None and run.result.steps_to else (steps_to(acting) if acting else {})
    told = [
        f"{escape(str(t))}{THIN}% at {count(s)}" if s is not None else f"{escape(str(t))}{THIN}% not reached"
        for t, s in reached.items()
    ]
    if told:
        facts.append(("Steps to reach", told[-1], "<br>".join(reversed(told[:-1]))))
    dip = run.result.lowest_acting_minus_base if run.result is not None else lowest_acting_minus_base(run.evaluations)
    if dip is not None:
        facts.append(("Lowest point against the base", f"{percentage_points(dip)} points", "acting policy, over the whole run"))
    driven = run.result.extra.get("intervention_rate") if run.result is not None else None
    if driven is not None and driven["last"] is not None:
        facts.append(
            (
                "Driven by a person",
                percent(driven["last"], 1),
                f"of the last {count(driven['steps'])} training steps; {percent(driven['first'], 1)} of the first",
            )
        )
    if run.gate:
        kinds = Counter(g.event for g in run.gate)
        facts.append(
            (
                "Promotion gate",
                f"{kinds['promoted']} promoted",
                f"{kinds['rejected']} rejected, {kinds['rolled_back']} rolled back",
            )
        )
    if not facts:
        return ""
    rows = "".join(f"<div><dt>{n}</dt><dd>{v}{f'<small>{d}</small>' if d else ''}</dd></div>" for n, v, d in facts)
    return f'<dl class="facts">{rows}</dl>'


def curve_section(run: RunRecord) -> str:
    acting = sorted((e for e in run.evaluations if e.who == "acting" and e.n), key=lambda e: e.env_steps)
    latest = sorted((e for e in run.evaluations if e.who == "policy" and e.n), key=lambda e: e.env_steps)
    base_lines = [e for e in run.evaluations if e.who == "base" and e.n]
    rate = SuccessRate.of(sum(e.successes for e in base_lines), sum(e.n for e in base_lines)) if base_lines else run.base_rate
    if not acting and not latest:
        return section("Learning curve", note("No evaluation was written during this run."))

    def tip(e: EvaluationLine) -> str:
        who = "base policy" if e.version == 0 else f"version {e.version}" + (f", {e.mode}" if e.mode else "")
        return f"{count(e.env_steps)} steps: {percent(e.rate)} ({e.successes} of {e.n})\n{span(e.interval)}\n{who}"

    def points(lines: Sequence[EvaluationLine]) -> list[plots.Point]:
        return [plots.Point(e.env_steps, e.rate, e.interval.low, e.interval.high, tip(e)) for e in lines]

    base = None if rate is None or not rate.n else plots.Point(0, rate.rate, rate.interval.low, rate.interval.high)
    shown = [g for g in run.gate if g.event in ("promoted", "rejected", "rolled_back")]
    names = {"promoted": "promoted", "rejected": "rejected", "rolled_back": "rolled back"}
    marks = [
        plots.Mark(
            g.env_steps, "reserve" if g.event == "promoted" and g.acting not in (-1, g.version) else g.event,
            f"version {g.version} {names[g.event]} at {count(g.env_steps)} steps\n{g.successes} of {g.n}, "
            f"{percent(g.lower)} to {percent(g.upper)}" + (f"\n{g.reason}" if g.reason else ""),
        )
        for g in shown
    ]  # fmt: skip
    drawn = points(acting) or points(latest)
    extra = points(latest) if acting else []
    wide = plots.learning_curve(drawn, base, extra, marks, 960, 410)
    narrow = plots.learning_curve(drawn, base, extra, marks, 380, 330)
    key = [legend_entry('<path d="M0 8h16" stroke="var(--policy)" stroke-width="2.6"/>', "Policy that acts")]
    if base is not None:
        key.append(
            legend_entry('<path d="M0 8h16" stroke="var(--base)" stroke-width="2" stroke-dasharray="5 3"/>', "Base policy")
        )
    if extra:
        dotted = '<path d="M0 8h16" stroke="var(--muted)" stroke-width="1.6" stroke-dasharray="2 3"/>'
        key.append(legend_entry(dotted, "Newest version, before the gate"))
    present = {m.kind for m in marks}
    hollow = '<path d="M8 3l5.5 10h-11z" fill="none" stroke="var(--good)" stroke-width="1.6"/>'
    for kind, shape, label in (
        ("promoted", '<path d="M8 2l6.5 12h-13z" fill="var(--good)"/>', "Promoted, acts"),
        ("reserve", hollow, "Promoted, in reserve"),
        ("rejected", '<path d="M4 4l8 8m0-8l-8 8" stroke="var(--muted)" stroke-width="2"/>', "Rejected"),
        ("rolled_back", '<path d="M8 14l6.5-12h-13z" fill="var(--bad)"/>', "Rolled back"),
    ):
        if kind in present:
            key.append(legend_entry(shape, label))
    rows = "".join(
        f'<tr><td class="n">{count(e.env_steps)}</td><td>{escape(e.who)}</td><td class="n">{e.version}</td>'
        f"<td>{escape(e.mode)}</td>"
        f'<td class="n">{e.successes} of {e.n}</td><td class="n">{percent(e.rate, 1)}</td><td>{span(e.interval, 1)}</td></tr>'
        for e in sorted(run.evaluations, key=lambda e: (e.env_steps, e.who))
    )
    table = (
        '<div class="scroll"><table><tr><th class="n">Steps</th><th>Who</th><th class="n">Version</th><th>Mode</th>'
        f'<th class="n">Successes</th><th class="n">Rate</th><th>Interval</th></tr>{rows}</table></div>'
    )
    episodes = sorted({e.n for e in acting or latest})
    each = f"{episodes[0]}" if len(episodes) == 1 else f"{episodes[0]} to {episodes[-1]}"
    about = f"Success on fixed held-out starts, {each} episodes a point. Bands are 95{THIN}% intervals."
    if run.gate:
        about += " A version acts only after the gate has promoted it."
    return section(
        "Learning curve", note(about), f'<figure>{wide}{narrow}<ul class="key">{"".join(key)}</ul></figure>',
        f"<details style='margin-top:20px'><summary>Numbers behind the curve</summary>{table}</details>",
    )  # fmt: skip


def _outcome(episode: EpisodeLine | None) -> str:
    if episode is None:
        return ""
    if episode.success:
        return f'<span class="ok">Success</span> after {episode.length} steps'
    how = "" if episode.end == "failure" else f", {escape(episode.end)}"
    return f'<span class="fail">Failure</span>{how} after {episode.length} steps'


def video_section(run: RunRecord) -> str:
    base, policy = run.outcomes("base"), run.outcomes("policy")
    seeds = sorted({s for _, s in run.videos})
    if not seeds:
        return ""

    def interest(seed: int) -> tuple[int, int]:
        before, after = base.get(seed), policy.get(seed)
        both = ("base", seed) in run.videos and ("policy", seed) in run.videos
        turned = before is not None and after is not None and after.success and not before.success
        return (-int(both) - int(both and turned), seed)

    budget, left_out = VIDEO_BUDGET_BYTES, 0
    pairs: list[str] = []
    for seed in sorted(seeds, key=interest):
        files = {who: run.videos[who, seed] for who in ("base", "policy") if (who, seed) in run.videos}
        size = sum(f.stat().st_size for f in files.values())
        if len(pairs) >= VIDEO_PAIRS or size > budget:
            left_out += 1
            continue
        budget -= size
        cells = []
        for who, label, episodes in (("base", "Before", base), ("policy", "After", policy)):
            if who not in files:
                continue
            data = base64.b64encode(files[who].read_bytes()).decode()
            said = _outcome(episodes.get(seed))
            cells.append(
                f'<figure><video autoplay loop muted playsinline preload="auto" aria-label="{label}, start {seed}" '
                f'src="data:video/mp4;base64,{data}"></video><figcaption><b>{label}.</b> {said}</figcaption></figure>'
            )
        pairs.append(f'<div><h3>Start {seed}</h3><div class="pair">{"".join(cells)}</div></div>')
    if not pairs:
        return section(
            "Before and after", note(f"{left_out} starts were filmed; none fits into one page. See the folder videos.")
        )
    more = f" {left_out} more in the folder <code>videos</code>." if left_out else ""
    return section(
        "Before and after", note(f"The same starts, played by the base policy and by the post-trained one.{more}"),
        f'<div class="pairs{" many" if len(pairs) > 1 else ""}">{"".join(pairs)}</div>', css="videos",
    )  # fmt: skip


def start_section(run: RunRecord) -> str:
    base, policy = run.outcomes("base"), run.outcomes("policy")
    first = base or policy
    if len(first) < 5 or not all(e.start for e in first.values()):
        return ""
    starts = [dict(e.start) for e in first.values()]
    outcomes = [[g[s].success for s in first] for g in (base, policy) if g and all(s in g for s in first)]
    chosen = plots.informative_parameters(starts, outcomes)[:2]
    if not chosen:
        return section("Success by start state", note("Every start had the same state: nothing to compare."))
    x = chosen[0]
    y = chosen[1] if len(chosen) > 1 else ""

    def place(e: EpisodeLine) -> tuple[float, float]:
        return e.start[x], (e.start[y] if y else float(e.length))

    groups = [(n, g) for n, g in (("Before", base), ("After", policy)) if g]
    spots = [place(e) for _, g in groups for e in g.values() if x in e.start and (not y or y in e.start)]
    xs, ys = [p[0] for p in spots], [p[1] for p in spots]
    x_range, y_range = (min(xs), max(xs)), (min(ys), max(ys))
    y_label = y or "episode length, steps"
    figures = []
    for name, group in groups:
        marks = [
            plots.Start(*place(e), e.success, f"start {e.seed}\n{'success' if e.success else e.end} after {e.length} steps")
            for e in group.values()
            if x in e.start and (not y or y in e.start)
        ]
        wins = sum(e.success for e in group.values())
        title = f"{name}: success by {x} and {y_label}"
        figures.append(
            f"<figure><figcaption><b>{name}.</b> {wins} of {len(group)} starts solved</figcaption>"
            f"{plots.start_map(marks, x, y_label, title, x_range, y_range)}</figure>"
        )
    varying = plots.informative_parameters(starts, [])
    about = (
        f"Each mark is one held-out start. Of the {len(varying)} parameters that vary, these two say most about the outcome."
    )
    if len(varying) <= 2:
        about = "Each mark is one held-out start."
    key = '<ul class="key">' + legend_entry('<circle cx="8" cy="8" r="4.5" fill="var(--good)"/>', "Success")
    key += legend_entry('<path d="M4 4l8 8m0-8l-8 8" stroke="var(--bad)" stroke-width="2.2"/>', "Failure") + "</ul>"
    return section("Success by start state", note(about), f'<div class="grid-2">{"".join(figures)}</div>{key}')


def failure_section(run: RunRecord) -> str:
    base, policy = run.outcomes("base"), run.outcomes("policy")
    if not policy:
        return ""
    failed = sorted((e for e in policy.values() if not e.success), key=lambda e: e.seed)
    if not failed:
        upper = 1 - wilson(len(policy), len(policy)).low
        about = (
            f"Nothing failed in {len(policy)} held-out starts. The true failure rate is below {percent(upper, 1)} (95{THIN}%)."
        )
        return section("What failed", note(about), _endings(base, policy))
    parameters = plots.informative_parameters(
        [dict(e.start) for e in policy.values()], [[e.success for e in g.values()] for g in (policy,)]
    )[:3]
    staged = any(e.stage for e in failed)
    head = (
        '<th class="n">Start</th><th>Ended by</th>' + ("<th>Furthest stage</th>" if staged else "") + '<th class="n">Steps</th>'
    )
    head += "".join(f'<th class="n">{escape(p)}</th>' for p in parameters) + ("<th>Base policy</th>" if base else "")
    rows = []
    for e in failed[:FAILURES_SHOWN]:
        cells = f'<td class="n">{e.seed}</td><td>{escape(e.end)}</td>' + (f"<td>{escape(e.stage)}</td>" if staged else "")
        cells += f'<td class="n">{e.length}</td>'
        cells += "".join(f'<td class="n">{plots.short(round(e.start[p], 4))}</td>' for p in parameters)
        if base:
            before = base.get(e.seed)
            cells += f"<td>{DASH if before is None else 'solved it' if before.success else 'failed too'}</td>"
        rows.append(f"<tr>{cells}</tr>")
    more = f"<p class='note'>{len(failed) - FAILURES_SHOWN} more in episodes.jsonl.</p>" if len(failed) > FAILURES_SHOWN else ""
    lost = sum(1 for e in failed if e.seed in base and base[e.seed].success)
    noun = "start" if len(failed) == 1 else "starts"
    about = f"{len(failed)} of {len(policy)} {noun if len(policy) == 1 else 'starts'} still fail"
    about += f"; the base policy had solved {lost} of them." if base else "."
    table = f'<div class="scroll"><table><tr>{head}</tr>{"".join(rows)}</table></div>{more}'
    return section("What failed", note(about), table, _endings(base, policy))


def _endings(base: Mapping[int, EpisodeLine], policy: Mapping[int, EpisodeLine]) -> str:
    """Where failures stopped, before and after, and how long successes took."""
    if not base:
        return ""
    groups = [list(base.values()), list(policy.values())]
    counted = [Counter((e.stage or e.end) for e in g if not e.success) for g in groups]
    names = sorted(set(counted[0]) | set(counted[1]), key=lambda n: -(counted[0][n] + counted[1][n]))[:8]
    figures = []
    if names:
        what = "Furthest stage of failed episodes" if any(e.stage for g in groups for e in g) else "How failed episodes ended"
        bars = plots.paired_bars([(n, counted[0][n], counted[1][n]) for n in names], ("Before", "After"), what)
        figures.append(f"<figure><figcaption><b>{what}</b></figcaption>{bars}</figure>")
    lengths = [[e.length for e in g if e.success and e.length] for g in groups]
    if all(lengths):
        median = [float(np.median(v)) for v in lengths]
        top = max(max(v) for v in lengths)
        edges = np.linspace(0, max(top, 1), 7)
        rows = []
        histograms = [np.histogram(v, edges)[0] for v in lengths]
        for i in range(6):
            rows.append((f"{edges[i]:.0f} to {edges[i + 1]:.0f}", int(histograms[0][i]), int(histograms[1][i])))
        rows = [r for r in rows if r[1] or r[2]]
        bars = plots.paired_bars(rows, ("Before", "After"), "Steps that successes took")
        figures.append(
            f"<figure><figcaption><b>Steps that successes took</b>, median {median[0]:.0f} before, {median[1]:.0f} after"
            f"</figcaption>{bars}</figure>"
        )
    return f'<div class="grid-2" style="margin-top:28px">{"".join(figures)}</div>' if figures else ""


def scalar_section(run: RunRecord) -> str:
    series: dict[str, list[tuple[float, float]]] = {}
    for row in run.metrics:
        step = row.get("env_steps")
        if not isinstance(step, (int, float)):
            continue
        for name, value in row.items():
            if name in ("env_steps", "wall_seconds") or isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            series.setdefault(str(name), []).append((float(step), float(value)))
    series = {n: v for n, v in series.items() if sum(math.isfinite(y) for _, y in v) and n != "updates"}
    if not series:
        return ""

    def rank(name: str) -> tuple[int, str]:
        leaf = name.rpartition("/")[2].lower()
        hits = [i for i, key in enumerate(SCALAR_ORDER) if leaf == key or leaf.startswith(key + "_")]
        return (min(hits, default=len(SCALAR_ORDER)), name)

    names = sorted(series, key=rank)
    x_max = max(x for v in series.values() for x, _ in v)

    def figure(name: str) -> str:
        last = next(y for _, y in reversed(series[name]) if math.isfinite(y))
        return (
            f"<figure><figcaption><b>{escape(name)}</b> {plots.short(float(f'{last:.3g}'))}</figcaption>"
            f"{plots.scalar(name, series[name], x_max)}</figure>"
        )

    shown, rest = names[:SCALARS_SHOWN], names[SCALARS_SHOWN:]
    grid = f'<div class="grid-3">{"".join(map(figure, shown))}</div>'
    if rest:
        grid += (
            f"<details style='margin-top:24px'><summary>{len(rest)} more scalars</summary>"
            f'<div class="grid-3">{"".join(map(figure, rest[:60]))}</div></details>'
        )
    return section("Training", note("Against environment steps; the number is the last value."), grid)


def details_section(run: RunRecord) -> str:
    extra = dict(run.result.extra) if run.result is not None else {}
    facts: list[tuple[str, str]] = [("Run folder", run.path.resolve().name)]
    if run.result is not None:
        facts += [("Configuration hash", run.result.config_hash or DASH), ("Run seed", str(run.result.run_seed))]
        seeds = run.result.seeds
        if isinstance(seeds, Mapping):
            facts.append(("Evaluation seeds", ", ".join(f"{k} {v}" for k, v in seeds.items())))
        elif seeds:
            facts.append(("Evaluation seeds", f"{min(seeds)} to {max(seeds)}, {len(seeds)} in all"))
    facts.append(
        ("Report written with", f"robot_rl {__version__}, Python {platform.python_version()}, {platform.platform(terse=True)}")
    )
    for name, value in extra.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        elif isinstance(value, (list, tuple)):
            value = json.dumps(value)
        facts.append((name.replace("_", " ").capitalize(), str(value)))
    rows = "".join(f"<dt>{escape(n)}</dt><dd>{escape(v)}</dd>" for n, v in facts)
    out = f"<details open><summary>Versions and machine</summary><dl class='spec'>{rows}</dl></details>"
    if run.gate:
        lines = "".join(
            f'<tr><td class="n">{count(g.env_steps)}</td><td>{escape(g.event.replace("_", " "))}</td>'
            f'<td class="n">{g.version}</td><td>{escape(g.mode)}</td><td class="n">{g.successes} of {g.n}</td>'
            f"<td>{percent(g.lower)} to {percent(g.upper)}</td>"
            f"<td>{escape(g.reason)}</td></tr>"
            for g in run.gate
        )
        out += (
            f"<details><summary>Gate decisions<small>{len(run.gate)}</small></summary><div class='scroll'><table>"
            '<tr><th class="n">Steps</th><th>Event</th><th class="n">Version</th><th>Mode</th><th class="n">Probation</th>'
            f"<th>Bounds</th><th>Reason</th></tr>{lines}</table></div></details>"
        )
    if run.config_text:
        digest = run.result.config_hash if run.result is not None else ""
        small = f"<small>{escape(digest)}</small>" if digest else ""
        out += f"<details><summary>Configuration{small}</summary><pre>{escape(run.config_text)}</pre></details>"
    return section("How this was made", out)
