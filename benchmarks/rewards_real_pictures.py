"""Rewards on real recordings: do they order what happened?

Three questions, each with its bar:

- progress trained on six of the eight G1 episodes orders the frames of the other two, over all 28 splits, and calls their reversed
  copies backwards;
- a goal picture's score on two real clips follows the progress a large reward model gave along them, and with that same setting
  orders rice-scooping frames at least 100 apart, three views combined.

Splits that are done are kept in the cache folder, so the run can be cut into pieces (``--seconds``); the JSON says whether it is
complete. Goal scores with other layers and grids are printed beside the setting in use: they show how much rests on that choice.

    python benchmarks/rewards_real_pictures.py --cache ~/.cache/robot_rl_pictures
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from robot_rl import paths
from robot_rl.rewards.features import FeatureConfig, FrameFeatures
from robot_rl.rewards.goal import ends, read_picture, start_goal_projection
from robot_rl.rewards.learned import FitBudget
from robot_rl.rewards.progress_model import Clip, ProgressConfig, fit_progress
from robot_rl.rewards.statistics import spearman, value_order_correlation
from robot_rl.rewards.text import HashedText
from robot_rl.rewards.training import OTHER_TASKS
from robot_rl.vision.encoders import EncoderConfig

CAMERA = "observation.images.real"
EPISODES = (1, 2, 7, 8, 19, 40, 42, 49)
TASK = "Pick up the yellow bottle on the table."
CLIPS = ("berkeley_rpt_stack_cup", "soar_put_green_stick_in_brown_bowl")
RICE = (0, 100, 200, 300, 400, 457)

# The one setting of the goal scores.
SIZE, FIT, LAYER, GRID, ENDS = 128, "squash", 5, 1, 0.1
# Progress: every fifth frame. No split chooses its setting: each of these is run over all 28, and the first is the one that counts.
EVERY, STEPS = 5, 400


@dataclasses.dataclass(frozen=True)
class Setting:
    """What the progress source is trained with."""

    layer: int
    grid: int
    model: ProgressConfig
    why: str

    @property
    def encoder(self) -> dict[str, Any]:
        return {"size": 224, "fit": "squash", "layer": self.layer}


_PUBLISHED = ProgressConfig(width=32, layers=1, components=8, noise=0.3, reverse=0.3, batch=8)
SETTINGS = {
    "published": Setting(13, 2, _PUBLISHED, "SqueezeNet on a 2x2 grid, 8 whitened components, reversed copies with chance 0.3"),
    "newest_frame": Setting(13, 2, dataclasses.replace(_PUBLISHED, frames=1), "the same without memory: a reversed copy is the mirror"),
    "few_components": Setting(
        10, 1, ProgressConfig(width=32, layers=1, components=4, noise=0.3, reverse=0.5, batch=8),
        "earlier choice, made by looking at all eight episodes",
    ),
}  # fmt: skip
BARS = {"voc": 0.8, "voc_reversed": -0.6, "spearman": 0.7, "pairs": 0.9}


def video(path: Path, every: int = 1) -> np.ndarray:
    import av

    with av.open(str(path)) as opened:
        return np.stack([f.to_ndarray(format="rgb24") for i, f in enumerate(opened.decode(video=0)) if i % every == 0])


class Features:
    """Pooled features of named clips, computed once."""

    def __init__(self, data: Path, cache: Path) -> None:
        self.data, self.cache = data, cache
        self._encoders: dict[str, FrameFeatures] = {}

    def __call__(self, name: str, load: Callable[[], np.ndarray], grid: int, **encoder: Any) -> np.ndarray:
        weights = self.data / "squeezenet1_0_imagenet" / "model.safetensors"
        config = FeatureConfig((CAMERA,), EncoderConfig("squeezenet", str(weights), **encoder), grid)
        key = json.dumps(config.to_json(), sort_keys=True)
        file = self.cache / f"{name}_{hashlib.sha256(key.encode()).hexdigest()[:12]}.npy"
        if not file.exists():
            if key not in self._encoders:
                self._encoders[key] = FrameFeatures(config)
            np.save(file, self._encoders[key]({CAMERA: load()}))
        return np.load(file, allow_pickle=False)


def goal_scores(rows: np.ndarray) -> np.ndarray:
    """Share of the way from the first tenth of a clip's frames to the last tenth."""
    n = ends(len(rows), ENDS)
    return start_goal_projection(rows, rows[:n].mean(0), rows[-n:].mean(0))


def goals(features: Features, data: Path, layer: int, grid: int) -> dict[str, Any]:
    out: dict[str, Any] = {"layer": layer, "grid": grid}
    for clip in CLIPS:
        path = data / "reward_clips" / f"{clip}.mp4"
        stored = np.load(data / "reward_clips" / f"{clip}_rewards.npy", allow_pickle=False)
        scores = goal_scores(features(clip, lambda path=path: video(path), grid, size=SIZE, fit=FIT, layer=layer))
        at = np.linspace(0, len(scores) - 1, len(stored)).round().astype(int)
        out[clip] = spearman(scores[at], stored)
    views = []
    for camera in range(3):
        files = [data / "rice_scoop_frames" / f"599-{k}-521-{camera}.jpg" for k in RICE]
        load = lambda files=files: np.stack([read_picture(f) for f in files])  # noqa: E731
        views.append(goal_scores(features(f"rice{camera}", load, grid, size=SIZE, fit=FIT, layer=layer)))
    score = np.mean(views, 0)
    pairs = [(i, j) for i, j in itertools.combinations(range(len(RICE)), 2) if RICE[j] - RICE[i] >= 100]
    out["rice_pairs"] = len(pairs)
    out["rice_right"] = int(sum(score[i] < score[j] for i, j in pairs))
    return out


