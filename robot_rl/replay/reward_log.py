"""Reward events beside the episodes: one append-only log per source, and the rule that says which event counts.

A log is JSON lines. Appending takes a lock, and a line that a crash tore is closed off by the next append, so it costs that
one event. Which event of one (episode, step, source) is active never depends on the order of arrival (rewards
specification 1.5): among the valid ones that nobody revoked, the greatest ``event_id``.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from robot_rl.replay.files import fsync_dir, locked, write_all
from robot_rl.replay.ulid import new_ulid
from robot_rl.types import RewardEvent, RewardKind

LABEL_SOURCE = "label"
"""The source through which :meth:`EpisodeStore.set_success` speaks; its word is the episode's ``meta.success``."""
_SOURCE = re.compile(r"[a-z0-9_.]{1,48}")
Check = Callable[[RewardEvent], RewardEvent]
_FIELDS = tuple(f.name for f in fields(RewardEvent))


def check_event(event: RewardEvent) -> RewardEvent:
    """The event with an id. Raises ValueError for a source that is not ``[a-z0-9_.]{1,48}``."""
    if not _SOURCE.fullmatch(event.source):
        raise ValueError(f"RewardEvent.source={event.source!r}: accepted is [a-z0-9_.]{{1,48}}")
    if not event.episode_id:
        raise ValueError("RewardEvent.episode_id is empty: an event says something about one episode")
    return event if event.event_id else replace(event, event_id=new_ulid())


def event_to_json(event: RewardEvent) -> dict[str, Any]:
    data = {name: getattr(event, name) for name in _FIELDS}
    data["kind"] = RewardKind(event.kind).value
    data["value"] = float(event.value) if event.valid else None
    for name in ("step", "stamp_ns"):
        data[name] = int(data[name])
    data["latency_ms"] = float(event.latency_ms)
    data["valid"] = bool(event.valid)
    return data


def event_from_json(data: Mapping[str, Any]) -> RewardEvent:
    values = {name: data[name] for name in _FIELDS}
    values["kind"] = RewardKind(values["kind"])
    values["value"] = float("nan") if values["value"] is None else values["value"]
    return RewardEvent(**values)


class RewardLog:
    """The folder of per-source logs: append to them, follow them."""

    def __init__(self, folder: Path, *, sync: bool):
        self.folder = folder
        self._sync = sync

    def append(self, events: Iterable[RewardEvent]) -> None:
        """Append events that have their ids; each is wholly there or not at all for every reader."""
        lines: dict[str, list[bytes]] = {}
        for event in events:
            lines.setdefault(event.source, []).append(json.dumps(event_to_json(event)).encode() + b"\n")
        for source, rows in lines.items():
            path = self.folder / f"{source}.jsonl"
            new = not path.exists()
            with locked(path) as fd:
                end = os.lseek(fd, 0, os.SEEK_END)
                torn = end > 0 and os.pread(fd, 1, end - 1) != b"\n"
                try:
                    write_all(fd, (b"\n" if torn else b"") + b"".join(rows))
                except OSError:
                    os.ftruncate(fd, end)
                    raise
                if self._sync:
                    os.fsync(fd)
            if new and self._sync:
                fsync_dir(self.folder)

    def read(self, offsets: Mapping[str, int]) -> tuple[list[RewardEvent], dict[str, int], int]:
        """Whole lines after ``offsets`` (file name to byte), the new offsets, and how many lines were unreadable."""
        events: list[RewardEvent] = []
        ends = dict(offsets)
        bad = 0
        for path in sorted(self.folder.glob("*.jsonl")):
            start = ends.get(path.name, 0)
            if path.stat().st_size <= start:
                continue
            with open(path, "rb") as file:
                file.seek(start)
                data = file.read()
            whole = data.rfind(b"\n") + 1
            for line in data[:whole].splitlines():
                if not line:
                    continue
                try:
                    events.append(event_from_json(json.loads(line)))
                except (ValueError, KeyError, TypeError):
                    bad += 1
            ends[path.name] = start + whole
        return events, ends, bad


class RewardTable:
    """All events seen so far, and which of them count. Adding is idempotent and commutative."""

    def __init__(self) -> None:
        self._events: dict[str, dict[tuple[int, str], dict[str, RewardEvent]]] = {}
        self._where: dict[str, tuple[str, int, str]] = {}
        self._revoked: set[str] = set()

    def add(self, event: RewardEvent) -> set[tuple[str, int, str]]:
        """Take one event in; gives the (episode, step, source) whose active event may have changed."""
        key = (event.step, event.source)
        same = self._events.setdefault(event.episode_id, {}).setdefault(key, {})
        known = same.get(event.event_id)
        # The same id twice is one event. Should two differ, the choice must not depend on which came first.
        if known is None or json.dumps(event_to_json(known)) < json.dumps(event_to_json(event)):
            same[event.event_id] = event
        here = (event.episode_id, *key)
        self._where[event.event_id] = here
        touched = {here}
        if event.revokes:
            self._revoked.add(event.revokes)
            if event.revokes in self._where:
                touched.add(self._where[event.revokes])
        return touched

    def resolve(self, episode_id: str, step: int, source: str, check: Check | None = None) -> RewardEvent | None:
        """The active event: the greatest valid id that nobody revoked; else the greatest invalid one; else ``None``.

        ``check`` may turn an event into an invalid one (a stamp that contradicts the episode's) before the choice is made.
        """
        events = self._events.get(episode_id, {}).get((step, source), {})
        standing = [check(e) if check else e for i, e in events.items() if i not in self._revoked]
        return max(standing, key=lambda e: (e.valid, e.event_id), default=None)

    def active(self, episode_id: str, check: Check | None = None) -> list[RewardEvent]:
        """Active events of one episode, by step, then source."""
        keys = sorted(self._events.get(episode_id, {}))
        return [event for step, source in keys if (event := self.resolve(episode_id, step, source, check)) is not None]

    def history(self, episode_id: str) -> list[RewardEvent]:
        """Every event of one episode by id, replaced and revoked ones included."""
        every = [e for same in self._events.get(episode_id, {}).values() for e in same.values()]
        return sorted(every, key=lambda e: e.event_id)

    def forget(self, episode_id: str) -> None:
        """Drop what is known about one episode."""
        for same in self._events.pop(episode_id, {}).values():
            for event_id in same:
                self._where.pop(event_id, None)

    def episode_ids(self) -> set[str]:
        return set(self._events)
