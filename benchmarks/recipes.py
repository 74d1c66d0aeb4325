"""Does every recipe improve a base policy? One table: base, best, paired difference with interval, steps to 50/75/90 %, wall time.

    python benchmarks/recipes.py --runs runs/recipes --seeds 0 1 [--recipes dsrl_na,expo] [--slice 600] [--docs docs/recipes.md]

What each recipe is run with stands in ``benchmarks/recipes.yaml``. Finished runs are only read, unfinished ones resume, and one
that failed is reported with its error (``--retry`` runs it again). ``--slice`` stops cleanly after so many seconds: the run in
progress gets an interrupt, saves, and goes on at the next call. ``--docs`` writes what was measured into the recipes' tables.

The interval is that of the paired difference on the same 200 final starts, by hierarchical bootstrap over training seeds and
starts; ``holds`` means that it lies above zero and that there were at least two seeds. ``--out FILE`` keeps what every start of a run
came to: runs that the file knows from elsewhere, and that were not done again here, stay in the table.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from robot_rl.config import load, to_dict
from robot_rl.evaluation.results import read_jsonl, steps_to
from robot_rl.evaluation.statistics import hierarchical_bootstrap
from robot_rl.training.config import PostTrainConfig

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
SETTINGS = Path(__file__).with_suffix(".yaml")
TASK_FILE = CONFIGS / "quickstart.yaml"
INTERRUPTED = 130
GRACE_S = 60.0  # that a run gets to save itself
WORTH_STARTING_S = 15.0  # a process that has less left only starts and stops
TARGETS = ("50", "75", "90")
Run = dict[str, Any]
Known = dict[tuple[str, int], Run]
"""Finished runs by recipe and seed."""


@dataclass(frozen=True)
class Entry:
    """What is changed for one recipe, and what must be there before it can run.

    Attributes:
        set: keys on top of everything else.
        data: which demonstrations it gets (a name of the file's ``data``).
        runs: configuration key to the recipes whose finished runs it names, e.g. ``learner.critic_init: policy_decorator``.
        store: configuration key to the name of demonstrations whose store it takes.
        why: what a reader should know about the choice.
    """

    set: dict[str, Any] = field(default_factory=dict)
    data: str = "clumsy"
    runs: dict[str, Any] = field(default_factory=dict)
    store: dict[str, str] = field(default_factory=dict)
    why: str = ""


@dataclass(frozen=True)
class Settings:
    """``benchmarks/recipes.yaml``, or another file of its kind.

    Attributes:
        task: keys on top of ``configs/quickstart.yaml``, for runs and their base alike: another task.
        base: folder beside the settings with the base that everybody gets, so that runs on several machines have the same one (cloning is
            deterministic on one kind of processor only). Empty: it is cloned.
    """

    common: dict[str, Any]
    at_most: dict[str, float]
    on_policy: dict[str, Any]
    data: dict[str, dict[str, Any]]
    recipes: dict[str, Entry]
    task: dict[str, Any] = field(default_factory=dict)
    base: str = ""

    @classmethod
    def read(cls, path: Path = SETTINGS) -> Settings:
        return cls.of(yaml.safe_load(path.read_text(encoding="utf-8")), path)

    @classmethod
    def of(cls, content: dict[str, Any], path: Path) -> Settings:
        """``content`` as read from ``path``."""
        entries = {name: Entry(**(entry or {})) for name, entry in content.pop("recipes").items()}
        unknown = sorted(set(entries) - {p.stem for p in (CONFIGS / "recipes").glob("*.yaml")})
        if unknown:
            raise ValueError(f"{path}: recipes={unknown}: accepted are the names of files in {CONFIGS / 'recipes'}")
        base = content.get("base", "")
        if base and not (path.parent / base / "policy.json").exists():
            raise ValueError(f"{path}: base={base!r}: accepted is a folder of {path.parent} that holds a policy")
        content["base"] = str(path.parent / base) if base else ""
        return cls(recipes=entries, **content)


def merged(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in change.items():
        out[key] = merged(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out


def nested(dotted: dict[str, Any]) -> dict[str, Any]:
    """``{"a.b": 1}`` to ``{"a": {"b": 1}}``."""
    tree: dict[str, Any] = {}
    for key, value in dotted.items():
        for part in reversed(key.split(".")):
            value = {part: value}
        tree = merged(tree, value)
    return tree


def looked_up(tree: dict[str, Any], dotted: str) -> Any:
    for part in dotted.split("."):
        tree = tree[part]
    return tree


class Bench:
    """The runs of one folder.

    Args:
        deadline: on ``time.monotonic()``'s clock; nothing is started after it.
    """

    def __init__(self, runs: Path, settings: Settings, deadline: float = float("inf")) -> None:
        self.runs, self.settings, self.deadline = runs.resolve(), settings, deadline
        self.shared = self.runs / "shared"

    @property
    def task(self) -> Path:
        """The configuration that every run extends."""
        if not self.settings.task:
            return TASK_FILE
        path = self.shared / "task.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump({"extends": str(TASK_FILE), **self.settings.task}, sort_keys=False))
        return path

    def left(self) -> float:
        return self.deadline - time.monotonic()

    # ---- what all runs share

    def prepare(self, kinds: set[str]) -> None:
        """Demonstrations and the base policy, made once; a half-made one is made again."""
        kinds = kinds | {"clumsy"}
        base = self.shared / "clumsy" / "base" / "policy.json"
        if base.exists() and all((self.store(kind) / "complete").exists() for kind in kinds):
            return
        from robot_rl.progress import Silent
        from robot_rl.training import posttrain
        from robot_rl.training.interrupt import InterruptFlag
        from robot_rl.training.run_folder import RunFolder

        task = load(PostTrainConfig, self.task, ["--device=cpu"])
        if task.threads:
            posttrain.set_threads(task.threads)
        spec = posttrain._env_spec(task)
        clumsy = RunFolder(self.shared / "clumsy")
        for kind in sorted(kinds):
            made = load(PostTrainConfig, self.task, [f"--demos.{k}={v}" for k, v in self.settings.data[kind].items()])
            posttrain.gather(made.demos, made.env, spec, made.seed, RunFolder(self.shared / kind), Silent(), 1)
        if self.settings.base:
            shutil.copytree(self.settings.base, clumsy.base, dirs_exist_ok=True)
            return
        with InterruptFlag() as flag:
            posttrain.prepare_base(task, spec, clumsy, Silent(), flag, "cpu")

    def store(self, kind: str) -> Path:
        return self.shared / kind / "demos"

    # ---- one run

    def folder(self, recipe: str, seed: int) -> Path:
        return self.runs / recipe / f"seed{seed}"

    def config(self, recipe: str, seed: int) -> Path:
        """Write the run's configuration file; returns where."""
        entry, s = self.settings.recipes[recipe], self.settings
        path = self.runs / "configs" / f"{recipe}_seed{seed}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        layers = {"extends": [str(self.task), str(CONFIGS / "recipes" / f"{recipe}.yaml")]}
        path.write_text(yaml.safe_dump(layers))
        own = load(PostTrainConfig, path)
        held = to_dict(own)
        caps = {k: most for k, most in s.at_most.items() if looked_up(held, k) > most}
        change = merged(s.common, nested(caps))
        if own.learner.algorithm == "on_policy":
            change = merged(change, s.on_policy)
        change = merged(change, entry.set)
        named = {key: self._named(value, seed) for key, value in entry.runs.items()}
        named |= {key: str(self.store(kind)) for key, kind in entry.store.items()}
        change = merged(change, nested(named))
        demos = {"demos": {"source": "store", "path": str(self.store(entry.data))}}
        change = merged(merged(change, demos), {"base": {"path": str(self.shared / "clumsy" / "base")}})
        path.write_text(yaml.safe_dump(layers | change, sort_keys=False))
        return path

    def _named(self, value: Any, seed: int) -> Any:
        return [str(self.folder(v, seed)) for v in value] if isinstance(value, list) else str(self.folder(value, seed))

    def needed(self, recipe: str) -> list[str]:
        """Recipes whose runs this one names."""
        found: list[str] = []
        for value in self.settings.recipes[recipe].runs.values():
            found += value if isinstance(value, list) else [value]
        return found

    def play(self, recipe: str, seed: int) -> bool:
        """Run it, or the rest of it; False when time was up first. What goes wrong is left in ``failed.json``."""
        folder = self.folder(recipe, seed)
        if (folder / "result.json").exists() or (folder / "failed.json").exists():
            return True
        for other in self.needed(recipe):
            if not (self.folder(other, seed) / "result.json").exists() and not self.play(other, seed):
                return False
        if self.left() < WORTH_STARTING_S:
            return False
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / "log.txt"
        try:
            config = self.config(recipe, seed)
        except Exception as error:  # one bad entry must not stop the others
            self._failed(folder, f"{type(error).__name__}: {error}")
            return True
        command = [
            sys.executable,
            "-m",
            "robot_rl.cli",
            "train",
            "--config",
            str(config),
            f"--run_dir={folder}",
            f"--seed={seed}",
        ]
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        with log.open("ab") as out:
            child = subprocess.Popen(
                command, stdout=out, stderr=out, stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            code = self._wait(child)
        if code == INTERRUPTED or (code < 0 and self.left() <= 0):
            return False
        if code != 0:
            text = log.read_text(errors="replace").strip().splitlines()
            self._failed(folder, f"exit code {code}: {' | '.join(text[-3:])}")
        return True

    def _wait(self, child: subprocess.Popen[bytes]) -> int:
        try:
            return child.wait(max(self.left(), 0.0) if self.deadline != float("inf") else None)
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGINT)
        except BaseException:  # we are stopped ourselves: so is the run, and it saves
            child.send_signal(signal.SIGINT)
            child.wait(GRACE_S)
            raise
        try:
            return child.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            child.kill()
            return child.wait()

    @staticmethod
    def _failed(folder: Path, error: str) -> None:
        (folder / "failed.json").write_text(json.dumps({"error": error}))

    def forget_failures(self, recipes: list[str], seeds: list[int]) -> None:
        """Runs that failed start anew."""
        for recipe in recipes:
            for seed in seeds:
                if (self.folder(recipe, seed) / "failed.json").exists():
                    shutil.rmtree(self.folder(recipe, seed))

    # ---- the table

    def row(self, recipe: str, seeds: list[int], known: Known | None = None) -> dict[str, Any]:
        """One recipe over the seeds that have finished, here or, of all seeds, elsewhere."""
        folders = {seed: self.folder(recipe, seed) for seed in seeds}
        done = {seed: run for (name, seed), run in (known or {}).items() if name == recipe}
        done |= {seed: finished(f) for seed, f in folders.items() if (f / "result.json").exists()}
        row: dict[str, Any] = {"recipe": recipe, "seeds": sorted(done)}
        failed = {
            s: json.loads((f / "failed.json").read_text())["error"] for s, f in folders.items() if (f / "failed.json").exists()
        }
        if failed:
            row["failed"] = failed
        if done:
            runs = [done[seed] for seed in sorted(done)]
            row |= summary(runs) | {"runs": runs}
        return row

    def table(self, recipes: list[str], seeds: list[int], known: Known | None = None) -> dict[str, Any]:
        """Recipes that are ``known`` from elsewhere are rows, too."""
        names = [name for name in self.settings.recipes if name in recipes or any(name == k for k, _ in known or {})]
        return {"benchmark": "recipes", "rows": [self.row(name, seeds, known) for name in names]}


def read_known(path: Path) -> Known:
    """The runs of a table that ``--out`` wrote; none where there is no such file.

    Raises:
        ValueError: a table whose rows do not hold their runs (they would be lost).
    """
    return known_of(json.loads(path.read_text(encoding="utf-8"))["rows"], path) if path.exists() else {}


def known_of(rows: list[dict[str, Any]], path: Path) -> Known:
    """The runs of a table's rows, which ``path`` holds; errors as :func:`read_known`."""
    if bare := [r["recipe"] for r in rows if r["seeds"] and "runs" not in r]:
        raise ValueError(
            f"--out={path}: the rows {', '.join(bare)} do not hold their runs: accepted is another file, or this one moved away"
        )
    return {(r["recipe"], s): run for r in rows for s, run in zip(r["seeds"], r.get("runs", []), strict=True)}


def outcomes(folder: Path) -> dict[str, dict[int, bool]]:
    """``base`` and ``policy``: success on each final start, by the start's seed."""
    played: dict[str, dict[int, bool]] = {"base": {}, "policy": {}}
    for line in read_jsonl(folder / "episodes.jsonl"):
        played[line["who"]][int(line["seed"])] = bool(line["success"])
    if played["base"].keys() != played["policy"].keys():
        raise ValueError(f"{folder}: base and policy were played on different starts")
    return played


def finished(folder: Path) -> Run:
    """What a finished run says. ``base`` and ``policy``: a digit for each final start in order, 1 where it was a success."""
    result = json.loads((folder / "result.json").read_text())
    curve = read_jsonl(folder / "evaluations.jsonl")
    zero = [line["successes"] / line["n"] for line in curve if line["who"] == "zero_noise"]
    # Of heads alone: on the few starts of a small curve the base itself may look better than it is.
    heads = steps_to((line["env_steps"], line["successes"] / line["n"]) for line in curve if line["version"] > 0)
    copied = {key: result[key] for key in ("task", "env_steps", "updates", "lowest_acting_minus_base", "wall_seconds", "ended")}
    digits = {who: "".join("01"[starts[s]] for s in sorted(starts)) for who, starts in outcomes(folder).items()}
    return {**copied, **digits, "steps_to": heads, "zero_noise": zero[0] if zero else None}


def rate(digits: str) -> float:
    return digits.count("1") / len(digits)


def summary(runs: list[Run]) -> dict[str, Any]:
    """Rates, the paired difference with its interval, and what every run took. The "best" of a run is what its gate lets act."""
    differences = [[float(p) - float(b) for b, p in zip(run["base"], run["policy"], strict=True)] for run in runs]
    interval = hierarchical_bootstrap(differences)
    mean = sum(sum(d) / len(d) for d in differences) / len(runs)
    dips = [run["lowest_acting_minus_base"] for run in runs]
    return {
        "task": runs[0]["task"],
        "base": [rate(run["base"]) for run in runs],
        "best": [rate(run["policy"]) for run in runs],
        "starts": len(runs[0]["base"]),
        "difference": mean,
        "interval": [interval.low, interval.high],
        "holds": len(runs) > 1 and interval.low > 0.0,
        "zero_noise": runs[0]["zero_noise"],
        "env_steps": [run["env_steps"] for run in runs],
        "updates": [run["updates"] for run in runs],
        "steps_to": {k: [run["steps_to"].get(k) for run in runs] for k in TARGETS},
        "lowest_acting_minus_base": min((x for x in dips if x is not None), default=None),
        "wall_seconds": [round(run["wall_seconds"], 1) for run in runs],
        "ended": [run["ended"] for run in runs],
    }


def figures(row: dict[str, Any]) -> str:
    """The last column of a row in ``docs/recipes.md``."""
    percent = lambda values: ", ".join(f"{100 * v:.1f}" for v in values)  # noqa: E731
    low, high = (100 * x for x in row["interval"])
    seeds = f"{len(row['seeds'])} seed{'s' if len(row['seeds']) > 1 else ''}"
    # Where nothing is learnt yet, no noise at all may be better than the base's own: a gain has to be read against that.
    zero = "" if row["zero_noise"] is None else f" (zero noise alone: {100 * row['zero_noise']:.0f} % of the curve's starts)"
    return (
        f"`{row['task']}`, {seeds}: {percent(row['base'])} to {percent(row['best'])} %; {100 * row['difference']:+.0f} points "
        f"({low:+.0f} to {high:+.0f}) after {', '.join(f'{n:,}' for n in row['env_steps'])} steps{zero}"
    )


def write_docs(table: dict[str, Any], path: Path) -> int:
    """Put the figures into the recipes' rows of a Markdown file; gives how many were changed. Other columns stay as they are."""
    rows = {row["recipe"]: figures(row) for row in table["rows"] if row["seeds"]}
    changed, lines = 0, path.read_text(encoding="utf-8").split("\n")
    for i, line in enumerate(lines):
        found = re.match(r"\| `(\w+)` \|", line)
        if found is None or found[1] not in rows:
            continue
        kept = re.search(r"\[results\]\(results\.md\)[^|]*", line.rsplit("|", 2)[1])
        text = rows[found[1]] + (f". {kept[0].strip()}" if kept else "")
        new = f"{line.rsplit('|', 2)[0]}| {text} |"
        changed += new != line
        lines[i] = new
    path.write_text("\n".join(lines), encoding="utf-8")
    return changed


def run_arguments(doc: str | None, seeds: list[int], out: str = "also write the table there") -> argparse.ArgumentParser:
    """The flags of every benchmark that is a table of runs."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=seeds)
    parser.add_argument("--slice", type=float, default=float("inf"), help="seconds after which to stop cleanly")
    parser.add_argument("--retry", action="store_true", help="start failed runs anew")
    parser.add_argument("--read", action="store_true", help="run nothing, only read what there is")
    parser.add_argument("--out", type=Path, help=out)
    return parser


def get_ready(bench: Bench, recipes: list[str], seeds: list[int], retry: bool) -> None:
    """Demonstrations and base of these recipes; with ``retry`` their failed runs are forgotten."""
    if retry:
        bench.forget_failures(recipes, seeds)
    named = [bench.settings.recipes[r] for r in recipes]
    bench.prepare({e.data for e in named} | {kind for e in named for kind in e.store.values()})


def hand_out(table: dict[str, Any], out: Path | None) -> None:
    """To standard output, and to ``out`` where one is named."""
    text = json.dumps(table, indent=2)
    print(text)
    if out is not None:
        out.write_text(text + "\n", encoding="utf-8")


def main() -> None:
    parser = run_arguments(__doc__, [0, 1], "also write the table there, with the runs that it already knows")
    parser.add_argument(
        "--recipes", default="", help="names, separated by commas; all of the settings by default, in their order"
    )
    parser.add_argument("--docs", type=Path, help="write the figures into the tables of this Markdown file")
    arguments = parser.parse_args()
    settings = Settings.read()
    recipes = [r for r in arguments.recipes.split(",") if r] or list(settings.recipes)
    unknown = [r for r in recipes if r not in settings.recipes]
    if unknown:
        parser.error(f"--recipes={','.join(unknown)}: accepted are {', '.join(settings.recipes)}")
    known = read_known(arguments.out) if arguments.out is not None else {}
    bench = Bench(arguments.runs, settings, time.monotonic() + arguments.slice)
    complete = True
    if not arguments.read:
        get_ready(bench, recipes, arguments.seeds, arguments.retry)
        # All recipes once before any of them twice.
        complete = all(bench.play(recipe, seed) for seed in arguments.seeds for recipe in recipes)
    table = bench.table(recipes, arguments.seeds, known) | {"complete": complete}
    hand_out(table, arguments.out)
    if arguments.docs is not None:
        print(f"{write_docs(table, arguments.docs)} rows changed in {arguments.docs}", file=sys.stderr)


if __name__ == "__main__":
    main()