def split(
    clips: dict[int, Clip], held: tuple[int, int], config: ProgressConfig, others: np.ndarray, seed: int
) -> dict[str, Any]:
    """Train on the other six; both held-out episodes forwards and reversed."""
    model, report = fit_progress(
        [clips[e] for e in EPISODES if e not in held], config, FitBudget(STEPS), others=others, seed=seed
    )
    out: dict[str, Any] = {"held_out": list(held), "seconds": report.seconds}
    for e in held:
        features, text = clips[e].features, clips[e].text
        out[f"voc_{e}"] = value_order_correlation(model.score(features, text))
        out[f"reversed_{e}"] = value_order_correlation(model.score(features[::-1].copy(), text))
    return out


def progress(features: Features, data: Path, cache: Path, name: str, seed: int, until: float) -> dict[str, Any]:
    """One setting over all splits, or as many as there is time for; those done before are read."""
    chosen = SETTINGS[name]
    videos = data / "g1_bottle_lerobot_v21" / "videos" / "chunk-000" / "observation.images.cam_high"
    text = HashedText()
    sentence = text.encode([TASK])[0]
    setting = {
        "encoder": chosen.encoder,
        "grid": chosen.grid,
        "every": EVERY,
        "steps": STEPS,
        **dataclasses.asdict(chosen.model),
    }
    identity = hashlib.sha256(json.dumps([setting, seed], sort_keys=True).encode()).hexdigest()[:12]
    kept = cache / f"splits_{identity}.json"
    done: list[dict[str, Any]] = json.loads(kept.read_text()) if kept.exists() else []
    splits = list(itertools.combinations(EPISODES, 2))
    if len(done) < len(splits) and time.monotonic() < until:
        clips = {}
        for e in EPISODES:
            load = lambda e=e: video(videos / f"episode_{e:06d}.mp4", EVERY)  # noqa: E731
            clips[e] = Clip(features(f"g1_{e}", load, chosen.grid, **chosen.encoder), sentence)
        wrong = text.encode(list(OTHER_TASKS))
        for k in range(len(done), len(splits)):
            if time.monotonic() > until:
                break
            done.append(split(clips, splits[k], chosen.model, wrong, 1000 * seed + k))
            kept.write_text(json.dumps(done))
    forward = {e: [s[f"voc_{e}"] for s in done if e in s["held_out"]] for e in EPISODES}
    backward = {e: [s[f"reversed_{e}"] for s in done if e in s["held_out"]] for e in EPISODES}
    every, back = (list(itertools.chain.from_iterable(d.values())) for d in (forward, backward))
    voc, reverse = (float(np.median(v)) if v else float("nan") for v in (every, back))
    by_episode = {
        e: {"voc": float(np.mean(forward[e])), "reversed": float(np.mean(backward[e]))} for e in EPISODES if forward[e]
    }
    return {
        "name": name, "why": chosen.why, "complete": len(done) == len(splits), "voc": voc, "voc_reversed": reverse,
        "by_episode": by_episode, "splits": done, "setting": setting,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="folder for features and finished splits")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after this long; the next call goes on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS), help="of the progress source")
    arguments = parser.parse_args()
    until = time.monotonic() + arguments.seconds
    torch.set_num_threads(1)
    data, cache = paths.recordings(), arguments.cache.expanduser()
    if not (data / "squeezenet1_0_imagenet").is_dir():
        print(json.dumps({"recordings": "absent", "looked_in": str(data)}))
        return
    cache.mkdir(parents=True, exist_ok=True)
    features = Features(data, cache)
    chosen = goals(features, data, LAYER, GRID)
    others = [
        goals(features, data, layer, grid) for layer in (5, 7, 10, 13) for grid in (1, 2, 4) if (layer, grid) != (LAYER, GRID)
    ]
    g1 = [progress(features, data, cache, name, arguments.seed, until) for name in arguments.settings]
    first = g1[0]
    print(json.dumps({
        "g1": g1,
        "goal": {"setting": {"size": SIZE, "fit": FIT, "ends": ENDS}, **chosen, "other_settings": others},
        "bars": BARS,
        "holds": {
            "voc": first["complete"] and first["voc"] >= BARS["voc"],
            "voc_reversed": first["complete"] and first["voc_reversed"] <= BARS["voc_reversed"],
            "spearman": min(chosen[c] for c in CLIPS) >= BARS["spearman"],
            "pairs": chosen["rice_right"] / chosen["rice_pairs"] >= BARS["pairs"],
        },
    }))  # fmt: skip


if __name__ == "__main__":
    main()
