"""The episode store and replay buffer against raw zarr and HDF5: what a step, a commit and a batch cost.

Ours and the peers run in turns in one process; times are medians over the turns. Prints one JSON object.

    python benchmarks/store.py                # about a minute
    python benchmarks/store.py --kills 200    # and kill -9 a writer that often
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import store_kill

from robot_rl.replay import EpisodeStore, ReplayBuffer, WindowConfig
from robot_rl.replay.files import tree_bytes
from robot_rl.replay.writer import EpisodeWriter
from robot_rl.runtime.chunk_scheduler import ChunkScheduler
from robot_rl.runtime.control_loop import ControlLoop
from robot_rl.runtime.safety import SafetyConfig, SafetyFilter
from robot_rl.types import ActionSpec, Decision, Episode, EpisodeMeta, FeatureSpec, Step

STATE, ACTIONS = 32, 7
LOW = {"observation.state": FeatureSpec((STATE,))}
IMAGES = {**LOW, **{f"observation.images.{c}": FeatureSpec((96, 96, 3), "uint8") for c in ("front", "wrist")}}
ACTION = ActionSpec((-1,) * ACTIONS, (1,) * ACTIONS)


def observations(features: dict[str, FeatureSpec], length: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Numbers, and frames as a camera gives them: a smooth scene, a moving thing, a little sensor noise."""
    out = {}
    y, x = np.mgrid[:96, :96]
    for name, spec in features.items():
        if spec.dtype != "uint8":
            out[name] = rng.normal(size=(length, *spec.shape)).astype(np.float32)
            continue
        scene = 120 + 60 * np.sin(x / 17 + rng.normal()) + 40 * np.cos(y / 11 + rng.normal())
        frames = np.repeat(scene[None, :, :, None], length, 0).repeat(3, -1)
        for t in range(length):
            frames[t, 20:40, t % 70 : t % 70 + 20] = (200, 40, 40)
        out[name] = np.clip(frames + rng.normal(0, 1.0, frames.shape), 0, 255).astype(np.uint8)
    return out


def steps(features: dict[str, FeatureSpec], length: int, rng: np.random.Generator) -> list[Step]:
    rows = observations(features, length + 1, rng)
    actions = rng.uniform(-1, 1, (length + 1, ACTIONS)).astype(np.float32)
    return [
        Step(
            {k: v[t] for k, v in rows.items()},
            actions[t],
            action_base=actions[t],
            action_policy=actions[t],
            reward=0.0,
            stamp_ns=t,
        )
        for t in range(length + 1)
    ]


def ours(folder: Path, features: dict[str, FeatureSpec], rows: list[Step], rate_hz: float) -> dict[str, Any]:
    length = len(rows) - 1
    with EpisodeStore.create(folder, observation_features=features, action=ACTION) as store:
        writer = store.begin(EpisodeMeta(""))
        times = []
        for step in rows[:-1]:
            begin = time.perf_counter()
            writer.append(step)
            times.append(time.perf_counter() - begin)
            if rate_hz:
                time.sleep(1 / rate_hz)
        begin = time.perf_counter()
        writer.commit(rows[-1].observation, background=True)
        handed = time.perf_counter() - begin
        store.flush()
        done = time.perf_counter() - begin
        begin = time.perf_counter()
        episode = store.read(store.episode_ids()[0])
        read = time.perf_counter() - begin
        raw = sum(v.nbytes for k, v in episode.observations.items() if v.dtype == np.uint8)
        disk = sum(tree_bytes(p) for p in (folder / "episodes").glob("*/observation.images.*"))
    return {
        "append_us_p50": np.percentile(times, 50) * 1e6, "append_us_p99": np.percentile(times, 99) * 1e6,
        "commit_on_control_thread_ms": handed * 1e3, "commit_durable_ms": done * 1e3, "read_ms": read * 1e3, "steps": length,
        **({"images_disk_over_raw": disk / raw} if raw else {}),
    }  # fmt: skip


