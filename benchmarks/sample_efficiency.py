"""How many environment steps the default recipe needs to 90 % on robosuite Can and Square, against plain DSRL-NA, EXPO and RLPD. One JSON table.

    python benchmarks/sample_efficiency.py --runs runs/efficiency --seeds 0 1 2 [--tasks Can] [--recipes noise_gradient] [--slice 600]

The set-ups stand in ``benchmarks/sample_efficiency.yaml``: one base a task for everybody, the same starts, and the baselines as in their papers. Those are
played for twice the steps that the default's median seed took to 90 %: one that is not there by then has lost. Runs resume as those of
``recipes.py`` do, and ``--out FILE`` keeps finished ones as there: the default's that it knows from elsewhere count, too. A task ``holds`` when there are three seeds of everybody and the default's median is at most half of every baseline's, one that was not
there counting with the steps that it was played for.

Steps are those of training, warm-up included. What the gate played is a column of its own (``gate_steps``); baselines have the same gate, and their
curve is that of the newest version, let through or not, as their papers show it.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from human_in_the_loop import chosen
from recipes import Bench, Known, Run, Settings, finished, get_ready, hand_out, known_of, merged, rate

from robot_rl.evaluation.results import read_jsonl

SETTINGS = Path(__file__).with_suffix(".yaml")
SEEDS, SUCCESS, FACTOR = 3, 0.9, 2
Curve = list[tuple[int, float]]


def first_there(curve: Curve, success: float = SUCCESS) -> int | None:
    """The first evaluated step with at least this success."""
    return next((steps for steps, found in curve if found >= success), None)


def curve_of(folder: Path, gated: bool) -> Curve:
    """(training steps, success) of what acts, or of each newest version: of its gate's episodes, which is where it was played first."""
    if gated:
        lines = [x for x in read_jsonl(folder / "evaluations.jsonl") if x["who"] in ("base", "acting")]
        return [(x["env_steps"], x["successes"] / x["n"]) for x in lines]
    judged = [x for x in read_jsonl(folder / "gate.jsonl") if x["event"] in ("promoted", "rejected") and x["n"]]
    return [(x["env_steps"], x["successes"] / x["n"]) for x in judged]


def raced(folder: Path, gated: bool) -> Run:
    """What a finished run says, with its curve and what its gate played."""
    result = json.loads((folder / "result.json").read_text())
    return finished(folder) | {"curve": curve_of(folder, gated), "gate_steps": result["gate_steps"]}


def read_known(path: Path | None) -> dict[str, Known]:
    """The runs of each task in a table that ``--out`` wrote; errors as ``recipes.read_known``."""
    tables = json.loads(path.read_text(encoding="utf-8"))["tasks"] if path is not None and path.exists() else []
    return {table["task"]: known_of(table["rows"], path) for table in tables}


def too_short(result: dict[str, Any], horizon: int) -> bool:
    """Whether a baseline only ran out of steps, and of fewer than it has to be watched for."""
    return result["env_steps"] < horizon and "used up" in result["ended"]


def verdict(default: list[int | None], baselines: dict[str, list[int]]) -> bool:
    """``default``: steps to the bar a seed. ``baselines``: the same, or the steps that were played in vain."""
    if len(default) < SEEDS or any(steps is None for steps in default) or any(len(b) < SEEDS for b in baselines.values()):
        return False
    ours = statistics.median(steps for steps in default if steps is not None)
    return all(FACTOR * ours <= statistics.median(steps) for steps in baselines.values())


