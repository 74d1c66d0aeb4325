"""``EpisodeStore``: episodes on disk, crash-safe and append-only.

Layout of a store (schema 1)::

    store.json               what every episode of this store looks like, and who made the store
    episodes/<id>/           one zarr v3 group per committed episode, never rewritten
    rewards/<source>.jsonl   reward events, appended at any time
    wal/<id>.wal             running episodes (write-ahead logs)
    tmp/                     work in progress; nothing in it is ever read
    writers/<id>.lock        held by live writers
    discarded/               what a person or recovery set aside
    commit.lock              serialises the last step of a commit and counts commits

An episode is written in ``tmp``, synced, and renamed in, so a reader sees all of it or nothing.
"""

from __future__ import annotations

import json
import os
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from robot_rl import __version__
from robot_rl.replay.episode_files import load_arrays, read_attributes, read_episode, seal_episode, write_episode
from robot_rl.replay.errors import SchemaError, StoreError, full_disk_is_clear
from robot_rl.replay.files import WriterLock, fsync_dir, locked, replace_json
from robot_rl.replay.index import EpisodeIndex
from robot_rl.replay.recovery import RecoverReport, recover_logs
from robot_rl.replay.reward_log import LABEL_SOURCE, RewardLog, RewardTable, check_event
from robot_rl.replay.schema import (
    FORMAT,
    SCHEMA_VERSION,
    StoreSpec,
    check_episode,
    check_episode_id,
    check_meta,
    git_revision,
    meta_from_json,
)
from robot_rl.replay.ulid import new_ulid
from robot_rl.replay.writer import EpisodeWriter, Flusher
from robot_rl.replay.zarr_episode import remove_tree
from robot_rl.types import ActionSpec, Episode, EpisodeMeta, FeatureSpec, RewardEvent, RewardKind, Stratum

FOLDERS = ("episodes", "rewards", "wal", "tmp", "writers", "discarded")
MAX_PENDING_COMMITS = 64


@dataclass(frozen=True)
class TailCursor:
    """How far a reader has come: the last commit seen and the byte reached in each reward log."""

    sequence: int = 0
    rewards: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"sequence": self.sequence, "rewards": dict(self.rewards)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TailCursor:
        return cls(int(data["sequence"]), dict(data["rewards"]))


