"""How many frames a second the classifier and progress sources score, of two 224x224 cameras, on one core.

Frames come one at a time, as a running robot's do. Prints one JSON object; every source must keep up with 30 a second.

    python benchmarks/rewards_speed.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from robot_rl import paths
from robot_rl.rewards import FrameBatch, RewardSource
from robot_rl.rewards.classifier import ClassifierSource, save_classifier
from robot_rl.rewards.classifier_model import ClassifierConfig, SuccessClassifier, camera_maps
from robot_rl.rewards.features import FeatureConfig, FrameFeatures
from robot_rl.rewards.progress import ProgressSource, save_progress
from robot_rl.rewards.progress_model import ProgressConfig, ProgressModel
from robot_rl.rewards.text import HashedText
from robot_rl.vision.encoders import EncoderConfig

CAMERAS = ("observation.images.front", "observation.images.wrist")
SIDE, HZ = 224, 30.0


def sources(encoder: EncoderConfig, folder: Path) -> dict[str, RewardSource]:
    """Both sources with fresh weights: what they cost does not depend on what they learned."""
    features = FrameFeatures(FeatureConfig(CAMERAS, encoder, 2))
    blank = np.zeros((1, SIDE, SIDE, 3), np.uint8)
    config = ClassifierConfig()
    maps = camera_maps(features.encoder, blank, config)
    save_classifier(folder / "clf", SuccessClassifier(2, maps.shape[1], (maps.shape[2], maps.shape[3]), config), features)
    text = HashedText()
    save_progress(folder / "progress", ProgressModel(features.dim, text.dim, ProgressConfig()), features, text)
    return {
        "classifier": ClassifierSource(str(folder / "clf")),
        "progress": ProgressSource(str(folder / "progress"), instruction="pick up the bottle"),
    }


def score(source: RewardSource, frames: list[np.ndarray]) -> list[float]:
    """Seconds for every frame."""
    taken = []
    for k, frame in enumerate(frames):
        batch = FrameBatch(
            {c: frame[i : i + 1] for i, c in enumerate(CAMERAS)}, np.array([k]), np.array([k * 33_000_000]), "", "e"
        )
        began = time.perf_counter()
        source.score(batch)
        taken.append(time.perf_counter() - began)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=300)
    count = parser.parse_args().frames
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 255, (2, SIDE, SIDE, 3), np.uint8) for _ in range(16)]
    weights = paths.recordings() / "squeezenet1_0_imagenet" / "model.safetensors"
    encoders: dict[str, EncoderConfig | None] = {"small_conv": EncoderConfig("small_conv", size=112)}
    encoders["squeezenet"] = EncoderConfig("squeezenet", str(weights), size=112, layer=10) if weights.is_file() else None
    out: dict[str, Any] = {"cameras": 2, "side": SIDE, "threads": torch.get_num_threads(), "frames": count}
    with tempfile.TemporaryDirectory() as folder:
        for name, encoder in encoders.items():
            if encoder is None:
                out[name] = "absent"
                continue
            made = sources(encoder, Path(folder) / name)
            for source in made.values():
                score(source, frames)
            rounds: dict[str, list[float]] = {k: [] for k in made}
            for _ in range(3):  # in turns
                for k, source in made.items():
                    rounds[k] += score(source, [frames[i % 16] for i in range(count // 3)])
            out[name] = {
                k: {
                    "frames_per_s": 1.0 / statistics.mean(v), "median_ms": 1e3 * statistics.median(v),
                    "p99_ms": 1e3 * float(np.percentile(v, 99)), "holds": 1.0 / statistics.mean(v) >= HZ,
                }
                for k, v in rounds.items()
            }  # fmt: skip
    print(json.dumps(out))


if __name__ == "__main__":
    main()
