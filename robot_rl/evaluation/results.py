"""The lines and files of a run folder that evaluation writes and the report reads (``docs/architecture.md``, "The run folder").

JSON-lines files are append-safe: a process killed in the middle of a line leaves a torn tail, which reading ignores and the
next append removes. A damaged line anywhere else is an error, because it would silently drop data.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from robot_rl.evaluation.statistics import Interval, SuccessRate

WHO_EVALUATED = ("acting", "base", "untrained_head", "zero_noise", "policy")
WHO_EPISODE = ("base", "policy")
ENDS = ("success", "time limit", "failure")


def _finite(value: Any) -> Any:
    """NaN and infinities as None: JSON has neither."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    if hasattr(value, "item") and callable(value.item) and getattr(value, "ndim", 0) == 0:
        return _finite(value.item())  # numpy scalars
    return value


def append_jsonl(path: str | Path, line: Mapping[str, Any] | Any) -> None:
    """Append one line (a mapping, or anything with ``to_json``), after removing a torn tail a killed writer may have left."""
    data = line if isinstance(line, Mapping) else line.to_json()
    text = (json.dumps(_finite(data), allow_nan=False) + "\n").encode()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    with os.fdopen(descriptor, "r+b") as file:
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(end - 1)
            if file.read(1) != b"\n":
                file.seek(0)
                end = file.read().rfind(b"\n") + 1
                file.truncate(end)
        file.seek(end)
        file.write(text)


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Every whole line; a missing file is empty, a torn last line is ignored.

    Raises:
        ValueError: a line other than a torn last one is not a JSON object (the line is named).
    """
    path = Path(path)
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = []
    raw = path.read_bytes()
    lines = raw.split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        torn = number == len(lines)  # what follows the last newline was never finished
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("not an object")
        except ValueError as error:
            if torn:
                break
            raise ValueError(f"{path.name} line {number}: {error}") from error
        rows.append(row)
    return rows


def _require(row: Mapping[str, Any], names: Sequence[str], where: str) -> None:
    missing = [n for n in names if n not in row]
    if missing:
        raise ValueError(f"{where}: missing {', '.join(missing)}")


def _choice(where: str, name: str, value: Any, accepted: Sequence[str]) -> None:
    if value not in accepted:
        raise ValueError(f"{where}: {name}={value!r}: accepted are {', '.join(accepted)}")


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


@dataclass(frozen=True)
class EvaluationLine:
    """One evaluation of one policy on held-out seeds: a point of the learning curve."""

    env_steps: int
    wall_seconds: float
    who: str
    version: int
    mode: str
    successes: int
    n: int
    interval: Interval

    @property
    def rate(self) -> float:
        return self.successes / self.n if self.n else float("nan")

    @classmethod
    def of(
        cls, successes: int, n: int, *, env_steps: int, wall_seconds: float, who: str, version: int = 0, mode: str = ""
    ) -> EvaluationLine:
        """Builds the line with its Wilson interval. Raises ValueError for an unknown ``who``."""
        _choice("evaluations.jsonl", "who", who, WHO_EVALUATED)
        return cls(env_steps, wall_seconds, who, version, mode, successes, n, SuccessRate.of(successes, n).interval)

    def to_json(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)} | {"interval": list(self.interval)}

    @classmethod
    def from_json(cls, row: Mapping[str, Any], where: str = "evaluations.jsonl") -> EvaluationLine:
        _require(row, ("env_steps", "who", "successes", "n"), where)
        k, n = int(row["successes"]), int(row["n"])
        given = row.get("interval")
        return cls(
            env_steps=int(row["env_steps"]),
            wall_seconds=_number(row.get("wall_seconds")),
            who=str(row["who"]),
            version=int(row.get("version", 0)),
            mode=str(row.get("mode", "")),
            successes=k,
            n=n,
            interval=Interval(float(given[0]), float(given[1])) if given else SuccessRate.of(k, n).interval,
        )


@dataclass(frozen=True)
class GateLine:
    """One decision of the promotion gate (``runtime/gate.py``) and when it was made."""

    env_steps: int
    event: str
    version: int
    successes: int
    n: int
    lower: float
    upper: float
    reference: float
    mode: str = ""
    acting: int = -1
    reason: str = ""

    @classmethod
    def from_json(cls, row: Mapping[str, Any], where: str = "gate.jsonl") -> GateLine:
        _require(row, ("env_steps", "event", "version"), where)
        return cls(
            int(row["env_steps"]), str(row["event"]), int(row["version"]), int(row.get("successes", 0)), int(row.get("n", 0)),
            _number(row.get("lower")), _number(row.get("upper")), _number(row.get("reference")),
            str(row.get("mode", "")), int(row.get("acting", -1)), str(row.get("reason", "")),
        )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True)
class EpisodeLine:
    """One held-out start, played by one policy, in the final evaluation.

    ``start`` names the numbers that describe the start state; ``stage`` is the furthest stage reached, where the task says so.
    """

    who: str
    seed: int
    success: bool
    length: int
    start: Mapping[str, float] = field(default_factory=dict)
    end: str = ""
    stage: str = ""

    def to_json(self) -> dict[str, Any]:
        row = {f.name: getattr(self, f.name) for f in fields(self)} | {"start": dict(self.start)}
        return row if self.stage else {k: v for k, v in row.items() if k != "stage"}

    @classmethod
    def from_json(cls, row: Mapping[str, Any], where: str = "episodes.jsonl") -> EpisodeLine:
        _require(row, ("who", "seed", "success"), where)
        start = {str(k): _number(v) for k, v in (row.get("start") or {}).items()}
        success = bool(row["success"])
        end = str(row.get("end") or ("success" if success else "failure"))
        return cls(str(row["who"]), int(row["seed"]), success, int(row.get("length", 0)), start, end, str(row.get("stage", "")))


Line = TypeVar("Line", EvaluationLine, GateLine, EpisodeLine)


def load_lines(kind: type[Line], path: str | Path) -> list[Line]:
    """Every line of one file as ``kind``. Raises ValueError naming the file and the line that is wrong."""
    name = Path(path).name
    out: list[Line] = []
    for number, row in enumerate(read_jsonl(path), start=1):
        where = f"{name} line {number}"
        try:
            out.append(kind.from_json(row, where))
        except (TypeError, ValueError, AttributeError, IndexError) as error:
            raise error if where in str(error) else ValueError(f"{where}: {error}") from error
    return out


def steps_to(curve: Iterable[tuple[int, float]], thresholds: Sequence[float] = (0.5, 0.75, 0.9)) -> dict[str, int | None]:
    """Environment steps at the first point of the curve that reaches each threshold, or None where none does.

    Args:
        curve: (env_steps, success rate), in any order.

    Returns:
        threshold in percent (``"50"``) to env steps.
    """
    points = sorted(curve)
    return {f"{100 * t:g}": next((int(steps) for steps, rate in points if rate >= t - 1e-12), None) for t in thresholds}


def lowest_acting_minus_base(lines: Iterable[EvaluationLine]) -> float | None:
    """The dip: lowest success of the acting policy over the run minus the base's (pooled); None without both."""
    acting, wins, n = [], 0, 0
    for line in lines:
        if line.who == "acting" and line.n:
            acting.append(line.rate)
        elif line.who == "base":
            wins, n = wins + line.successes, n + line.n
    return min(acting) - wins / n if acting and n else None