@dataclass(frozen=True)
class StoreSummary:
    """Counts over all committed episodes."""

    path: str
    episodes: int
    steps: int
    strata: dict[str, int]
    successes: int
    failures: int
    unknown: int
    recovered: int
    running: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class EpisodeStore:
    """A folder of episodes. Make one with :meth:`create`, open one with :meth:`open`; usable as a context manager.

    Any number of processes may read, and any number may append; each running episode belongs to one writer. The methods of
    one store object may be called from several threads.
    """

    def __init__(self, path: Path, spec: StoreSpec, info: Mapping[str, Any], mode: str, *, sync: bool):
        self.path = path
        self.spec = spec
        self.info = dict(info)
        self.mode = mode
        self._sync = sync
        self._index = EpisodeIndex(path / "episodes")
        self._log = RewardLog(path / "rewards", sync=sync)
        self._table = RewardTable()
        self._table_offsets: dict[str, int] = {}
        self._table_guard = threading.Lock()
        self._futures: list[Future[None]] = []
        self._pool: ThreadPoolExecutor | None = None
        self._closed = False
        self._stamps = lru_cache(maxsize=4096)(self._read_stamps)
        self._lock: WriterLock | None = None
        self._flusher: Flusher | None = None
        if mode == "a":
            self._lock = WriterLock(path / "writers")
            self._flusher = Flusher(spec.flush_interval_s, sync)
            # Runs at interpreter exit too: the last steps of a script that forgot to close are logged.
            self._finalizer = weakref.finalize(self, _stop, self._flusher, self._lock, os.getpid())

    # ------------------------------------------------------------------ making and opening

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        *,
        observation_features: Mapping[str, FeatureSpec],
        action: ActionSpec,
        noise_shape: tuple[int, int] | None = None,
        chunk_horizon: int | None = None,
        stats_hash: str = "",
        flush_interval_s: float = 0.5,
        image_codec: str = "lossless",
        jpeg_quality: int = 90,
        sync: bool = True,
    ) -> EpisodeStore:
        """Make an empty store and open it for appending.

        Args:
            noise_shape: (H_w, A_w) of the noise that decisions carry; ``None`` refuses decisions with noise.
            chunk_horizon: H of every decision's chunk; ``None`` lets each episode bring its own.
            stats_hash: of the normalisation statistics; an episode that names another one is refused.
            flush_interval_s: at most this much of a running episode is lost when the power goes; 0 syncs every step.
            image_codec: ``lossless`` or ``jpeg`` for (H, W, 3) uint8 features on disk.
            sync: ``False`` skips every fsync: a killed process loses nothing more, a power cut may.

        Raises:
            FileExistsError: there is a store already.
            ValueError: a feature name, codec or interval that is not accepted.
        """
        root = Path(path)
        spec = StoreSpec(
            observation_features, action, noise_shape, chunk_horizon, stats_hash, flush_interval_s, image_codec, jpeg_quality
        )
        if (root / "store.json").exists():
            raise FileExistsError(f"{root} already holds a store; open it with EpisodeStore.open({str(root)!r}, mode='a')")
        info = {
            "format": FORMAT,
            "schema_version": SCHEMA_VERSION,
            "created_ns": time.time_ns(),
            "robot_rl_version": __version__,
            "git_revision": git_revision(),
            **spec.to_json(),
        }
        with full_disk_is_clear(root, "creating the store"):
            for name in FOLDERS:
                (root / name).mkdir(parents=True, exist_ok=True)
            replace_json(root / "store.json", info, sync=sync)
        return cls(root, spec, info, "a", sync=sync)

    @classmethod
    def open(cls, path: str | os.PathLike[str], mode: str = "r", *, sync: bool = True, recover: bool = True) -> EpisodeStore:
        """Open a store for reading (``r``) or appending (``a``). Appending recovers what dead writers left behind.

        Raises:
            FileNotFoundError: no store there.
            SchemaError: written by another version of the format.
        """
        if mode not in ("r", "a"):
            raise ValueError(f"mode={mode!r}: accepted are 'r' (read) and 'a' (append)")
        root = Path(path)
        info = read_info(root)
        store = cls(root, StoreSpec.from_json(info), info, mode, sync=sync)
        if mode == "a" and recover:
            store.recover()
        return store

    def close(self) -> None:
        """Wait for background commits, leave unfinished episodes to recovery, release the store. Raises what commits raised."""
        if self._closed:
            return
        self._closed = True
        try:
            self._wait()
        finally:
            if self._pool is not None:
                self._pool.shutdown()
            if self.mode == "a":
                self._finalizer()

    def __enter__(self) -> EpisodeStore:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"EpisodeStore({str(self.path)!r}, mode={self.mode!r}, episodes={len(self)})"

    @property
    def observation_features(self) -> Mapping[str, FeatureSpec]:
        return self.spec.observation_features

    @property
    def action(self) -> ActionSpec:
        return self.spec.action

    def _writable(self) -> WriterLock:
        if self._lock is None:
            raise StoreError(f"{self.path} is open for reading; open it with mode='a' to append")
        if self._closed:
            raise StoreError(f"{self.path} is closed")
        return self._lock

    # ------------------------------------------------------------------ writing

    def begin(self, meta: EpisodeMeta) -> EpisodeWriter:
        """Start an episode; an empty ``meta.episode_id`` becomes a new ULID.

        Raises:
            HeldOutSeedError: ``meta.seed`` is an evaluation or final seed.
            StoreError: the id is taken, or the store is not open for appending.
            SchemaError: ``meta.stats_hash`` differs from the store's.
        """
        lock = self._writable()
        assert self._flusher is not None
        meta = self._new_meta(meta)
        store = weakref.ref(self)

        def finish(episode: Episode) -> None:
            (store() or self)._write(episode)

        return EpisodeWriter(
            meta,
            self.spec,
            self.path / "wal",
            self.path / "tmp",
            lock.writer_id,
            self._flusher,
            finish,
            self._submit,
            self._settle,
        )

    def add(self, episode: Episode) -> str:
        """Write a whole episode at once (imports); gives its id.

        Raises:
            HeldOutSeedError, SchemaError, StoreError: as :meth:`begin`.
            ValueError: an array does not fit the store; the message names it.
        """
        self._writable()
        check_episode(episode, self.spec)
        episode = replace(episode, meta=self._new_meta(episode.meta))
        if not (episode.terminated[-1] or episode.truncated[-1]):
            truncated = episode.truncated.copy()
            truncated[-1] = True
            episode = replace(episode, truncated=truncated)
        self._settle()
        self._write(episode)
        return episode.meta.episode_id

    def _new_meta(self, meta: EpisodeMeta) -> EpisodeMeta:
        check_meta(meta, self.spec)
        meta = replace(
            meta, episode_id=check_episode_id(meta.episode_id or new_ulid()), stats_hash=meta.stats_hash or self.spec.stats_hash
        )
        if self.taken(meta.episode_id):
            raise StoreError(f"episode_id={meta.episode_id!r} is taken in {self.path}; give another one or leave it empty")
        return meta

    def taken(self, episode_id: str) -> bool:
        """Whether an episode of this id was ever committed here; one that was set aside keeps its id."""
        return any((self.path / folder / check_episode_id(episode_id)).exists() for folder in ("episodes", "discarded"))

    def _write(self, episode: Episode) -> None:
        """Make one episode durable. Nothing of it is visible unless all of it is."""
        lock = self._writable() if not self._closed else self._lock
        assert lock is not None
        final = self.path / "episodes" / episode.meta.episode_id
        work = self.path / "tmp" / f"{lock.writer_id}-{uuid.uuid4().hex}"
        try:
            with full_disk_is_clear(final, "committing episode"):
                work.mkdir()
                attributes, consolidated = write_episode(work, episode, self.spec, sync=self._sync)
                with locked(self.path / "commit.lock") as fd:
                    if final.exists():
                        raise StoreError(f"episode_id={episode.meta.episode_id!r} is already committed in {self.path}")
                    # Counted under the lock: whoever has seen commit k has seen every commit before it.
                    sequence = max(int(os.pread(fd, 32, 0) or b"0"), self._index.last_sequence) + 1
                    attributes |= {"sequence": sequence, "committed_ns": time.time_ns(), "writer": lock.writer_id}
                    seal_episode(work, attributes, consolidated, sync=self._sync)
                    os.pwrite(fd, b"%020d" % sequence, 0)
                    os.rename(work, final)
                if self._sync:
                    fsync_dir(final.parent)
        except BaseException:
            remove_tree(work)
            raise

    def _submit(self, work: Callable[[], None]) -> None:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="robot_rl-commit")
        running = [f for f in self._futures if not f.done() or f.exception() is not None]
        pending = [f for f in running if not f.done()]
        if len(pending) >= MAX_PENDING_COMMITS:  # a disk slower than the robot must not fill the memory
            pending[0].exception()
        self._futures = [*running, self._pool.submit(work)]

    def _settle(self) -> None:
        """Wait for background commits; what they raised stays for :meth:`flush`."""
        for future in list(self._futures):
            future.exception()

    def flush(self) -> None:
        """Wait for background commits and sync running episodes' logs.

        Raises:
            StoreFullError, StoreError, OSError: the first thing that went wrong since the last call.
        """
        self._wait()
        if self._flusher is not None:
            for writer in self._flusher.active():
                writer.drain(sync=self._sync)

    def _wait(self) -> None:
        futures, self._futures = self._futures, []
        errors = [e for f in futures if (e := f.exception()) is not None]
        if errors:
            raise errors[0]

    def discard(self, episode_id: str) -> None:
        """Set an episode aside in ``discarded/``: it is no longer listed, read or tailed. Garbage collection deletes it."""
        self._writable()
        source = self.path / "episodes" / check_episode_id(episode_id)
        try:
            os.rename(source, self.path / "discarded" / episode_id)
        except FileNotFoundError:
            raise KeyError(f"no episode {episode_id!r} in {self.path}") from None
        if self._sync:
            fsync_dir(self.path / "discarded")
            fsync_dir(source.parent)
        self._index.forget(episode_id)

    def recover(self) -> RecoverReport:
        """Turn the logs of dead writers into truncated episodes; live writers' logs are left alone."""
        lock = self._writable()
        active = {w.episode_id for w in self._flusher.active()} if self._flusher else set()
        with locked(self.path / "wal" / ".recover.lock"):
            return recover_logs(self.path, self._write, own=lock.writer_id, running=active)

    # ------------------------------------------------------------------ reading

    def episode_ids(self, stratum: Stratum | str | None = None) -> list[str]:
        """Committed episodes in commit order, which is the same for every reader."""
        wanted = None if stratum is None else Stratum(stratum).value
        return [i for i, a in self._index.items() if wanted is None or a["meta"]["stratum"] == wanted]

    def __len__(self) -> int:
        return len(self._index.items())

    def __contains__(self, episode_id: object) -> bool:
        return isinstance(episode_id, str) and (self.path / "episodes" / episode_id / "zarr.json").exists()

    def attributes(self, episode_id: str) -> dict[str, Any]:
        """The stored header of an episode: ``length``, ``sequence``, ``committed_ns``, ``hashes``, ``meta`` ..."""
        return self._index.get(check_episode_id(episode_id))

    def meta(self, episode_id: str) -> EpisodeMeta:
        """An episode's metadata; ``success`` is the latest word of :meth:`set_success`, else what was committed."""
        return self._labelled(meta_from_json(self.attributes(episode_id)["meta"]))

    def _labelled(self, meta: EpisodeMeta) -> EpisodeMeta:
        labels = [e for e in self.rewards(meta.episode_id) if e.source == LABEL_SOURCE and e.valid]
        if labels:
            meta.success = max(labels, key=lambda e: e.event_id).value > 0.5
        return meta

    def read(self, episode_id: str, keys: Collection[str] | None = None) -> Episode:
        """Load an episode; ``keys`` names the observation features to decode (``None``: all).

        Raises:
            KeyError: no such episode or feature.
            CorruptEpisodeError: its files are damaged; ``robot-rl store verify`` says which.
        """
        try:
            episode = read_episode(self.path / "episodes" / check_episode_id(episode_id), self.spec, keys)
        except FileNotFoundError:
            raise KeyError(f"no episode {episode_id!r} in {self.path}") from None
        self._labelled(episode.meta)
        return episode

    def summary(self) -> StoreSummary:
        attributes = [a for _, a in self._index.items()]
        metas = [self.meta(i) for i, _ in self._index.items()]
        strata = {s.value: sum(m.stratum is s for m in metas) for s in Stratum}
        return StoreSummary(
            path=str(self.path),
            episodes=len(attributes),
            steps=sum(a["length"] for a in attributes),
            strata={k: n for k, n in strata.items() if n},
            successes=sum(m.success is True for m in metas),
            failures=sum(m.success is False for m in metas),
            unknown=sum(m.success is None for m in metas),
            recovered=sum(m.recovered for m in metas),
            running=sum(1 for _ in (self.path / "wal").glob("*.wal")),
        )

    # ------------------------------------------------------------------ rewards

    def append_reward(self, *events: RewardEvent) -> list[RewardEvent]:
        """Append reward events, durable on return; gives them with their ids (an event without one gets a new ULID).

        The episode may still be running, or unknown to this store as yet.
        """
        self._writable()
        named = [check_event(e) for e in events]
        with full_disk_is_clear(self.path / "rewards", "appending reward events to"):
            self._log.append(named)
        return named

    def set_success(
        self, episode_id: str, success: bool, *, model_id: str = "human:operator", revokes: str = ""
    ) -> RewardEvent:
        """Say whether a committed episode succeeded. Its arrays stay as they are; the word is an event about its end."""
        length = self.attributes(episode_id)["length"]
        event = RewardEvent(
            episode_id, length, LABEL_SOURCE, float(success), RewardKind.SUCCESS, model_id=model_id, revokes=revokes
        )
        return self.append_reward(event)[0]

    def rewards(self, episode_id: str) -> list[RewardEvent]:
        """The active events of an episode, by step, then source.

        Of the events of one (step, source) the valid, unrevoked one with the greatest id is active, whatever the order of
        arrival. An event whose ``stamp_ns`` contradicts the logged stamp is quarantined: invalid, ``stamp_mismatch``.
        """
        with self._table_guard:
            self._refresh_table()
            return self._table.active(episode_id, self.checked)

    def reward_history(self, episode_id: str) -> list[RewardEvent]:
        """Every event ever appended about an episode, replaced and revoked ones included, by id."""
        with self._table_guard:
            self._refresh_table()
            return self._table.history(episode_id)

    def _refresh_table(self) -> None:
        events, self._table_offsets, _ = self._log.read(self._table_offsets)
        for event in events:
            self._table.add(event)

    def checked(self, event: RewardEvent) -> RewardEvent:
        """The event, or its invalid twin when its stamp contradicts the committed episode's."""
        if not event.valid or not event.stamp_ns:
            return event
        try:
            stamps = self._stamps(event.episode_id)
        except (KeyError, ValueError):
            return event
        if event.step < len(stamps) and stamps[event.step] not in (0, event.stamp_ns):
            return replace(event, value=float("nan"), valid=False, reason="stamp_mismatch")
        return event

    def _read_stamps(self, episode_id: str) -> np.ndarray:
        folder = self.path / "episodes" / check_episode_id(episode_id)
        try:
            _, consolidated = read_attributes(folder)
        except FileNotFoundError:
            raise KeyError(episode_id) from None
        return load_arrays(folder, consolidated, ["stamp_ns"])["stamp_ns"]

    # ------------------------------------------------------------------ following

    def tail(self, cursor: TailCursor | None = None) -> tuple[list[str], list[RewardEvent], TailCursor]:
        """What is new since ``cursor`` (``None``: ever): committed episodes in order, reward events, the new cursor.

        For a reader in another process while writers are active; it never waits. Events come as they were appended, before
        the rule of :meth:`rewards`, and may be about episodes that are not committed yet.
        """
        cursor = cursor or TailCursor()
        items = self._index.items()
        new = [i for i, a in items if a["sequence"] > cursor.sequence]
        last = max([cursor.sequence, *(a["sequence"] for _, a in items[-1:])])
        events, offsets, _ = self._log.read(cursor.rewards)
        return new, events, TailCursor(last, offsets)


