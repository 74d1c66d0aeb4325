"""A run folder that looks like a real one: a learner that dips, recovers and is gated. Deterministic."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from robot_rl.evaluation.results import EpisodeLine, EvaluationLine, RunResult, append_jsonl, lowest_acting_minus_base, steps_to
from robot_rl.evaluation.statistics import SuccessRate
from robot_rl.runtime.gate import PromotionGate

CONFIG = """\
task:
  env_id: tabletop/PegInsert
  max_episode_steps: 300
head:
  kind: latent_noise
  bound: 1.5
learner:
  critics: 10
  utd: 20
  discount: 0.99
  # everything is resolved: nothing is left to a default
gate:
  margin: 0.05
  alpha: 0.05
  n_min: 10
  n_max: 200
"""


def skill(steps: float) -> float:
    """True success of the newest version: a dip early on, then a climb."""
    dip = 0.22 * math.exp(-(((steps - 18_000) / 9_000) ** 2))
    return 0.42 - dip + 0.56 / (1 + math.exp(-(steps - 62_000) / 13_000))


def draw_video(path: Path, seed: int, success: bool, size: tuple[int, int] = (320, 240), frames: int = 48) -> None:
    """A disc that reaches its goal, or does not."""
    import imageio_ffmpeg

    width, height = size
    rng = np.random.default_rng(seed)
    goal = np.array([0.78, 0.3]) * size
    start = rng.uniform(0.1, 0.4, 2) * size
    yy, xx = np.mgrid[0:height, 0:width]
    writer = imageio_ffmpeg.write_frames(str(path), size, fps=20, codec="libx264", output_params=["-crf", "30"])
    writer.send(None)
    for k in range(frames):
        reach = min(1.0, 1.25 * k / frames) * (1.0 if success else 0.62)
        at = start + (goal - start) * reach
        frame = np.full((height, width, 3), (228, 230, 226), np.uint8)
        frame[int(height * 0.82) :] = (196, 190, 180)
        frame[np.hypot(xx - goal[0], yy - goal[1]) < 0.09 * width] = (120, 130, 140)
        frame[np.hypot(xx - at[0], yy - at[1]) < 0.06 * width] = (200, 80, 30) if not success else (20, 98, 164)
        writer.send(np.ascontiguousarray(frame))
    writer.close()


def make_run(
    folder: Path, *, videos: int = 0, episodes: int = 200, steps: int = 150_000, video_size: tuple[int, int] = (320, 240)
) -> Path:
    """Writes every file of the run folder that the report reads."""
    rng = np.random.default_rng(4)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(CONFIG)
    seeds = [2_001_000 + i for i in range(episodes)]
    starts = {
        s: {
            "peg x (m)": float(rng.uniform(-0.12, 0.12)),
            "peg y (m)": float(rng.uniform(-0.1, 0.1)),
            "hole yaw (rad)": float(rng.uniform(-0.6, 0.6)),
            "friction": float(rng.uniform(0.4, 0.9)),
            "table height (m)": 0.82,
        }
        for s in seeds
    }

    def ease(s: int) -> float:
        p = starts[s]
        return 1.2 - 8.5 * abs(p["peg x (m)"] + 0.03) - 1.9 * abs(p["hole yaw (rad)"])

    stages = ("reach", "grasp", "align")
    outcome: dict[str, dict[int, bool]] = {}
    for who, shift in (("base", -0.25), ("policy", 1.45)):
        outcome[who] = {}
        for s in seeds:
            success = bool(rng.random() < 1 / (1 + math.exp(-3 * (ease(s) + shift))))
            outcome[who][s] = success
            length = int(rng.normal(150 if who == "base" else 96, 22)) if success else 300
            end = "success" if success else "failure" if rng.random() < 0.25 else "time limit"
            stage = "" if success else str(rng.choice(stages, p=[0.12, 0.3, 0.58]))
            append_jsonl(folder / "episodes.jsonl", EpisodeLine(who, s, success, max(20, length), starts[s], end, stage))
    base = SuccessRate.of(sum(outcome["base"].values()), episodes)
    policy = SuccessRate.of(sum(outcome["policy"].values()), episodes)

    gate, true_skill, lines = PromotionGate(), {0: base.rate}, []
    gate.set_reference(round(400 * base.rate), 400)

    def evaluate(step: int, who: str, version: int, p: float) -> None:
        k = base.successes if version == 0 and who == "acting" else int(rng.binomial(200, p))  # fixed seeds: the same starts
        line = EvaluationLine.of(
            k, 200, env_steps=step, wall_seconds=step / 27, who=who, version=version, mode="eval" if version else ""
        )  # fmt: skip
        lines.append(line)
        append_jsonl(folder / "evaluations.jsonl", line)

    line = EvaluationLine.of(base.successes, base.n, env_steps=0, wall_seconds=0.0, who="base")
    lines.append(line)
    append_jsonl(folder / "evaluations.jsonl", line)
    evaluate(0, "untrained_head", 0, base.rate - 0.02)
    version = 0
    for step in range(0, steps + 1, 2_500):
        if step >= 10_000 and step % 5_000 == 0:
            version += 1
            true_skill[version] = min(0.985, max(0.05, skill(step) + float(rng.normal(0, 0.03))))
            events = gate.submit(version, "eval")
            if version == 12:
                true_skill[version] = 0.2  # damaged after its probation
            played = true_skill[version] if version != 12 else 0.9
            while gate.on_probation is not None:
                events += gate.record(gate.on_probation, bool(rng.random() < played))
            for event in events:
                append_jsonl(folder / "gate.jsonl", event.to_json(env_steps=step))
            evaluate(step, "policy", version, true_skill[version])
        for _ in range(30):
            for event in gate.record_acting(bool(rng.random() < true_skill[gate.acting])):
                append_jsonl(folder / "gate.jsonl", event.to_json(env_steps=step + 1_200))
        if step % 7_500 == 0:
            evaluate(step, "acting", gate.acting, true_skill[gate.acting])
    for step in range(0, steps + 1, 500):
        u = step / steps
        row = {
            "env_steps": step, "updates": step * 2, "wall_seconds": step / 27,
            "critic_loss": float(0.9 * math.exp(-4 * u) + 0.05 + abs(rng.normal(0, 0.05)) + 1.2 * (rng.random() < 0.01)),
            "actor_loss": float(-3 * u + rng.normal(0, 0.2)), "alpha": float(max(0.02, math.exp(-6 * u))),
            "q_mean": float(skill(step) * 0.8 + rng.normal(0, 0.02)), "steps_per_second": float(27 + rng.normal(0, 1.5)),
            "q_std": float(0.05 + 0.1 * math.exp(-3 * u)), "head_share": float(min(1.0, u * 2)),
        }  # fmt: skip
        append_jsonl(folder / "metrics.jsonl", row)
    acting = [line for line in lines if line.who == "acting"]
    RunResult(
        task="Insert the peg into the hole", base=base, policy=policy, env_steps=steps, wall_seconds=steps / 27,
        steps_to=steps_to((line.env_steps, line.rate) for line in acting),
        lowest_acting_minus_base=lowest_acting_minus_base(lines),
        config_hash="9f31c2e07ab4", run_seed=0, seeds={"first": seeds[0], "last": seeds[-1], "count": len(seeds)},
        extra={
            "env_id": "tabletop/PegInsert", "versions": {"robot_rl": "0.1.0", "torch": "2.10.0", "mujoco": "3.8.1"},
            "machine": {"cpu": "AMD EPYC, 2 cores", "gpu": "none"},
        },
    ).save(folder / "result.json")  # fmt: skip
    if videos:
        (folder / "videos").mkdir(exist_ok=True)
        turned = [s for s in seeds if outcome["policy"][s] and not outcome["base"][s]][:videos]
        for s in turned:
            for who in ("base", "policy"):
                draw_video(folder / "videos" / f"{who}_{s}.mp4", s, outcome[who][s], video_size)
    return folder


if __name__ == "__main__":
    import sys

    from robot_rl.evaluation.report import write_report

    print(write_report(make_run(Path(sys.argv[1]), videos=2)))