@dataclass(frozen=True)
class RunResult:
    """``result.json``: what a run achieved, for machines."""

    task: str
    base: SuccessRate
    policy: SuccessRate
    env_steps: int
    wall_seconds: float
    steps_to: Mapping[str, int | None]
    lowest_acting_minus_base: float | None
    config_hash: str
    run_seed: int
    seeds: Mapping[str, Any] | Sequence[int] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        row = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "extra"}
        row |= {"base": self.base.to_json(), "policy": self.policy.to_json(), "steps_to": dict(self.steps_to)}
        row["seeds"] = dict(self.seeds) if isinstance(self.seeds, Mapping) else list(self.seeds)
        return {**dict(self.extra), **row}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> RunResult:
        _require(row, ("base", "policy", "env_steps"), "result.json")
        known = {f.name for f in fields(cls)}
        lowest = row.get("lowest_acting_minus_base")
        return cls(
            task=str(row.get("task", "")),
            base=_rate(row["base"], "result.json base"),
            policy=_rate(row["policy"], "result.json policy"),
            env_steps=int(row["env_steps"]),
            wall_seconds=_number(row.get("wall_seconds")),
            steps_to=dict(row.get("steps_to") or {}),
            lowest_acting_minus_base=None if lowest is None else float(lowest),
            config_hash=str(row.get("config_hash", "")),
            run_seed=int(row.get("run_seed", 0)),
            seeds=row.get("seeds", ()),
            extra={k: v for k, v in row.items() if k not in known},
        )

    def save(self, path: str | Path) -> None:
        """Write atomically."""
        path = Path(path)
        temporary = path.with_name(path.name + ".tmp")
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(_finite(self.to_json()), file, indent=2, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: str | Path) -> RunResult:
        """Raises ValueError when it is not a result file."""
        try:
            row = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{Path(path).name}: {error}") from error
        return cls.from_json(row)


def _rate(row: Mapping[str, Any], where: str) -> SuccessRate:
    _require(row, ("n",), where)
    n = int(row["n"])
    if "successes" in row:
        k = int(row["successes"])
    else:
        _require(row, ("success",), where)
        k = round(_number(row["success"]) * n)
    given = row.get("interval")
    made = SuccessRate.of(k, n)
    return SuccessRate(
        k, n, Interval(float(given[0]), float(given[1])) if given else made.interval, str(row.get("method", "wilson"))
    )
