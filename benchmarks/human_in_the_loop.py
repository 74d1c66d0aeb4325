"""What is learned from people: HIL-SERL, RLIF over a base, HG-DAgger and RECAP with a simulated operator, on two shipped tasks. One JSON table.

    python benchmarks/human_in_the_loop.py --runs runs/people --seeds 0 1 2 [--tasks Lift] [--recipes hil_serl] [--slice 240]

The set-ups stand in ``benchmarks/human_in_the_loop.yaml``. Runs resume as those of ``recipes.py`` do: finished ones are only read, ``--slice`` stops
cleanly after so many seconds. What is judged:

* ``hil_serl``: its policy succeeds on at least 95 % of the final starts, and the person drove under 2 % of the last 2,000 training steps;
* ``rlif_edit``: its policy succeeds more often than the base, and than the person whom it was learned from, alone on the same starts;
* ``hg_dagger``, ``recap``: the policy is better than the base, on the same starts, with an interval that excludes zero.

Intervals are of paired differences, by hierarchical bootstrap over training seeds and starts; a row ``holds`` with three seeds only. The
person drives in at most 30 % of the steps at the start: of the first 1,000 steps that were played with a person beside the robot.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from recipes import Bench, Settings, get_ready, hand_out, merged, outcomes, run_arguments

from robot_rl import seeding
from robot_rl.config import decode, load
from robot_rl.evaluation.statistics import hierarchical_bootstrap
from robot_rl.intervention.metrics import Driven, intervention_rate
from robot_rl.replay import EpisodeStore
from robot_rl.sim.env import make_env, make_expert
from robot_rl.sim.operator_config import OperatorConfig
from robot_rl.training.config import PostTrainConfig

SETTINGS = Path(__file__).with_suffix(".yaml")
WINDOW = 1000
"""Steps that a rate is taken over, but the last one."""
LAST = 2000
RLIF = "rlif_edit"
MOST_AT_START, LEAST_AT_END, SUCCESS, SEEDS = 0.30, 0.02, 0.95, 3


def read_settings(path: Path = SETTINGS) -> dict[str, Settings]:
    """One for each task."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    tasks = content.pop("tasks")
    return {name: Settings.of(merged(content, task or {}), path) for name, task in tasks.items()}


def rates(store: Path) -> dict[str, Any]:
    """How much the person drove in a run: at the start, at the end, and for every thousand steps in between."""
    lengths, human = [], []
    with EpisodeStore.open(store) as episodes:
        for name in sorted(episodes.episode_ids()):  # as they were planned, which is how the run itself counts
            meta = episodes.meta(name)
            if "human_steps" in meta.extra:  # somebody was there: not in the gate's episodes
                lengths.append(int(episodes.attributes(name)["length"]))
                human.append(int(meta.extra["human_steps"]))
    played = np.cumsum(lengths)
    curve = []
    for first in range(0, int(played[-1]) if len(played) else 0, WINDOW):
        chosen = (played > first) & (played <= first + WINDOW)
        if chosen.any():
            curve.append(round(float(np.sum(np.array(human)[chosen]) / np.sum(np.array(lengths)[chosen])), 4))
    return {
        "start": curve[0] if curve else None,
        "end": intervention_rate(list(map(Driven, lengths, human)), LAST),
        "lowest": min(curve, default=None),
        "curve": curve,
    }


def alone(config: PostTrainConfig, operator: OperatorConfig, seeds: list[int]) -> list[bool]:
    """Whether the person succeeds from each of these starts without any policy."""
    env = make_env(config.env.id)
    low, high = np.array(env.spec.action.low), np.array(env.spec.action.high)
    out = []
    for seed in seeds:
        expert = make_expert(env, skill=operator.skill, noise=operator.noise)
        observation, info = env.reset(seed=seed)
        expert.reset(env, seeding.rng("operator", "alone", seed))
        over = False
        while not over:
            command = np.clip(expert.act(observation), low, high).astype(np.float32)
            observation, _, terminated, truncated, info = env.step(command)
            over = terminated or truncated
        out.append(bool(info["success"]))
    env.close()
    return out