def read_info(root: Path) -> dict[str, Any]:
    """``store.json``. Raises FileNotFoundError or SchemaError with what was found."""
    path = root / "store.json"
    try:
        info = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"{root} holds no episode store (no store.json)") from None
    except ValueError as error:
        raise SchemaError(f"{path} cannot be read: {error}") from error
    if info.get("format") != FORMAT:
        raise SchemaError(f"{path}: format={info.get('format')!r}, accepted is {FORMAT!r}")
    if info.get("schema_version") != SCHEMA_VERSION:
        raise SchemaError(
            f"{root} was written with schema {info.get('schema_version')} (robot_rl {info.get('robot_rl_version', '?')}); "
            f"robot_rl {__version__} reads schema {SCHEMA_VERSION}: use the version that wrote it, or export and import again"
        )
    return info


def _stop(flusher: Flusher, lock: WriterLock, pid: int) -> None:
    if os.getpid() != pid:
        return  # a forked child owns neither the thread nor the lock
    flusher.stop()
    lock.release()


def open_or_create(path: str | os.PathLike[str], **options: Any) -> EpisodeStore:
    """Open for appending, or create with ``options`` (as :meth:`EpisodeStore.create`).

    Raises:
        SchemaError: the existing store holds other features, actions, noise or statistics; the message names which.
    """
    if not (Path(path) / "store.json").exists():
        return EpisodeStore.create(path, **options)
    store = EpisodeStore.open(path, mode="a", sync=options.get("sync", True))
    wanted = StoreSpec(**{k: v for k, v in options.items() if k != "sync"}).to_json()
    for name in ("observation_features", "action", "noise_shape", "chunk_horizon", "stats_hash"):
        have = store.spec.to_json()[name]
        if have != wanted[name]:
            store.close()
            raise SchemaError(f"{path} was created with {name}={have}; now asked for {wanted[name]}")
    return store
