"""The running episode: steps into RAM on the control thread, into the log on a thread of their own."""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from robot_rl.replay.errors import FULL, StoreError, StoreFullError, full_disk_is_clear
from robot_rl.replay.files import fsync_dir, write_all
from robot_rl.replay.schema import StoreSpec, check_decision, check_meta, meta_from_json, meta_to_json
from robot_rl.replay.wal import StepRows, decision_bytes, final_bytes, header_bytes
from robot_rl.types import Decision, Episode, EpisodeMeta, Observation, Step

_log = logging.getLogger(__name__)
BACKLOG_BYTES = 256 << 20
"""Steps in RAM that are not in the log yet; beyond it ``append`` waits for the disk."""


class Flusher:
    """One daemon thread that writes the logs of a store's running episodes and syncs them at a bounded interval.

    The control thread does no file work at all: a disk that is busy with something else (a checkpoint, a journal commit)
    would otherwise stall it for milliseconds to seconds.
    """

    def __init__(self, flush_interval_s: float, sync: bool):
        self.flush_interval_s = flush_interval_s
        self.write_interval_s = min(0.05, flush_interval_s / 2) if flush_interval_s else 0.05
        self.sync = sync
        self._logs: set[EpisodeWriter] = set()
        self._guard = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def add(self, writer: EpisodeWriter) -> None:
        with self._guard:
            self._logs.add(writer)
            if self._thread is None and self.flush_interval_s > 0:
                self._thread = threading.Thread(target=self._run, name="robot_rl-wal", daemon=True)
                self._thread.start()

    def remove(self, writer: EpisodeWriter) -> None:
        with self._guard:
            self._logs.discard(writer)

    def active(self) -> list[EpisodeWriter]:
        with self._guard:
            return list(self._logs)

    def _run(self) -> None:
        # A disk may be slow to sync; counting from the start of a sync keeps the interval the bound it is said to be.
        synced = time.monotonic()
        while not self._stop.wait(self.write_interval_s):
            due = time.monotonic() - synced >= self.flush_interval_s - self.write_interval_s
            if due:
                synced = time.monotonic()
            for writer in self.active():
                with suppress(OSError):  # kept in the writer, raised by its next append or commit
                    writer.drain(sync=due and self.sync)

    def stop(self) -> None:
        """Write what is left of every running episode and end the thread."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        for writer in self.active():
            try:
                writer.detach()
            except OSError as error:
                _log.error("the last steps of episode %s could not be logged: %s", writer.episode_id, error)


class EpisodeWriter:
    """Appends one episode to a store; made by :meth:`EpisodeStore.begin`.

    Leaving a ``with`` block without :meth:`commit` or :meth:`abort` keeps the log, from which the next opening of the store
    recovers the steps as a truncated episode. One thread may use a writer at a time.
    """

    def __init__(
        self,
        meta: EpisodeMeta,
        spec: StoreSpec,
        folder: Path,
        tmp: Path,
        writer_id: str,
        flusher: Flusher,
        finish: Callable[[Episode], None],
        submit: Callable[[Callable[[], None]], None],
        settle: Callable[[], None],
    ):
        self.meta = meta
        self._spec = spec
        self._flusher = flusher
        self._finish_episode = finish
        self._submit = submit
        self._settle = settle
        self._rows = StepRows(spec)
        self._decisions: list[Decision] = []
        self._final: bytes | None = None
        self._refused: Observation | None = None
        self._ended = False
        self._state = "open"
        self._io = threading.Lock()
        self._error: OSError | None = None
        self._written = [0, 0]  # steps and decisions that are in the log
        self._final_written = False
        self._dirty = True
        self._new_name = True
        self.path = folder / f"{meta.episode_id}.wal"
        self._fd = self._create(tmp, writer_id)
        flusher.add(self)

    def _create(self, tmp: Path, writer_id: str) -> int:
        # The log gets its name only once its header is whole, so a log without a readable header is nobody's running episode.
        draft = tmp / f"{writer_id}-{uuid.uuid4().hex}.wal"
        header = header_bytes(self.meta, self._spec, writer_id)
        with full_disk_is_clear(self.path, "starting the log"):
            fd = os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND, 0o644)
            try:
                write_all(fd, header)
                os.link(draft, self.path)
            except FileExistsError as error:
                os.close(fd)
                raise StoreError(
                    f"episode {self.episode_id!r} is already being written or waits for recovery: {self.path}"
                ) from error
            except BaseException:
                os.close(fd)
                raise
            finally:
                draft.unlink(missing_ok=True)
        self._offset = len(header)
        return fd

    @property
    def episode_id(self) -> str:
        return self.meta.episode_id

    def __len__(self) -> int:
        return self._rows.count

    def append(self, step: Step) -> None:
        """Log one step: microseconds, no file work on the caller's thread (unless ``flush_interval_s`` is 0).

        Raises:
            StoreFullError: the log cannot be written. This step and later ones are refused; ``commit`` keeps what came before.
            ValueError: the step does not fit the store, or follows one that ended the episode.
        """
        if self._state != "open":
            raise StoreError(f"episode {self.episode_id} is {self._state}: begin a new one")
        if self._ended:
            raise ValueError(f"episode {self.episode_id} ended at step {len(self) - 1}: commit it and begin a new one")
        if step.decision_id >= len(self._decisions):
            raise ValueError(
                f"step {len(self)}: decision_id={step.decision_id}, but only {len(self._decisions)} decisions were logged"
            )
        if self._error is not None or self._refused is not None:
            self._refuse(step)
        self._rows.append(step)
        if step.terminated or step.truncated:
            self._ended = True
        if self._flusher.flush_interval_s == 0:
            self.drain(sync=self._flusher.sync)
        elif (self._rows.count - self._written[0]) * self._rows.itemsize > BACKLOG_BYTES:
            self.drain(sync=False)

    def _refuse(self, step: Step) -> None:
        # After one refused step a later one would not follow the last logged one; its observation is where the episode stops.
        if self._refused is None:
            self._refused = {k: np.array(v) for k, v in step.observation.items()}
        error = self._error
        if error is None or error.errno in FULL:
            raise StoreFullError(
                self.path, "logging a step to", *([] if error is None or error.errno is None else [error.errno])
            ) from error
        raise StoreError(f"logging a step to {self.path}: {error}") from error

    def decide(self, decision: Decision) -> int:
        """Log one call of the policy before the steps that execute it; gives the ``decision_id`` for those steps.

        Raises:
            ValueError: noise or chunks do not fit the store, or chunks changed length within the episode.
        """
        number = len(self._decisions)
        who = f"episode {self.episode_id}: decision {number}"
        check_decision(decision, self._spec, len(self) + 1, who)
        if self._decisions and np.shape(decision.chunk) != self._decisions[0].chunk.shape:
            raise ValueError(
                f"{who}: chunk has shape {np.shape(decision.chunk)}, earlier ones {self._decisions[0].chunk.shape}"
            )
        self._decisions.append(
            Decision(
                step=int(decision.step),
                noise=None if decision.noise is None else np.array(decision.noise, np.float32),
                chunk_base=np.array(decision.chunk_base, np.float32),
                chunk=np.array(decision.chunk, np.float32),
                log_prob=float(decision.log_prob),
                candidate_index=int(decision.candidate_index),
                weights_version=int(decision.weights_version),
                explored=bool(decision.explored),
            )
        )
        return number

    def drain(self, *, sync: bool) -> None:
        """Write what the log lacks. A write that fails is undone, so the log always ends with a whole record."""
        with self._io:
            if self._fd < 0:
                return
            final, steps = self._final, self._rows.count
            decisions = len(self._decisions)  # read after the steps: a step's decision is always among them
            parts: list[bytes | memoryview] = [decision_bytes(d) for d in self._decisions[self._written[1] : decisions]]
            parts += self._rows.sealed(self._written[0], steps)
            if final is not None and not self._final_written:
                parts.append(final)
            try:
                for part in parts:
                    write_all(self._fd, part)
                if parts:
                    self._offset += sum(map(len, parts))
                    self._written = [steps, decisions]
                    self._final_written = final is not None
                    self._dirty = True
                if sync and self._dirty:
                    os.fdatasync(self._fd)
                    if self._new_name:
                        fsync_dir(self.path.parent)
                    self._dirty = self._new_name = False
            except OSError as error:
                self._error = error
                with suppress(OSError):
                    os.ftruncate(self._fd, self._offset)
                if error.errno in FULL:
                    raise StoreFullError(self.path, "writing the log", error.errno) from error
                raise
            self._error = None

    def commit(self, final_observation: Observation, *, success: bool | None = None, background: bool = False) -> Episode:
        """Close the episode and make it durable; gives it as arrays too, so that a learner here need not read it.

        An episode whose last step is neither ``terminated`` nor ``truncated`` was cut from outside and becomes ``truncated``.
        With ``background`` the disk work happens on the store's thread; :meth:`EpisodeStore.flush` waits for it and raises
        what went wrong there.

        Raises:
            StoreFullError: no space; the log keeps the episode, and ``commit`` may be called again.
            ValueError: no steps (use :meth:`abort`), or the observation does not fit.
        """
        if self._state not in ("open", "unsaved"):
            raise StoreError(f"episode {self.episode_id} is already {self._state}")
        if not len(self):
            raise ValueError(f"episode {self.episode_id} has no steps: abort it instead")
        observation = self._rows.observation_arrays(final_observation if self._refused is None else self._refused)
        meta = meta_from_json(meta_to_json(self.meta))  # a copy: the caller may go on using its own
        meta.episode_id = self.path.stem
        if success is not None:
            meta.success = bool(success)
        check_meta(meta, self._spec)
        final = final_bytes(meta, observation)
        episode = assemble(meta, self._spec, self._rows.column, list(self._decisions), observation)
        self.meta = meta
        self._final, self._final_written = final, False
        if background:
            self._state = "committed"
            self._submit(lambda: self._save(episode))
        else:
            self._settle()  # earlier episodes come earlier in the commit order
            self._save(episode)
        return episode

    def _save(self, episode: Episode) -> None:
        self._state = "unsaved"
        with suppress(OSError):  # the log is only the second line here; what matters is whether the episode itself is written
            self.drain(sync=False)
        self._finish_episode(episode)
        self._state = "committed"
        self._close(unlink=True)

    def abort(self) -> None:
        """Throw the episode away, log and all. A committed episode is not affected."""
        if self._state in ("open", "unsaved"):
            self._state = "aborted"
            self._close(unlink=True)

    def detach(self) -> None:
        """Leave the episode to recovery: its steps are logged and synced, and the log stays."""
        if self._fd >= 0:
            try:
                self.drain(sync=self._flusher.sync)
            finally:
                if self._state == "open":
                    self._state = "left to recovery"
                self._close(unlink=False)

    def _close(self, *, unlink: bool) -> None:
        self._flusher.remove(self)
        with self._io:
            if self._fd >= 0:
                if unlink:
                    self.path.unlink(missing_ok=True)
                os.close(self._fd)
                self._fd = -1
            self._rows.blocks = self._rows.blocks[:0] if unlink else self._rows.blocks

    def __enter__(self) -> EpisodeWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._state == "open":
            self.detach()


def assemble(meta: EpisodeMeta, spec: StoreSpec, column: Callable[..., np.ndarray], decisions: list[Decision],
             final: list[np.ndarray] | None) -> Episode:  # fmt: skip
    """An episode from logged columns. Without a final observation (a crash) the last one is repeated in its place."""
    observations: dict[str, Any] = {}
    for i, (name, feature) in enumerate(spec.observation_features.items()):
        rows = column(f"o:{name}", 1)
        rows[-1] = rows[-2] if final is None else final[i]
        observations[name] = rows.astype(feature.dtype, copy=False)
    # A decision whose first step was never logged has no observation in this episode.
    decisions = [d for d in decisions if d.step < len(next(iter(observations.values()))) - 1]
    columns = {name: column(name).astype(dtype, copy=False) for name, dtype in Episode.STEP_ARRAYS.items()}
    if not columns["terminated"][-1] and not columns["truncated"][-1]:
        columns["truncated"][-1] = True
    return Episode(meta=meta, observations=observations, decisions=decisions, **columns)
