"""What a run folder says about its run, read once for its report."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from robot_rl.evaluation.results import EpisodeLine, EvaluationLine, GateLine, RunResult, load_lines, read_jsonl
from robot_rl.evaluation.statistics import PairedComparison, SuccessRate, paired_comparison


@dataclass
class RunRecord:
    """What a run folder holds, as far as it is there."""

    path: Path
    result: RunResult | None
    evaluations: list[EvaluationLine]
    gate: list[GateLine]
    episodes: list[EpisodeLine]
    metrics: list[dict[str, Any]]
    config_text: str
    videos: dict[tuple[str, int], Path] = field(default_factory=dict)

    @classmethod
    def load(cls, run_dir: str | Path) -> RunRecord:
        """Raises FileNotFoundError when there is no such folder, ValueError when a file in it is damaged (it is named)."""
        path = Path(run_dir)
        if not path.is_dir():
            raise FileNotFoundError(f"{path} is not a run folder")
        result, config = path / "result.json", path / "config.yaml"
        videos: dict[tuple[str, int], Path] = {}
        for file in sorted((path / "videos").glob("*.mp4")):
            who, _, seed = file.stem.rpartition("_")
            if who in ("base", "policy") and seed.isdigit():
                videos[who, int(seed)] = file
        return cls(
            path=path,
            result=RunResult.load(result) if result.exists() else None,
            evaluations=load_lines(EvaluationLine, path / "evaluations.jsonl"),
            gate=load_lines(GateLine, path / "gate.jsonl"),
            episodes=load_lines(EpisodeLine, path / "episodes.jsonl"),
            metrics=read_jsonl(path / "metrics.jsonl"),
            config_text=config.read_text(encoding="utf-8", errors="replace") if config.exists() else "",
            videos=videos,
        )

    def outcomes(self, who: str) -> dict[int, EpisodeLine]:
        """Seed to episode of the final evaluation."""
        return {e.seed: e for e in self.episodes if e.who == who}

    @property
    def task(self) -> str:
        return self.result.task if self.result is not None else ""

    @property
    def base_rate(self) -> SuccessRate | None:
        if self.result is not None:
            return self.result.base
        return self._rate("base")

    @property
    def policy_rate(self) -> SuccessRate | None:
        if self.result is not None:
            return self.result.policy
        if rate := self._rate("policy"):
            return rate
        acting = [e for e in self.evaluations if e.who == "acting"]
        return SuccessRate.of(acting[-1].successes, acting[-1].n) if acting else None

    def _rate(self, who: str) -> SuccessRate | None:
        episodes = self.outcomes(who)
        if episodes:
            return SuccessRate.of(sum(e.success for e in episodes.values()), len(episodes))
        lines = [e for e in self.evaluations if e.who == who]
        return SuccessRate.of(sum(e.successes for e in lines), sum(e.n for e in lines)) if lines else None

    def paired(self) -> PairedComparison | None:
        """Base against policy on the starts that both played."""
        base, policy = self.outcomes("base"), self.outcomes("policy")
        common = base.keys() & policy.keys()
        if not common:
            return None
        return paired_comparison({s: policy[s].success for s in common}, {s: base[s].success for s in common})

    @property
    def env_steps(self) -> int:
        if self.result is not None:
            return self.result.env_steps
        return max([e.env_steps for e in self.evaluations] + [int(m.get("env_steps") or 0) for m in self.metrics], default=0)

    @property
    def wall_seconds(self) -> float:
        if self.result is not None:
            return self.result.wall_seconds
        known = [e.wall_seconds for e in self.evaluations] + [float(m.get("wall_seconds") or 0.0) for m in self.metrics]
        return max((w for w in known if math.isfinite(w)), default=float("nan"))
