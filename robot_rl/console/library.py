"""Recorded episodes for the page: a queue to label, film to scrub through, rewards beside it, pairs to compare, the learning curve.

Works on a store that other processes write. Everything here may wait for a disk: the server calls it in threads.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import OrderedDict
from dataclasses import asdict, dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from robot_rl.console.clips import Clips, check_id
from robot_rl.console.feedback import Reading, events, place
from robot_rl.console.frames import to_jpeg
from robot_rl.evaluation.results import GateLine, load_lines
from robot_rl.evaluation.statistics import wilson
from robot_rl.replay.store import EpisodeStore
from robot_rl.rewards.comparisons import Comparison, Pair, Segment
from robot_rl.types import Episode, RewardEvent

IMAGES = "observation.images."
CURVE_EPISODES = 3000
COMPARISONS = "comparisons.jsonl"
CHOICES = {"first": 0, "second": 1, "neither": -1}


@dataclass(frozen=True)
class EpisodeRow:
    """One episode of the queue. ``version`` is -1 while it must stay hidden."""

    id: str
    steps: int
    seconds: float
    task: str
    success: bool | None
    version: int
    committed_ns: int
    human: bool
    cameras: tuple[str, ...]


def gate_curve(run: Path, most: int = 200) -> list[dict[str, Any]]:
    """What the promotion gate decided in a run, oldest first: success of the version that was judged, its bounds, and what it had to reach.

    Raises:
        ValueError: a damaged line of ``gate.jsonl``.
    """
    judged = [g for g in load_lines(GateLine, run / "gate.jsonl") if g.n > 0]
    number = lambda x: round(x, 4) if isfinite(x) else None  # noqa: E731
    return [
        {"steps": g.env_steps, "version": g.version, "event": g.event, "n": g.n, "rate": g.successes / g.n,
         "low": number(g.lower), "high": number(g.upper), "reference": number(g.reference)}
        for g in judged[-most:]
    ]  # fmt: skip


class Library:
    """See the module.

    Args:
        store: folder of the episode store; it may not exist yet.
        folder: where clips and comparisons lie (made when needed).
    """

    def __init__(self, store: Path | None, folder: Path, *, segment_s: float = 2.0, seed: int = 0) -> None:
        self.path, self.folder, self.segment_s = store, folder, segment_s
        self.clips = Clips(folder / "clips")
        self._guard = threading.RLock()
        self._store: EpisodeStore | None = None
        self._episodes: OrderedDict[str, Episode] = OrderedDict()
        self._rng = np.random.default_rng(seed)
        self._offered: OrderedDict[str, Pair] = OrderedDict()
        self._last: RewardEvent | None = None

    def _open(self) -> EpisodeStore | None:
        if self._store is None and self.path is not None and (self.path / "store.json").exists():
            self._store = EpisodeStore.open(self.path)
        return self._store

    def _need(self, episode_id: str) -> EpisodeStore:
        store = self._open()
        if store is None or check_id(episode_id) not in store:
            raise KeyError(f"no episode {episode_id!r}")
        return store

    # ---- the queue

    def rows(self, *, unlabelled: bool = False, most: int = 100, hide: bool = False) -> list[EpisodeRow]:
        """The newest episodes first; ``hide`` leaves out which version acted."""
        with self._guard:
            store = self._open()
            out: list[EpisodeRow] = []
            for identity in reversed(store.episode_ids() if store else []):
                try:
                    row = self._row(identity, hide)
                except KeyError:  # set aside meanwhile
                    continue
                if not unlabelled or row.success is None:
                    out.append(row)
                if len(out) >= most:
                    break
            return out

    def _row(self, identity: str, hide: bool) -> EpisodeRow:
        assert self._store is not None
        head, meta = self._store.attributes(identity), self._store.meta(identity)
        steps = int(head["length"])
        hz = meta.control_hz or 10.0
        return EpisodeRow(
            identity, steps, steps / hz, meta.task, meta.success, -1 if hide else meta.weights_version,
            int(head.get("committed_ns", 0)), bool(meta.extra.get("interventions")), self._cameras(identity),
        )  # fmt: skip

    def _cameras(self, identity: str) -> tuple[str, ...]:
        if names := self.clips.names(identity):
            return names
        assert self._store is not None
        return tuple(k.removeprefix(IMAGES) for k in self._store.observation_features if k.startswith(IMAGES))

    def counts(self) -> tuple[int, int, int]:
        """Episodes, of them with a verdict, of these successes."""
        known = [r.success for r in self.rows(most=10**9)]
        return len(known), sum(s is not None for s in known), sum(s is True for s in known)

    # ---- one episode

    def detail(self, episode_id: str, *, hide: bool = False) -> dict[str, Any]:
        """Row, rewards by source and who was in control. Raises KeyError."""
        with self._guard:
            store = self._need(episode_id)
            row = self._row(episode_id, hide)
            traces: dict[str, list[tuple[int, float]]] = {}
            for event in store.rewards(episode_id):
                if event.valid:
                    traces.setdefault(event.source, []).append((event.step, event.value))
            source = self._episode(episode_id).source
        frames = {c: len(f) for c, f in self.clips.cameras(episode_id).items()} or dict.fromkeys(row.cameras, row.steps + 1)
        return {**asdict(row), "traces": traces, "frames": frames, "source": source.tolist()}

    def _episode(self, episode_id: str) -> Episode:
        """Without pictures, cached."""
        if episode_id not in self._episodes:
            store = self._need(episode_id)
            keys = [k for k in store.observation_features if not k.startswith(IMAGES)]
            self._episodes[episode_id] = store.read(episode_id, keys)
            while len(self._episodes) > 16:
                self._episodes.popitem(last=False)
        return self._episodes[episode_id]

    def picture(self, episode_id: str, camera: str, share: float) -> bytes:
        """The JPEG of a camera at ``share`` in [0, 1] of the episode. Raises KeyError where there is none."""
        share = min(max(share, 0.0), 1.0)
        clip = self.clips.cameras(episode_id).get(camera)
        if clip:
            return clip[round(share * (len(clip) - 1))].jpeg
        with self._guard:
            store, key = self._need(episode_id), IMAGES + camera
            if key not in store.observation_features:
                raise KeyError(f"no camera {camera!r} in episode {episode_id!r}")
            cached = f"{episode_id}/{camera}"
            if cached not in self._episodes:
                self._episodes[cached] = store.read(episode_id, [key])
                while len(self._episodes) > 16:
                    self._episodes.popitem(last=False)
            pictures = self._episodes[cached].observations[key]
        return to_jpeg(np.asarray(pictures[round(share * (len(pictures) - 1))]))

    # ---- verdicts

    def label(self, episode_id: str, success: bool, operator: str) -> str:
        """A person's verdict on a recorded episode; durable on return. Raises KeyError."""
        with self._guard:
            self._need(episode_id)
            assert self.path is not None
            with EpisodeStore.open(self.path, mode="a", recover=False) as store:
                self._last = store.set_success(episode_id, success, model_id=f"human:{operator}")
        return f"episode {episode_id[-6:]} is a {'success' if success else 'failure'}"

    def feel(self, episode_id: str, readings: list[Reading], operator: str) -> bool:
        """Write down what a person felt during an episode; False while it is not in the store. Raises ValueError for foreign clocks."""
        with self._guard:
            store = self._open()
            if store is None or check_id(episode_id) not in store:
                return False
            stamps = self._episode(episode_id).stamp_ns
            found = events(episode_id, place(readings, stamps), stamps, operator)
            if found and self.path is not None:
                with EpisodeStore.open(self.path, mode="a", recover=False) as writable:
                    writable.append_reward(*found)
        return True

    def undo(self) -> str:
        """Revoke the last verdict given here. Raises ValueError when there is none."""
        with self._guard:
            last, self._last = self._last, None
            if last is None or self.path is None:
                raise ValueError("no label to undo")
            with EpisodeStore.open(self.path, mode="a", recover=False) as store:
                store.append_reward(
                    replace(last, event_id="", value=float("nan"), valid=False, reason="undone", revokes=last.event_id)
                )
        return f"the label of episode {last.episode_id[-6:]} is revoked"

    def discard(self, episode_id: str) -> str:
        """Set an episode aside: nothing trains on it. Raises KeyError."""
        with self._guard:
            self._need(episode_id)
            assert self.path is not None
            with EpisodeStore.open(self.path, mode="a", recover=False) as store:
                store.discard(episode_id)
            self._episodes.pop(episode_id, None)
        return f"episode {episode_id[-6:]} is set aside"

    # ---- pairs

    def pair(self, recent: int = 60) -> Pair | None:
        """Two random segments of the newest episodes of one task, never of the same episode; None with fewer than two.

        Segments are as long as :attr:`segment_s`, or as the shorter episode.
        """
        with self._guard:
            rows = [r for r in self.rows(most=recent) if r.cameras and r.steps > 1]
            rows = [r for r in rows if r.task == rows[0].task]
            if len(rows) < 2:
                return None
            a, b = (rows[int(i)] for i in self._rng.choice(len(rows), 2, replace=False))
            hz = a.steps / a.seconds if a.seconds else 10.0
            length = max(1, min(a.steps, b.steps, round(self.segment_s * hz)))
            first, second = (Segment(r.id, s := int(self._rng.integers(0, r.steps - length + 1)), s + length) for r in (a, b))
            identity = hashlib.sha256(f"{first}{second}{time.time_ns()}".encode()).hexdigest()[:16]
            found = self._offered[identity] = Pair(identity, first, second)
            while len(self._offered) > 200:
                self._offered.popitem(last=False)
            return found

    def prefer(self, pair_id: str, choice: str, operator: str) -> str:
        """Keep a choice in ``comparisons.jsonl``; ``skip`` keeps nothing. Raises ValueError for a pair that was not offered."""
        with self._guard:
            pair = self._offered.pop(pair_id, None)
            if pair is None:
                raise ValueError("this pair was answered before, or never offered")
            if choice == "skip":
                return "skipped"
            kept = Comparison(pair, CHOICES[choice], operator, time.time_ns())
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / COMPARISONS, "a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(kept)) + "\n")
            return "kept"

    # ---- the learning curve

    def curve(self, window: int = 20) -> list[dict[str, Any]]:
        """Success of the last ``window`` judged episodes after each of them, with its Wilson interval, oldest first."""
        judged = [r for r in reversed(self.rows(most=CURVE_EPISODES)) if r.success is not None]
        out = []
        for i in range(len(judged)):
            last = judged[max(0, i + 1 - window) : i + 1]
            wins = sum(bool(r.success) for r in last)
            interval = wilson(wins, len(last))
            out.append({"x": i + 1, "rate": wins / len(last), "low": interval.low, "high": interval.high, "n": len(last), "version": last[-1].version})  # fmt: skip
        step = max(1, len(out) // 400)
        return out[::-1][::step][::-1]
