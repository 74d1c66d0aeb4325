"""Real recordings through a store to LeRobot's own loader and back: what is equal, and what the video codec changed.

The episodes of ``g1_bottle_lerobot_v21`` that are there (``$ROBOT_RL_DATA``, by default ``../shared/data``) are imported into an episode
store, exported to LeRobot v3, loaded with LeRobot's ``LeRobotDataset`` and imported again. Vectors must come back to the bit; pictures are
AV1 twice, so their mean and largest mean deviation a frame are told, in steps of 0 to 255. Prints one JSON object.

    python benchmarks/g1_round_trip.py                        # all eight, 480x640
    python benchmarks/g1_round_trip.py --image-size 120 160
    python benchmarks/g1_round_trip.py --work runs/g1         # what is made stays; a second call goes on where the first one stopped
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from robot_rl.paths import find_recording
from robot_rl.replay import EpisodeStore, open_or_create
from robot_rl.replay.exporters import export_from
from robot_rl.replay.importers import import_into, open_dataset

CAMERA = "observation.images.cam_high"
FRAMES = 10


def compare(store: Path, out: Path) -> dict[str, Any]:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    dataset = LeRobotDataset("local/g1", root=out, video_backend="pyav")
    table = dataset.hf_dataset.with_format("numpy")
    found: dict[str, Any] = {"episodes_loaded": dataset.num_episodes, "frames_loaded": len(dataset)}
    vectors, deviations, first, wrong = 0, [], 0, []
    with EpisodeStore.open(store, mode="r") as opened:
        for ours, theirs in zip(map(opened.read, opened.episode_ids()), open_dataset(out).episodes(), strict=True):
            rows = range(first, first + len(ours))
            state = ours.observations["observation.state"]
            for name, mine, loaded, back in (
                ("state", state, np.stack(table[rows]["observation.state"]), theirs.observations["observation.state"]),
                ("action", ours.action, np.stack(table[rows]["action"]), theirs.action),
            ):
                if not (np.array_equal(mine[: len(ours)], loaded) and np.array_equal(mine, back)):
                    wrong.append(f"{ours.meta.episode_id}: {name}")
                vectors += mine[: len(ours)].size
            if (ours.meta.task, ours.meta.success) != (theirs.meta.task, theirs.meta.success):
                wrong.append(f"{ours.meta.episode_id}: task or outcome")
            if dataset[first]["task"] != ours.meta.task:
                wrong.append(f"{ours.meta.episode_id}: LeRobot's task")
            for t in np.linspace(0, len(ours) - 1, FRAMES).astype(int):
                picture = ours.observations[CAMERA][t].astype(float)
                loaded = dataset[int(first + t)][CAMERA].numpy().transpose(1, 2, 0) * 255.0
                back = theirs.observations[CAMERA][t].astype(float)
                deviations.append([np.abs(loaded - picture).mean(), np.abs(back - picture).mean()])
            first += len(ours)
            print(f"{ours.meta.episode_id}: {len(ours)} frames compared", file=sys.stderr)
    by_loader, back_here = np.array(deviations).T
    return found | {
        "wrong": wrong, "numbers_compared": vectors, "frames_compared": len(deviations),
        "picture_deviation": {
            "lerobots_loader": {"mean": round(by_loader.mean(), 3), "largest": round(by_loader.max(), 3)},
            "imported_again": {"mean": round(back_here.mean(), 3), "largest": round(back_here.max(), 3)},
        },
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--image-size", type=int, nargs=2, default=None, help="height and width to import; the recorded one without"
    )
    parser.add_argument(
        "--episodes", type=int, nargs="+", default=None, help="numbers of the recording; all that are there without"
    )
    parser.add_argument("--work", type=Path, default=None, help="folder for store and dataset; a temporary one without")
    given = parser.parse_args()
    source = find_recording(Path("g1_bottle_lerobot_v21"))
    options: dict[str, Any] = {"episodes": given.episodes, "image_size": given.image_size}
    options = {k: v for k, v in options.items() if v is not None}
    told = open_dataset(source, **options).describe()
    with tempfile.TemporaryDirectory() if given.work is None else contextlib.nullcontext(given.work) as folder:
        store, out, began = Path(folder) / "store", Path(folder) / "out", time.perf_counter()
        kind: dict[str, Any] = {"observation_features": told.observation_features, "action": told.action, "sync": False}
        with open_or_create(store, **kind) as opened:
            came = import_into(opened, source, skip_existing=True, **options)
            imported = time.perf_counter()
            if not out.exists():
                export_from(opened, out, "lerobot_v3")
            exported = time.perf_counter()
            episodes = len(opened)
        print(f"{episodes} episodes imported and exported", file=sys.stderr)
        result = {
            "episodes": episodes, "image_size": given.image_size or list(told.observation_features[CAMERA].shape[:2]),
            "imported_now": len(came.episode_ids), "import_seconds": round(imported - began, 1),
            "export_seconds": round(exported - imported, 1), **compare(store, out),
        }  # fmt: skip
    print(json.dumps(result))
    raise SystemExit(bool(result["wrong"]))


if __name__ == "__main__":
    main()
