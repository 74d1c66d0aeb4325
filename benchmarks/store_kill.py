"""Kill -9 a writer again and again; count what was acknowledged and lost, and what became unreadable.

A child process appends episodes and acknowledges over a pipe what it was promised: ``C`` an episode whose commit returned (or
whose background commit was flushed), ``F`` steps that a flush made durable. The parent kills it at a random instant, reopens
the store (sometimes killing the recovery as well) and holds the store to every acknowledgement, value by value. Every third
child stops after a flush (``W``) and waits for its end, so that on any machine some episodes are killed half-way.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from robot_rl.replay import EpisodeStore
from robot_rl.replay.maintenance import verify
from robot_rl.types import ActionSpec, Decision, Episode, EpisodeMeta, FeatureSpec, Observation, Step

STATE, IMAGE, ACTIONS, CHUNK = 6, (12, 16, 3), 3, 4


def make(path: Path, sync: bool) -> None:
    features = {"observation.state": FeatureSpec((STATE,)), "observation.images.top": FeatureSpec(IMAGE, "uint8")}
    EpisodeStore.create(
        path, observation_features=features, action=ActionSpec((-1,) * ACTIONS, (1,) * ACTIONS), noise_shape=(CHUNK, ACTIONS),
        chunk_horizon=CHUNK, flush_interval_s=0.05, sync=sync,
    ).close()  # fmt: skip


def observation(key: int, t: int) -> Observation:
    image = (np.arange(np.prod(IMAGE), dtype=np.int64) + key * 7 + t).astype(np.uint8).reshape(IMAGE)
    return {"observation.state": np.arange(STATE, dtype=np.float32) + 1000 * (key % 97) + t, "observation.images.top": image}


def action(key: int, t: int) -> np.ndarray:
    return np.full(ACTIONS, ((key + t) % 19) / 19, np.float32)


def child(path: Path, ack: int, seed: int, sync: bool, wait_half_way: bool) -> None:
    store = EpisodeStore.open(path, "a", sync=sync)
    dice = random.Random(seed)
    os.write(ack, b"R 0 0\n")
    number = 0
    while True:
        key = seed * 100_000 + number
        number += 1
        length = dice.randint(1, 60)
        writer = store.begin(EpisodeMeta(f"k{key}", seed=key % 1000))
        decision = -1
        for t in range(length):
            if t % CHUNK == 0:
                chunk = np.full((CHUNK, ACTIONS), t, np.float32)
                decision = writer.decide(Decision(t, chunk + 0.5, chunk, chunk + 1))
            end = t == length - 1
            writer.append(
                Step(
                    observation(key, t),
                    action(key, t),
                    reward=float(end),
                    terminated=end and key % 2 == 0,
                    truncated=end and key % 2 == 1,
                    decision_id=decision,
                    chunk_row=t % CHUNK,
                    stamp_ns=t + 1,
                )
            )
            if dice.random() < 0.05:
                store.flush()
                wait = wait_half_way and not end
                os.write(ack, f"{'W' if wait else 'F'} k{key} {t + 1}\n".encode())
                while wait:
                    time.sleep(1)
            elif dice.random() < 0.1:
                time.sleep(0.001)
        background = dice.random() < 0.5
        writer.commit(observation(key, length), success=key % 2 == 0, background=background)
        if background:
            store.flush()
        os.write(ack, f"C k{key} {length}\n".encode())


def matches(episode: Episode, length: int, exact: bool) -> str:
    """Why the episode is not what was written, or ""."""
    key, have = int(episode.meta.episode_id[1:]), len(episode)
    if have < length or (exact and have != length):
        return f"{have} steps, {length} were acknowledged"
    rows = [observation(key, t) for t in range(have + 1)]
    for name, values in episode.observations.items():
        expected = np.stack([r[name] for r in rows])
        if not np.array_equal(values[:-1], expected[:-1]):
            return f"{name} differs"
        last = expected[-2] if episode.meta.recovered else expected[-1]
        if not np.array_equal(values[-1], last):
            return f"{name}: final observation differs"
    if not np.array_equal(episode.action, np.stack([action(key, t) for t in range(have)])):
        return "action differs"
    if len(episode.decisions) < int(episode.decision_id.max()) + 1 or any(
        float(d.chunk[0, 0]) != d.step + 1 for d in episode.decisions
    ):
        return "decisions differ"
    if episode.meta.recovered and not (episode.truncated[-1] or episode.terminated[-1]):
        return "recovered, but its last step is neither truncated nor terminated"
    return ""


def run(path: Path, kills: int, seed: int, sync: bool = True) -> dict[str, object]:
    """Do it ``kills`` times on one store; gives the counts."""
    dice = random.Random(seed)
    make(path, sync)
    committed: dict[str, int] = {}
    flushed: dict[str, int] = {}
    for kill in range(kills):
        half_way = kill % 3 == 2
        back, ack = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(back)
            try:
                child(path, ack, seed * 10_000 + kill, sync, half_way)
            finally:
                os._exit(1)
        os.close(ack)
        with os.fdopen(back, "rb") as pipe:
            # Without waiting for an acknowledgement the kill may fall into opening and recovering.
            heard = [pipe.readline() for _ in range(1 if half_way else dice.choice((0, 1, 2, 3, 5, 8)))]
            while half_way and heard[-1] and not heard[-1].startswith(b"W"):
                heard.append(pipe.readline())
            time.sleep(dice.expovariate(1 / 0.03))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            for line in (b"".join(heard) + pipe.read()).decode().splitlines():
                kind, episode_id, count = line.split()
                if kind == "C":
                    committed[episode_id] = int(count)
                elif kind == "F":
                    flushed[episode_id] = max(int(count), flushed.get(episode_id, 0))
    lost, wrong = [], []
    with EpisodeStore.open(path, "a", sync=sync) as store:
        present = set(store.episode_ids())
        recovered = 0
        for episode_id in sorted(present):
            episode = store.read(episode_id)
            recovered += episode.meta.recovered
            exact = episode_id in committed
            why = matches(episode, committed.get(episode_id, flushed.get(episode_id, 1)), exact)
            if why or (exact and episode.meta.recovered):
                wrong.append(f"{episode_id}: {why or 'marked as recovered although its commit was acknowledged'}")
        lost = sorted((committed.keys() | flushed.keys()) - present)
    report = verify(path)
    return {
        "kills": kills,
        "episodes_acknowledged": len(committed),
        "episodes_present": len(present),
        "episodes_recovered": recovered,
        "flushes_acknowledged": len(flushed),
        "lost": lost,
        "wrong": wrong,
        "unreadable": [f"{p.where}: {p.what}" for p in report.errors],
        "logs_left": sorted(p.name for p in (path / "wal").glob("*.wal")),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-sync", action="store_true", help="skip fsync (a killed process must lose nothing either way)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = run(Path(folder) / "store", options.kills, options.seed, sync=not options.no_sync)
    print(json.dumps(result))
    return int(bool(result["lost"] or result["wrong"] or result["unreadable"]))


if __name__ == "__main__":
    sys.exit(main())