class Timed:
    """A recorder that notes what each ``append`` took."""

    def __init__(self, writer: EpisodeWriter):
        self.writer = writer
        self.seconds: list[float] = []
        self.decide = writer.decide

    def append(self, step: Step) -> None:
        begin = time.perf_counter()
        self.writer.append(step)
        self.seconds.append(time.perf_counter() - begin)


def in_the_loop(rate_hz: float, length: int) -> dict[str, Any]:
    """What ``append`` costs the real control loop (chunks, arbiter, safety filter) at its pace: a message is read, logged, answered."""
    rng = np.random.default_rng(0)
    loop = ControlLoop(ACTION, ChunkScheduler(ACTION, 8), SafetyFilter(SafetyConfig(), ACTION, rate_hz))
    received = rng.normal(size=(length + 1, STATE))
    chunk = np.zeros((8, ACTIONS), np.float32)
    turns = []
    with (
        tempfile.TemporaryDirectory() as folder,
        EpisodeStore.create(Path(folder) / "s", observation_features=LOW, action=ACTION) as store,
    ):
        recorder = Timed(store.begin(EpisodeMeta("")))
        loop.begin({"observation.state": received[0].astype(np.float32)}, key=("benchmark",), recorder=recorder)  # type: ignore[arg-type]
        due = time.perf_counter()
        for t in range(length):
            if loop.wants_chunk:
                loop.accept(Decision(loop.step, None, chunk, chunk))
            loop.tick()
            due += 1 / rate_hz
            time.sleep(max(0.0, due - time.perf_counter()))
            begin = time.perf_counter()
            loop.observe({"observation.state": received[t + 1].astype(np.float32)}, 0.0, False, False)
            turns.append(time.perf_counter() - begin)
        recorder.writer.abort()
    return {
        "rate_hz": rate_hz,
        "append_us_p50": round(float(np.percentile(recorder.seconds, 50)) * 1e6, 2),
        "append_us_p99": round(float(np.percentile(recorder.seconds, 99)) * 1e6, 2),
        "observe_us_p50": round(float(np.percentile(turns, 50)) * 1e6, 2),
        "steps": length,
    }


def raw_zarr(folder: Path, features: dict[str, FeatureSpec], rows: list[Step], rate_hz: float) -> dict[str, Any]:
    """One zarr array per field, resized and written at every step (no durability asked for)."""
    import zarr

    group = zarr.open_group(folder, mode="w")
    shapes = {"action": ((ACTIONS,), "float32"), **{k: (f.shape, f.dtype) for k, f in features.items()}}
    arrays = {k: group.create_array(k, shape=(0, *s), chunks=(100, *s), dtype=d) for k, (s, d) in shapes.items()}
    times = []
    for t, step in enumerate(rows[:-1]):
        begin = time.perf_counter()
        for name, array in arrays.items():
            value = step.action if name == "action" else step.observation[name]
            array.resize((t + 1, *value.shape))
            array[t] = value
        times.append(time.perf_counter() - begin)
    return {"append_us_p50": np.percentile(times, 50) * 1e6, "append_us_p99": np.percentile(times, 99) * 1e6}


def raw_h5py(folder: Path, features: dict[str, FeatureSpec], rows: list[Step], rate_hz: float) -> dict[str, Any]:
    """robomimic's way: resizable datasets, one file (no durability asked for)."""
    import h5py

    times = []
    with h5py.File(folder, "w") as file:
        shapes = {"action": ((ACTIONS,), "float32"), **{k: (f.shape, f.dtype) for k, f in features.items()}}
        data = {k: file.create_dataset(k, (0, *s), d, maxshape=(None, *s), chunks=(100, *s)) for k, (s, d) in shapes.items()}
        for t, step in enumerate(rows[:-1]):
            begin = time.perf_counter()
            for name, dataset in data.items():
                dataset.resize(t + 1, 0)
                dataset[t] = step.action if name == "action" else step.observation[name]
            times.append(time.perf_counter() - begin)
    return {"append_us_p50": np.percentile(times, 50) * 1e6, "append_us_p99": np.percentile(times, 99) * 1e6}


