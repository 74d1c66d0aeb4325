"""What late chunks cost, and what each way of joining them saves: none, linear, real-time chunking (rtc), side by side on one task.

A chunk computed from step t arrives d control steps later, as behind a slow policy; the arm goes on with the rows of the chunk
before. Every way plays the same starts with the same noise. Prints one JSON object: success, steps to it, and how far the command
jumps where one chunk follows another (norm over the dimensions that are no gripper, in half ranges), beside what it moves between
rows of one chunk.

    python benchmarks/chunk_joins.py --policy runs/quickstart/base --env tabletop/Lift --delays 0 2 4 --episodes 200
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from robot_rl import seeding
from robot_rl.evaluation.statistics import SuccessRate
from robot_rl.policies.loading import load_policy
from robot_rl.runtime.acting import ActingPolicy
from robot_rl.runtime.control_loop import ControlLoop
from robot_rl.sim.env import EnvSpec
from robot_rl.sim.rollout import EpisodePlan, Rollout
from robot_rl.sim.vector import VectorEnv, make_vector
from robot_rl.training.build import open_store
from robot_rl.types import Decision, Episode

JOINS = ("none", "linear", "rtc")


class LateRollout(Rollout):
    """Decisions arrive ``delay`` control steps after they were asked for."""

    def __init__(self, vector: VectorEnv, spec: EnvSpec, delay: int, margin: int, join: str, blend_steps: int) -> None:
        super().__init__(vector, spec)
        self.delay, self.margin, self.join, self.blend_steps = delay, margin, join, blend_steps
        self._coming: dict[int, tuple[int, Decision]] = {}

    def _loop(self, policy: ActingPolicy, person: Any = None) -> ControlLoop:
        loop = super()._loop(policy, person)
        loop.scheduler.replan_margin = self.delay + self.margin
        loop.scheduler.blend_steps = self.blend_steps if self.join == "linear" else 0
        return loop

    def _decide(self, slots: dict[int, Any]) -> None:
        self._coming = {i: c for i, c in self._coming.items() if i in slots and slots[i].loop.step > 0}
        asking = [i for i, s in slots.items() if s.loop.wants_chunk and i not in self._coming]
        if asking:
            frozen = self.delay if self.join == "rtc" else None
            requests = [slots[i].loop.request(frozen) for i in asking]
            decisions = slots[asking[0]].plan.policy.decide(requests)
            self._coming |= {i: (r.step + self.delay, d) for i, r, d in zip(asking, requests, decisions, strict=True)}
        for i in [i for i, (due, _) in self._coming.items() if slots[i].loop.step >= due or slots[i].loop.step == 0]:
            slots[i].loop.accept(self._coming.pop(i)[1])  # an episode's first chunk is waited for


def jumps(episode: Episode, scale: np.ndarray) -> tuple[list[float], list[float]]:
    """How far the command moves from one step to the next: where a chunk follows another, and inside of one."""
    moved = np.linalg.norm(np.diff(episode.action, axis=0) * scale, axis=1)
    here, there = episode.decision_id[:-1], episode.decision_id[1:]
    runs = (here >= 0) & (there >= 0)
    return moved[runs & (here != there)].tolist(), moved[runs & (here == there)].tolist()


def measure(policy: ActingPolicy, env: str, delay: int, join: str, given: argparse.Namespace) -> dict[str, Any]:
    vector = make_vector(env, given.robots)
    assert isinstance(vector, VectorEnv)
    spec = vector.envs[0].spec
    rollout = LateRollout(vector, spec, delay, given.margin, join, given.blend_steps)
    half = (np.asarray(spec.action.high) - np.asarray(spec.action.low)) / 2.0
    scale = np.where(spec.action.gripper_mask, 0.0, 1.0 / half)
    seeds = seeding.GATE.take(given.episodes)
    plans = [EpisodePlan(s, ("joins", s), policy, episode_id=f"e{s}") for s in seeds]
    with tempfile.TemporaryDirectory() as folder, open_store(Path(folder) / "store", policy.base.spec) as store:
        outcomes = rollout.play(plans, store=store, keep_episodes=True)
    vector.close()
    between: list[float] = []
    within: list[float] = []
    for o in outcomes:
        assert o.episode is not None
        at_joins, inside = jumps(o.episode, scale)
        between += at_joins
        within += inside
    won = [o for o in outcomes if o.success]
    return {
        "delay": delay, "join": join, **SuccessRate.of(len(won), len(outcomes)).to_json(),
        "mean_steps_of_successes": float(np.mean([o.length for o in won])) if won else None,
        "jump_p50": float(np.median(between)) if between else None, "jump_p95": float(np.quantile(between, 0.95)) if between else None,
        "inside_p50": float(np.median(within)), "inside_p95": float(np.quantile(within, 0.95)),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", required=True, help="folder of a base policy")
    parser.add_argument("--env", default="tabletop/Lift")
    parser.add_argument("--delays", type=int, nargs="+", default=[0, 2, 4])
    parser.add_argument("--joins", nargs="+", choices=JOINS, default=list(JOINS))
    parser.add_argument("--margin", type=int, default=2, help="rows left beyond the delay when the next chunk is asked for")
    parser.add_argument("--blend-steps", type=int, default=4)
    parser.add_argument("--episodes", type=int, default=200)
    parser.add_argument("--robots", type=int, default=25)
    given = parser.parse_args()
    policy = ActingPolicy(load_policy(given.policy, "cpu"))
    if "rtc" in given.joins and (reason := policy.cannot_continue()):
        parser.error(f"--joins=rtc: {reason}; accepted are none, linear")
    rows = [measure(policy, given.env, delay, join, given) for delay in given.delays for join in given.joins]
    print(
        json.dumps({"benchmark": "chunk_joins", "policy": policy.base.spec.sampler, "env": given.env, "rows": rows}, indent=2)
    )


if __name__ == "__main__":
    main()