def judge(recipe: str, row: dict[str, Any]) -> bool:
    """Whether the bar of this recipe is met by these runs, however few."""
    few_at_start = all(r["start"] is not None and r["start"] <= MOST_AT_START for r in row["person"])
    if recipe == "hil_serl":
        alone_at_end = all(r["end"] is not None and r["end"] < LEAST_AT_END for r in row["person"])
        return few_at_start and min(row["best"]) >= SUCCESS and alone_at_end
    intervals = [row["interval"], *([row["against_operator"]["interval"]] if recipe == RLIF else [])]
    return few_at_start and all(interval[0] > 0.0 for interval in intervals)


class People:
    """The runs of one task."""

    def __init__(self, task: str, runs: Path, settings: Settings, deadline: float) -> None:
        self.task, self.bench = task, Bench(runs / task, settings, deadline)

    def row(self, recipe: str, seeds: list[int]) -> dict[str, Any]:
        row = {"task": self.task} | self.bench.row(recipe, seeds)
        if not row["seeds"]:
            return row
        row["person"] = [rates(self.bench.folder(recipe, s) / "store") for s in row["seeds"]]
        row["operator"] = self.bench.settings.recipes[recipe].set["operator"]
        if recipe == RLIF:
            row["against_operator"] = self.against_operator(recipe, row["seeds"])
        row["bar_met"] = judge(recipe, row)
        row["holds"] = row["bar_met"] and len(row["seeds"]) >= SEEDS
        return row

    def against_operator(self, recipe: str, seeds: list[int]) -> dict[str, Any]:
        """Policy minus person, on the same starts."""
        config = load(PostTrainConfig, self.bench.config(recipe, seeds[0]))
        operator = decode(OperatorConfig, self.bench.settings.recipes[recipe].set["operator"])
        played = [outcomes(self.bench.folder(recipe, s))["policy"] for s in seeds]
        path = self.bench.shared / f"operator_{operator.skill:g}_{operator.noise:g}.json"
        starts = sorted({s for p in played for s in p})
        known = json.loads(path.read_text()) if path.exists() else {}
        if missing := [s for s in starts if str(s) not in known]:
            known |= dict(zip(map(str, missing), alone(config, operator, missing), strict=True))
            path.write_text(json.dumps(known))
        differences = [[float(p[s]) - float(known[str(s)]) for s in sorted(p)] for p in played]
        interval = hierarchical_bootstrap(differences)
        return {
            "operator_success": sum(bool(known[str(s)]) for s in starts) / len(starts), "starts": len(starts),
            "difference": sum(sum(d) / len(d) for d in differences) / len(differences), "interval": [interval.low, interval.high],
        }  # fmt: skip


def chosen(doc: str | None, path: Path) -> tuple[argparse.Namespace, dict[str, Settings]]:
    """The flags of a benchmark of several tasks, ``tasks`` and ``recipes`` filled up with all there are, and the settings of each task."""
    parser = run_arguments(doc, [0, 1, 2])
    parser.add_argument("--tasks", nargs="+", default=[], help="of the settings; all by default")
    parser.add_argument("--recipes", nargs="+", default=[], help="of the settings; all by default, in their order")
    given, settings = parser.parse_args(), read_settings(path)
    for name, known in (("tasks", list(settings)), ("recipes", list(next(iter(settings.values())).recipes))):
        setattr(given, name, getattr(given, name) or known)
        if unknown := [c for c in getattr(given, name) if c not in known]:
            parser.error(f"--{name} {' '.join(unknown)}: accepted are {', '.join(known)}")
    return given, settings


def main() -> None:
    given, settings = chosen(__doc__, SETTINGS)
    deadline, tasks, recipes = time.monotonic() + given.slice, given.tasks, given.recipes
    people = [People(t, given.runs, settings[t], deadline) for t in tasks]
    complete = True
    if not given.read:
        for p in people:
            get_ready(p.bench, recipes, given.seeds, given.retry)
        complete = all(p.bench.play(recipe, seed) for recipe in recipes for seed in given.seeds for p in people)
    rows = [p.row(recipe, given.seeds) for recipe in recipes for p in people]
    hand_out({"benchmark": "human_in_the_loop", "complete": complete, "rows": rows}, given.out)


if __name__ == "__main__":
    main()
