"""The robot's side: ships committed episodes and reward events to a learner that has no folder in common with it.

``python -m robot_rl.runtime.shipping STORE --url http://learner:8765 --robot arm_1`` runs at low priority beside the robot and
shares nothing with the control loop but files. A unit is one committed episode. It counts as delivered when the learner has
said that it is durable there, and that is written to ``<STORE>.shipped/``; a link that breaks, a learner that dies and a kill
of this process at any instruction cost time and nothing else.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from robot_rl.replay.files import locked, replace_json, write_all
from robot_rl.replay.store import EpisodeStore, read_info
from robot_rl.replay.units import EpisodeUnit
from robot_rl.replay.zarr_episode import remove_tree
from robot_rl.runtime.inbox import PART_BYTES
from robot_rl.runtime.priority import set_nice
from robot_rl.runtime.transfer import TransferError, _Client, read_token

logger = logging.getLogger(__name__)

BACKOFF_S = (0.5, 30.0)
REWARD_LINES = 1000


class Backoff:
    """Growing pauses with jitter: many robots lose one learner at the same moment."""

    def __init__(self, first_s: float = BACKOFF_S[0], last_s: float = BACKOFF_S[1]) -> None:
        self.first_s, self.last_s, self.next_s = first_s, last_s, first_s

    def wait_s(self) -> float:
        now, self.next_s = self.next_s, min(2.0 * self.next_s, self.last_s)
        return now * random.uniform(0.5, 1.0)

    def reset(self) -> None:
        self.next_s = self.first_s


@dataclass
class ShipStatus:
    """What a shipper has done; ``pending`` episodes are committed and not acknowledged."""

    shipped: int = 0
    refused: int = 0
    bytes: int = 0
    rewards: int = 0
    pending: int = 0
    last_error: str = ""


class Ledger:
    """What was acknowledged by which inbox: one JSON line an episode, beside the store."""

    def __init__(self, store: Path) -> None:
        self.folder = store.with_name(f"{store.name}.shipped")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / "episodes.jsonl"

    def read(self, inbox: str) -> dict[str, str]:
        """Episode to ``acknowledged`` or ``refused``, in the order it was told."""
        found: dict[str, str] = {}
        if self.path.exists():
            for line in self.path.read_bytes().splitlines():
                try:
                    data = json.loads(line)
                    if data["inbox"] == inbox:
                        found[data["episode_id"]] = data["state"]
                except (ValueError, KeyError, TypeError):
                    continue  # torn by a crash: it is asked for again
        return found

    def add(self, inbox: str, episode_id: str, state: str, sha256: str, size: int) -> None:
        line = {
            "inbox": inbox, "episode_id": episode_id, "state": state, "sha256": sha256, "bytes": size, "time_ns": time.time_ns(),
        }  # fmt: skip
        with locked(self.path) as fd:
            end = os.lseek(fd, 0, os.SEEK_END)
            torn = end > 0 and os.pread(fd, 1, end - 1) != b"\n"
            write_all(fd, (b"\n" if torn else b"") + json.dumps(line).encode() + b"\n")
            os.fsync(fd)

    def reward_marks(self, inbox: str) -> dict[str, int]:
        try:
            return dict(json.loads((self.folder / f"rewards-{inbox}.json").read_bytes()))
        except (OSError, ValueError):
            return {}

    def save_reward_marks(self, inbox: str, marks: dict[str, int]) -> None:
        replace_json(
            self.folder / f"rewards-{inbox}.json", marks, sync=False
        )  # the learner knows better; this only saves asking


class Shipper:
    """Ships one store to one learner.

    Args:
        robot: name under which the learner keeps this robot's episodes.
        ship_mb_s: most megabytes a second; 0 for no limit.
        min_free_bytes: below this much free disk, acknowledged episodes are deleted here, oldest first. 0 never deletes.
        stop: asked between parts.
    """

    def __init__(
        self,
        store: str | Path,
        url: str,
        robot: str,
        *,
        token: str | None = None,
        ship_mb_s: float = 20.0,
        min_free_bytes: int = 0,
        timeout_s: float = 10.0,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        if ship_mb_s < 0:
            raise ValueError(f"ship_mb_s={ship_mb_s}: accepted are numbers >= 0")
        self.store, self.robot, self.stop = Path(store), robot, stop
        self.ship_mb_s, self.min_free_bytes = ship_mb_s, min_free_bytes
        self.client = _Client(url, read_token() if token is None else token, timeout_s)
        self.status = ShipStatus()
        self._ledger: Ledger | None = None
        self._inbox = ""
        self._done: dict[str, str] = {}
        self._reader: EpisodeStore | None = None
        self._marks: dict[str, int] = {}

    def step(self) -> bool:
        """Ship everything that is there now, in commit order; False when there was nothing to ship.

        Raises:
            TransferError: the link or the learner; call again later.
        """
        if not (self.store / "store.json").exists():
            return False
        if self._reader is None:
            self._reader = EpisodeStore.open(self.store)
            self._ledger = Ledger(self.store)
        self._greet()
        worked = False
        waiting = [i for i in self._reader.episode_ids() if i not in self._done]
        self.status.pending = len(waiting)
        for episode_id in waiting:
            if self.stop():
                return worked
            self._ship(episode_id)
            self.status.pending -= 1
            worked = True
        worked |= self._ship_rewards()
        self._make_room()
        return worked

    def run(self, poll_s: float = 0.5) -> None:
        """:meth:`step` until ``stop()``, with growing pauses while the learner cannot be reached."""
        backoff, event = Backoff(), threading.Event()
        while not self.stop():
            try:
                wait = 0.0 if self.step() else poll_s
                if self.status.last_error:
                    logger.info("the learner is back")
                self.status.last_error = ""
                backoff.reset()
            except (TransferError, OSError) as error:
                if str(error) != self.status.last_error:
                    logger.warning("shipping pauses: %s", error)
                self.status.last_error = str(error)
                wait = backoff.wait_s()
            until = time.monotonic() + wait
            while time.monotonic() < until and not self.stop():
                event.wait(min(0.2, max(until - time.monotonic(), 0.0)))

    # ---- inside

    def _greet(self) -> None:
        status, told, _ = self.client.ask("GET", "/v1/inbox")
        if status != 200 or not isinstance(told.get("inbox"), str):
            raise TransferError(f"/v1/inbox: status {status}: {told.get('error', 'the learner takes no episodes')}")
        target = f"{told['inbox']}.{self.robot}"
        if target != self._inbox:
            assert self._ledger is not None
            self._inbox = target
            self._done = self._ledger.read(self._inbox)
            self._marks = self._ledger.reward_marks(self._inbox)

    def _ship(self, episode_id: str) -> None:
        assert self._ledger is not None
        path = f"/v1/episodes/{self.robot}/{episode_id}"
        try:
            unit = EpisodeUnit(self.store, episode_id)
        except KeyError:  # set aside meanwhile
            return
        digest = unit.sha256()
        status, _, headers = self.client.ask("HEAD", path)
        offset = unit.size if status == 200 else _offset(headers) if status == 206 else 0
        if status not in (200, 206, 404):
            raise TransferError(f"HEAD {path}: status {status}")
        restarts = 0
        while True:
            while offset < unit.size:
                if self.stop():
                    return
                offset = self._send(path, unit, offset)
            body = json.dumps({"bytes": unit.size, "sha256": digest}).encode()
            status, told, headers = self.client.ask("POST", f"{path}/commit", body)
            if status in (200, 201):
                self._note(episode_id, "acknowledged", digest, unit.size)
                self.status.shipped += 1
                return
            if told.get("final"):
                logger.error("episode %s was refused for good: %s", episode_id, told.get("error"))
                self._note(episode_id, "refused", digest, unit.size)
                self.status.refused += 1
                return
            if status != 409 or "upload-offset" not in headers or restarts == 3:
                raise TransferError(f"commit of {path}: status {status}: {told.get('error', '')}")
            offset, restarts = _offset(headers), restarts + 1

    def _send(self, path: str, unit: EpisodeUnit, offset: int) -> int:
        began = time.monotonic()
        data = unit.read(offset, PART_BYTES)
        headers = {"Upload-Offset": str(offset), "X-Sha256": hashlib.sha256(data).hexdigest()}
        status, told, answered = self.client.ask("PATCH", path, data, headers)
        if status not in (200, 409) or "upload-offset" not in answered:
            raise TransferError(f"PATCH {path}: status {status}: {told.get('error', '')}")
        there = _offset(answered)
        if there > unit.size:
            raise TransferError(f"PATCH {path}: the learner has {there} bytes of {unit.size}")
        self.status.bytes += len(data) if status == 200 else 0
        if self.ship_mb_s:
            time.sleep(max(0.0, len(data) / (self.ship_mb_s * 1e6) - (time.monotonic() - began)))
        return there

    def _note(self, episode_id: str, state: str, digest: str, size: int) -> None:
        assert self._ledger is not None
        self._ledger.add(self._inbox, episode_id, state, digest, size)
        self._done[episode_id] = state

    def _ship_rewards(self) -> bool:
        """Every line of every log under its running number; the learner answers how far it has them."""
        worked = False
        store_id = hashlib.sha256(str(read_info(self.store)["created_ns"]).encode()).hexdigest()[:16]
        for log in sorted((self.store / "rewards").glob("*.jsonl")):
            source = log.stem
            data = log.read_bytes()
            lines = data[: data.rfind(b"\n") + 1].split(b"\n")[:-1]
            done = min(self._marks.get(source, 0), len(lines))
            while done < len(lines) and not self.stop():
                batch = b"".join(_numbered(n, lines[n - 1]) for n in range(done + 1, min(done + REWARD_LINES, len(lines)) + 1))
                status, told, _ = self.client.ask("POST", f"/v1/rewards/{self.robot}/{source}", batch, {"X-Store-Id": store_id})
                if status == 409:  # rewards of an episode that is still running came before the first episode
                    break
                reached = told.get("n")
                if status != 200 or not isinstance(reached, int):
                    raise TransferError(f"rewards of {source}: status {status}: {told.get('error', '')}")
                if reached == done:
                    raise TransferError(f"rewards of {source}: the learner stays at number {reached}")
                self.status.rewards += max(reached - done, 0)
                done, worked = reached, True
                self._marks[source] = done
        if worked and self._ledger is not None:
            self._ledger.save_reward_marks(self._inbox, self._marks)
        return worked

    def _make_room(self) -> None:
        """When the disk runs short the oldest acknowledged episodes go; unacknowledged ones never."""
        assert self._reader is not None
        while self.min_free_bytes and shutil.disk_usage(self.store).free < self.min_free_bytes:
            oldest = next((i for i in self._reader.episode_ids() if self._done.get(i) == "acknowledged"), None)
            if oldest is None:
                return
            with EpisodeStore.open(self.store, mode="a", recover=False) as store:
                store.discard(oldest)
            remove_tree(self.store / "discarded" / oldest)


def _offset(headers: Mapping[str, str]) -> int:
    """A connection that breaks among the headers leaves half a number or none; half a one is put right by the next answer."""
    text = headers.get("upload-offset", "")
    if not text.isdigit():
        raise TransferError(f"Upload-Offset {text!r}: the connection broke")
    return int(text)


def _numbered(number: int, line: bytes) -> bytes:
    try:
        event = json.loads(line)
    except ValueError:
        event = None
    return json.dumps({"n": number, "event": event}).encode() + b"\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="robot_rl.runtime.shipping", description="Ship episodes to a learner elsewhere.")
    parser.add_argument("store", type=Path, help="folder of the episode store (may not exist yet)")
    parser.add_argument("--url", required=True, help="the learner's endpoint, http(s)://host:port")
    parser.add_argument("--robot", required=True, help="name of this robot at the learner")
    parser.add_argument("--token-file", default="", help="file of mode 0600 with the bearer token")
    parser.add_argument("--ship-mb-s", type=float, default=20.0, help="most megabytes a second; 0: no limit")
    parser.add_argument("--min-free-gb", type=float, default=0.0, help="delete acknowledged episodes below this; 0: never")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    set_nice(10)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    Shipper(
        given.store, given.url, given.robot, token=read_token(token_file=given.token_file or None), ship_mb_s=given.ship_mb_s,
        min_free_bytes=int(given.min_free_gb * 1e9), stop=stop.is_set,
    ).run()  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