def in_turns(turns: int, length: int, features: dict[str, FeatureSpec], rate_hz: float) -> dict[str, Any]:
    runs: dict[str, Callable[..., dict[str, Any]]] = {"robot_rl": ours, "zarr": raw_zarr, "h5py": raw_h5py}
    found: dict[str, list[dict[str, Any]]] = {}
    for turn in range(turns):
        rows = steps(features, length, np.random.default_rng(turn))
        for name, run in runs.items():
            with tempfile.TemporaryDirectory() as folder:
                try:
                    found.setdefault(name, []).append(run(Path(folder) / "x", features, rows, rate_hz))
                except ImportError:
                    found[name] = []
    return {
        name: {k: round(statistics.median(r[k] for r in results), 3) for k in results[0]} if results else "absent"
        for name, results in found.items()
    }


def sampling(batches: int) -> dict[str, Any]:
    """256 windows of 16 steps from 100,000 low-dimensional steps, in two strata."""
    rng = np.random.default_rng(0)
    window = WindowConfig(16, 0.97)
    buffer = ReplayBuffer(110_000, conditioning_dim=STATE, action_dim=ACTIONS, window=window, delta_mask=[False] * ACTIONS)
    for i in range(500):
        stratum = ("online", "demonstration")[i % 2]
        action = rng.uniform(-1, 1, (200, ACTIONS)).astype(np.float32)
        end = np.arange(200) == 199
        episode = Episode.from_arrays(EpisodeMeta(str(i)), {}, action, reward=end.astype(np.float32), terminated=end)
        buffer.add(episode, rng.normal(size=(201, STATE)).astype(np.float32), action, stratum=stratum)
    out = {}
    for name, ratios in (("uniform", None), ("half_and_half", {"online": 0.5, "demonstration": 0.5})):
        times = []
        for _ in range(batches):
            begin = time.perf_counter()
            buffer.sample(256, rng, ratios)
            times.append(time.perf_counter() - begin)
        out[f"{name}_us_p50"] = round(statistics.median(times) * 1e6, 1)
    return out


def start_up(episodes: int) -> dict[str, Any]:
    """Opening a store of many episodes and listing them."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        with EpisodeStore.create(Path(folder) / "s", observation_features=LOW, action=ACTION, sync=False) as store:
            for i in range(episodes):
                action = rng.uniform(-1, 1, (50, ACTIONS))
                store.add(Episode.from_arrays(EpisodeMeta(f"e{i}"), observations(LOW, 51, rng), action))
        begin = time.perf_counter()
        count = len(EpisodeStore.open(Path(folder) / "s").episode_ids())
        return {"episodes": count, "seconds": round(time.perf_counter() - begin, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200, help="of an episode")
    parser.add_argument("--rate", type=float, default=200.0, help="control rate of the writer in Hz; 0: as fast as it goes")
    parser.add_argument("--episodes", type=int, default=1000, help="in the start-up measurement")
    parser.add_argument("--kills", type=int, default=0)
    options = parser.parse_args()
    result: dict[str, Any] = {
        "control_loop": [in_the_loop(rate, options.steps) for rate in (20.0, 50.0, 200.0)],
        "low_dim": in_turns(options.turns, options.steps, LOW, options.rate),
        "images_2x96x96": in_turns(options.turns, options.steps, IMAGES, options.rate),
        "sample_256_windows_of_16": sampling(500),
        "start_up": start_up(options.episodes),
    }
    if options.kills:
        with tempfile.TemporaryDirectory() as folder:
            result["kill_9"] = store_kill.run(Path(folder) / "store", options.kills, seed=0)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
