"""``StoreTailer``: follow one or many stores from a learner's process."""

from __future__ import annotations

import logging
import os
import time
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from robot_rl.replay.errors import CorruptEpisodeError
from robot_rl.replay.reward_log import RewardTable
from robot_rl.replay.store import EpisodeStore, TailCursor
from robot_rl.types import Episode, RewardEvent

_log = logging.getLogger(__name__)


class Tailed(NamedTuple):
    """One piece of news: an episode with the reward events in force, or (``episode`` None) late events on earlier episodes."""

    episode: Episode | None
    rewards: list[RewardEvent]


class StoreTailer:
    """Delivers every committed episode of the followed stores once, in commit order per store, and reward events as they come.

    Writers may be killed and restarted, and a store may not exist yet; the tailer only ever reads committed files. Events
    that are about an episode not seen yet wait for it (``pending_limit`` of them, ``pending_seconds`` long), then are
    dropped and counted in ``reward_orphans_total``.

    A late event is delivered as what is now in force for its (step, source); when everything said there was revoked that is an
    invalid event, whose value is NaN.
    """

    def __init__(
        self,
        paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
        *,
        keys: Collection[str] | None = None,
        cursors: Mapping[str, Mapping[str, Any]] | None = None,
        pending_limit: int = 100_000,
        pending_seconds: float = 600.0,
    ):
        """``keys``: observation features to decode. ``cursors``: :meth:`cursors` of an earlier tailer, to go on from there."""
        self.paths = [Path(paths)] if isinstance(paths, (str, os.PathLike)) else [Path(p) for p in paths]
        self._keys = keys
        given = cursors or {}
        self._cursors = {p: TailCursor.from_json(given[str(p)]) if str(p) in given else TailCursor() for p in self.paths}
        self._stores: dict[Path, EpisodeStore] = {}
        self._table = RewardTable()
        self._seen: dict[str, Path] = {}
        self._pending: OrderedDict[str, tuple[float, RewardEvent]] = OrderedDict()
        self._pending_limit = pending_limit
        self._pending_seconds = pending_seconds
        self.reward_orphans_total = 0
        self.damaged: dict[str, str] = {}

    def cursors(self) -> dict[str, dict[str, Any]]:
        """JSON of how far each store was read; what :meth:`poll` has yielded counts as read."""
        return {str(p): c.to_json() for p, c in self._cursors.items()}

    def _store(self, path: Path) -> EpisodeStore | None:
        if path not in self._stores:
            try:
                self._stores[path] = EpisodeStore.open(path)
            except FileNotFoundError:
                return None
            before = self._cursors[path].sequence
            if before:  # going on after a restart: those episodes are the caller's already
                for episode_id in self._stores[path].episode_ids():
                    if self._stores[path].attributes(episode_id)["sequence"] <= before:
                        self._seen[episode_id] = path
        return self._stores[path]

    def poll(self) -> Iterator[Tailed]:
        """What is new right now; never waits. Episodes are read one at a time, as they are asked for."""
        for path in self.paths:
            store = self._store(path)
            if store is None:
                continue
            start = self._cursors[path]
            new, events, end = store.tail(start)
            for event in events:
                self._table.add(event)
            for episode_id in new:
                attributes = store.attributes(episode_id)
                # Events count as read only together with the last of the new episodes: a reader that stops in between
                # hears them again, which changes nothing.
                self._cursors[path] = replace(start, sequence=attributes["sequence"])
                self._seen[episode_id] = path
                try:
                    episode = store.read(episode_id, self._keys)
                except (CorruptEpisodeError, KeyError) as error:
                    self.damaged[episode_id] = str(error)
                    _log.error("%s: episode %s skipped: %s", path, episode_id, error)
                    continue
                yield Tailed(episode, self._table.active(episode_id, store.checked))
            self._cursors[path] = end
            late = self._late(store, events, set(new))
            if late:
                yield Tailed(None, late)

    def _late(self, store: EpisodeStore, events: list[RewardEvent], new: set[str]) -> list[RewardEvent]:
        now = time.monotonic()
        touched: dict[tuple[str, int, str], RewardEvent] = {}
        for event in events:
            if event.episode_id not in self._seen:
                self._pending[event.event_id] = (now, event)
                continue
            for key in self._table.add(event):  # again, for the places it touches
                touched[key] = event
        for event_id in [i for i, (_, e) in self._pending.items() if e.episode_id in self._seen]:
            event = self._pending.pop(event_id)[1]
            touched.setdefault((event.episode_id, event.step, event.source), event)
        while self._pending and (
            len(self._pending) > self._pending_limit or now - next(iter(self._pending.values()))[0] > self._pending_seconds
        ):
            self._pending.popitem(last=False)
            self.reward_orphans_total += 1
        late = []
        for (episode_id, step, source), event in touched.items():
            if episode_id in new:
                continue  # delivered with the episode
            active = self._table.resolve(episode_id, step, source, self._stores[self._seen[episode_id]].checked)
            late.append(active or replace(event, step=step, source=source, value=float("nan"), valid=False, reason="revoked"))
        return late

    def follow(self, poll_seconds: float = 0.2) -> Iterator[Tailed]:
        """:meth:`poll` for ever."""
        while True:
            yield from self.poll()
            time.sleep(poll_seconds)