class Race:
    """One task: the default first, then the baselines for as long as they need to be watched.

    Args:
        known: runs that were finished elsewhere; what lies in ``runs`` goes before.
    """

    def __init__(self, task: str, runs: Path, settings: Settings, deadline: float, known: Known | None = None) -> None:
        self.task, self.runs, self.settings, self.deadline = task, runs / task, settings, deadline
        self.default, *self.baselines = settings.recipes
        self.known = known or {}

    def bench(self, horizon: int | None = None) -> Bench:
        """``horizon``: training steps of the baselines."""
        entries = dict(self.settings.recipes)
        if horizon is not None:
            for name in self.baselines:
                longer = merged(entries[name].set, {"schedule": {"env_steps": horizon}})
                entries[name] = replace(entries[name], set=longer)
        return Bench(self.runs, replace(self.settings, recipes=entries), self.deadline)

    def done(self, recipe: str, seeds: list[int]) -> dict[int, Run]:
        """Finished runs by seed: of these seeds here, and whichever are known from elsewhere."""
        found = {seed: run for (name, seed), run in self.known.items() if name == recipe}
        folders = {seed: self.bench().folder(recipe, seed) for seed in seeds}
        found |= {s: raced(f, recipe == self.default) for s, f in folders.items() if (f / "result.json").exists()}
        return dict(sorted(found.items()))

    def there(self, seeds: list[int]) -> list[int | None]:
        return [first_there(run["curve"]) for run in self.done(self.default, seeds).values()]

    def horizon(self, seeds: list[int]) -> int | None:
        """None until every seed of the default has ended, or where one never got there: then a baseline has nothing to be slower than."""
        found = self.done(self.default, seeds)
        steps = [first_there(run["curve"]) for run in found.values()]
        known = [n for n in steps if n is not None]
        return int(FACTOR * statistics.median(known)) if len(known) == len(found.keys() | set(seeds)) else None

    def play(self, recipe: str, seeds: list[int]) -> bool:
        if recipe == self.default:
            return all(self.bench().play(recipe, seed) for seed in seeds)
        if (horizon := self.horizon(seeds)) is None:
            return True
        bench = self.bench(horizon)
        for seed in seeds:
            result = bench.folder(recipe, seed) / "result.json"
            if result.exists() and too_short(json.loads(result.read_text()), horizon):
                result.unlink()  # it goes on from its checkpoint
            if not bench.play(recipe, seed):
                return False
        return True

    def row(self, recipe: str, seeds: list[int]) -> dict[str, Any]:
        runs = self.done(recipe, seeds)
        row = {"task": self.task} | self.bench().row(recipe, seeds, {(recipe, seed): run for seed, run in runs.items()})
        row["curves"] = [run["curve"] for run in runs.values()]
        row["steps_to_90"] = [first_there(curve) for curve in row["curves"]]
        row["gate_steps"] = [run["gate_steps"] for run in runs.values()]
        return row | ({"runs": list(runs.values())} if runs else {})

    def table(self, recipes: list[str], seeds: list[int]) -> dict[str, Any]:
        names = [name for name in self.settings.recipes if name in recipes or any(name == k for k, _ in self.known)]
        rows = {recipe: self.row(recipe, seeds) for recipe in names}
        played = {
            name: [steps or most for steps, most in zip(row["steps_to_90"], row.get("env_steps", []), strict=True)]
            for name, row in rows.items()
            if name != self.default
        }
        base = [rate(run["base"]) for row in rows.values() for run in row.get("runs", [])]
        whole = set(names) == set(self.settings.recipes)
        return {
            "task": self.task, "base": base[0] if base else None, "horizon": self.horizon(seeds), "rows": list(rows.values()),
            "holds": whole and verdict(self.there(seeds), played),
        }  # fmt: skip


def main() -> None:
    given, settings = chosen(__doc__, SETTINGS)
    deadline, recipes, known = time.monotonic() + given.slice, given.recipes, read_known(given.out)
    races = {t: Race(t, given.runs, settings[t], deadline, known.get(t)) for t in given.tasks}
    complete = True
    if not given.read:
        for race in races.values():
            get_ready(race.bench(), recipes, given.seeds, given.retry)
        complete = all(race.play(recipe, given.seeds) for recipe in recipes for race in races.values())
    # Tasks that only the file knows stay in it.
    also = {t: Race(t, given.runs, settings[t], deadline, known[t]) for t in known if t in settings and t not in races}
    tables = [race.table(recipes if task in races else [], given.seeds) for task, race in (races | also).items()]
    hand_out({"benchmark": "sample_efficiency", "complete": complete, "tasks": tables}, given.out)


if __name__ == "__main__":
    main()
