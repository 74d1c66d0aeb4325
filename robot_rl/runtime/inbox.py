"""The learner's side of episodes and rewards that come over the wire.

===========================================  ====================================================================
``GET /v1/inbox``                            ``{"inbox": <id>}``: which inbox this is, so that a sender knows what it was told
``HEAD /v1/episodes/<robot>/<id>``           200 committed (``X-Sha256``), 206 begun (``Upload-Offset``), 404
``PATCH /v1/episodes/<robot>/<id>``          append a part at ``Upload-Offset`` whose hash is ``X-Sha256``; 409 tells the offset
``POST /v1/episodes/<robot>/<id>/commit``    ``{"bytes", "sha256"}``: verify, unpack, sync, rename: 201; same again: 200;
                                             another episode of that name: 409, kept aside; unfit: 422, kept aside
``POST /v1/rewards/<robot>/<source>``        JSON lines ``{"n", "event"}``; answers the highest number up to which all is kept
===========================================  ====================================================================

Every robot has an episode store of its own in the inbox, which a learner tails like any other.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import threading
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from robot_rl.replay.errors import StoreError
from robot_rl.replay.files import replace_json
from robot_rl.replay.reward_log import check_event, event_from_json
from robot_rl.replay.store import EpisodeStore
from robot_rl.replay.units import UnitError, adopt_unit, received_sha256

logger = logging.getLogger(__name__)

PART_BYTES = 4 << 20
"""Largest part of an upload."""
EPISODE_BYTES = 4 << 30
REWARD_BYTES = 4 << 20
LOCKS = 64
_ROBOT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
_EPISODE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_SOURCE = re.compile(r"[a-z0-9_.]{1,48}")
_SHA = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Answer:
    """Status, headers and JSON body of one reply."""

    status: int
    body: dict[str, Any] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class InboxCounts:
    """Since this process started."""

    episodes: int = 0
    bytes: int = 0
    rewards: int = 0
    refused: int = 0
    conflicts: int = 0


class EpisodeInbox:
    """Receives episodes into ``<folder>/<robot>/``, one store a robot. Safe to call from many threads.

    Args:
        max_bytes: of one episode.
        min_free_bytes: below this much free disk nothing more is taken (507); senders keep what they have and come again.
    """

    def __init__(self, folder: str | Path, *, max_bytes: int = EPISODE_BYTES, min_free_bytes: int = 0) -> None:
        self.folder, self.max_bytes, self.min_free_bytes = Path(folder), max_bytes, min_free_bytes
        self.counts = InboxCounts()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._locks = [threading.Lock() for _ in range(LOCKS)]  # by hash of the name: names that come in cost no memory
        self.id = self._identity()

    def store(self, robot: str) -> Path:
        """The store of one robot; made with its first episode.

        Raises:
            ValueError: no name of a robot.
        """
        if not _ROBOT.fullmatch(robot) or ".." in robot:
            raise ValueError(f"robot={robot!r}: accepted are 1 to 64 letters, digits, '_', '-', '.', not starting with '.'")
        return self.folder / robot

    def _identity(self) -> str:
        path = self.folder / ".inbox.json"
        try:
            return str(json.loads(path.read_bytes())["id"])
        except (OSError, ValueError, KeyError):
            replace_json(path, {"id": uuid.uuid4().hex}, sync=True)
            return str(json.loads(path.read_bytes())["id"])

    # ---- requests

    def body_limit(self, method: str, parts: list[str]) -> int:
        """How long the body of a request may be."""
        return PART_BYTES if method == "PATCH" else REWARD_BYTES if parts[:1] == ["rewards"] else 4096

    def answer(self, method: str, parts: list[str], headers: dict[str, str], body: bytes) -> Answer:
        """One request; ``parts`` is the path after ``/v1``, headers have lower-case names."""
        try:
            if parts == ["inbox"] and method in ("GET", "HEAD"):
                return Answer(200, {"inbox": self.id})
            if parts[:1] == ["episodes"] and len(parts) in (3, 4):
                robot, episode = parts[1:3]
                if not _ROBOT.fullmatch(robot) or not _EPISODE.fullmatch(episode) or ".." in robot + episode:
                    return Answer(404, {"error": "not found"})
                with self._lock(f"{robot}/{episode}"):
                    if method == "HEAD" and len(parts) == 3:
                        return self._state(robot, episode)
                    if method == "PATCH" and len(parts) == 3:
                        return self._append(robot, episode, headers, body)
                    if method == "POST" and parts[3:] == ["commit"]:
                        return self._commit(robot, episode, body)
            if parts[:1] == ["rewards"] and len(parts) == 3 and method == "POST":
                robot, source = parts[1:]
                if _ROBOT.fullmatch(robot) and ".." not in robot and _SOURCE.fullmatch(source):
                    with self._lock(f"rewards/{robot}/{source}"):
                        return self._rewards(robot, source, headers.get("x-store-id", ""), body)
        except (OSError, StoreError) as error:
            logger.error("inbox: %s", error)
            return Answer(507, {"error": f"cannot be written: {type(error).__name__}"})
        return Answer(404, {"error": "not found"})

    def _lock(self, key: str) -> threading.Lock:
        return self._locks[hash(key) % LOCKS]

    # ---- episodes

    def _part(self, robot: str, episode: str) -> Path:
        return self.folder / ".parts" / robot / f"{episode}.tar"

    def _state(self, robot: str, episode: str) -> Answer:
        known = received_sha256(self.store(robot), episode)
        if known is not None:
            return Answer(200, {}, {"X-Sha256": known})
        part = self._part(robot, episode)
        if part.exists():
            return Answer(206, {}, {"Upload-Offset": str(part.stat().st_size)})
        return Answer(404)

    def _append(self, robot: str, episode: str, headers: dict[str, str], body: bytes) -> Answer:
        offset, digest = headers.get("upload-offset", ""), headers.get("x-sha256", "")
        if not re.fullmatch(r"[0-9]{1,18}", offset) or not _SHA.fullmatch(digest):
            return Answer(400, {"error": "Upload-Offset and X-Sha256 are needed"})
        if hashlib.sha256(body).hexdigest() != digest:
            return Answer(422, {"error": "the part does not have the hash it was sent with"})
        part = self._part(robot, episode)
        have = part.stat().st_size if part.exists() else 0
        if int(offset) != have:
            return Answer(409, {"error": f"{have} bytes are here"}, {"Upload-Offset": str(have)})
        if have + len(body) > self.max_bytes:
            return Answer(413, {"error": f"accepted are at most {self.max_bytes} bytes an episode"})
        part.parent.mkdir(parents=True, exist_ok=True)
        if self.min_free_bytes and shutil.disk_usage(part.parent).free - len(body) < self.min_free_bytes:
            return Answer(507, {"error": "the learner's disk is full"})
        with open(part, "ab") as file:
            try:
                file.write(body)
                file.flush()
            except OSError:
                file.truncate(have)
                raise
        self.counts.bytes += len(body)
        return Answer(200, {}, {"Upload-Offset": str(have + len(body))})

    def _commit(self, robot: str, episode: str, body: bytes) -> Answer:
        try:
            told = json.loads(body)
            size, digest = int(told["bytes"]), str(told["sha256"])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return Answer(400, {"error": "accepted is {bytes, sha256}"})
        if not _SHA.fullmatch(digest):
            return Answer(400, {"error": "sha256 is not one"})
        part, store = self._part(robot, episode), self.store(robot)
        known = received_sha256(store, episode)
        if known == digest:
            part.unlink(missing_ok=True)
            return Answer(200, {"sha256": known})
        if known is not None:
            return self._set_aside(part, robot, episode, "conflicts", 409, "another episode of this name is here")
        have = part.stat().st_size if part.exists() else 0
        if have != size:
            if have > size:
                part.unlink()
                have = 0
            return Answer(409, {"error": f"{have} of {size} bytes are here"}, {"Upload-Offset": str(have)})
        with open(part, "rb") as file:
            if _digest(file) != digest:
                part.unlink()
                return Answer(409, {"error": "the bytes do not have that hash; send them again"}, {"Upload-Offset": "0"})
            try:
                adopt_unit(store, file, episode, digest)
            except UnitError as error:
                self.counts.refused += 1
                logger.error("inbox: episode %s of %s refused: %s", episode, robot, error)
                return self._set_aside(part, robot, episode, "refused", 422, str(error))
        part.unlink()
        self.counts.episodes += 1
        return Answer(201, {"sha256": digest})

    def _set_aside(self, part: Path, robot: str, episode: str, where: str, status: int, why: str) -> Answer:
        """What cannot be taken is kept for a person to look at, never written over anything."""
        if part.exists():
            aside = self.folder / f".{where}" / robot
            aside.mkdir(parents=True, exist_ok=True)
            os.replace(part, aside / f"{episode}-{uuid.uuid4().hex[:8]}.tar")
        self.counts.conflicts += where == "conflicts"
        return Answer(status, {"error": why, "final": True})

    # ---- rewards

    def _rewards(self, robot: str, source: str, store_id: str, body: bytes) -> Answer:
        if store_id and not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", store_id):
            return Answer(400, {"error": "X-Store-Id is not one"})
        mark = self.folder / ".rewards" / robot / f"{source}@{store_id}.json"
        done = int(json.loads(mark.read_bytes())["n"]) if mark.exists() else 0
        if not (self.store(robot) / "store.json").exists():
            return Answer(409, {"error": "no episode of this robot is here yet", "n": done})
        new, last = [], done
        try:
            for line in body.splitlines():
                told = json.loads(line)
                number = int(told["n"])
                if number <= last:
                    continue
                if number != last + 1:
                    break  # a gap: answer how far it goes, the sender resumes there
                if told["event"] is not None:  # a line that the sender's disk tore
                    event = check_event(event_from_json(told["event"]))
                    if event.source != source:
                        raise ValueError(f"event of source {event.source!r}")
                    new.append(event)
                last = number
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError, AttributeError) as error:
            return Answer(422, {"error": f"line for number {last + 1}: {error}", "n": done})
        if last > done:
            if new:
                with EpisodeStore.open(self.store(robot), mode="a", recover=False) as store:
                    store.append_reward(*new)
            mark.parent.mkdir(parents=True, exist_ok=True)
            replace_json(mark, {"n": last}, sync=True)  # after the events: sent twice they are the same events
            self.counts.rewards += len(new)
        return Answer(200, {"n": last})


def _digest(file: Any) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
