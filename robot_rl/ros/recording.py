"""Episodes of policy_node: the store, the running episode's record, and what is said about it. No rclpy here."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from queue import Queue

from robot_rl.replay.store import EpisodeStore
from robot_rl.replay.ulid import new_ulid
from robot_rl.replay.writer import EpisodeWriter
from robot_rl.types import ActionSpec, Decision, Episode, EpisodeMeta, FeatureSpec, Observation, RewardEvent, Step, Stratum
from robot_rl.wire import EpisodeStatus, StepReward

FULL_GB, LOW_GB = 0.5, 2.0


class LossyWriter:
    """An :class:`EpisodeWriter` in a control loop that must go on when the disk does not: what cannot be logged is counted.

    From the first step that the log refused on nothing more is recorded; what came before is committed as a truncated episode.
    """

    def __init__(self, writer: EpisodeWriter, warn: Callable[[str], None]) -> None:
        self._writer, self._warn = writer, warn
        self._decisions = 0
        self.lost = 0

    @property
    def meta(self) -> EpisodeMeta:
        return self._writer.meta

    def append(self, step: Step) -> None:
        if not self.lost:
            try:
                return self._writer.append(step)
            except OSError as error:
                self._warn(f"episode {self.meta.episode_id} is recorded up to step {len(self._writer)}: {error}")
        self.lost += 1

    def decide(self, decision: Decision) -> int:
        number = self._decisions if self.lost else self._writer.decide(decision)
        self._decisions = number + 1
        return number

    def commit(
        self, final_observation: Observation, *, success: bool | None = None, background: bool = False
    ) -> Episode | None:
        """None where not a single step could be logged."""
        if not len(self._writer):
            self._writer.abort()
            return None
        return self._writer.commit(final_observation, success=success, background=background)

    def abort(self) -> None:
        self._writer.abort()


class Recording:
    """Opens the store, begins and labels episodes, commits in the background, and publishes every change of state.

    Args:
        publish: takes each new :class:`EpisodeStatus`; called from this object's thread too.
        folder: of the store; None records nothing (episodes still have ids and states).
    """

    def __init__(
        self,
        publish: Callable[[EpisodeStatus], None],
        folder: Path | None,
        *,
        features: Mapping[str, FeatureSpec],
        action: ActionSpec,
        noise_shape: tuple[int, int] | None,
        chunk_horizon: int | None,
        base_hash: str,
        stats_hash: str,
        robot_hash: str,
        flush_s: float,
        warn: Callable[[str], None],
    ) -> None:
        self._publish, self._warn, self.folder = publish, warn, folder
        self.base_hash, self.stats_hash = base_hash, stats_hash
        self.store: EpisodeStore | None = None
        if folder is not None:
            self.store = self._open(folder, features, action, noise_shape, chunk_horizon, flush_s)
        self.status = EpisodeStatus(episode_id="", state="idle", index=0, step=0, robot_hash=robot_hash)
        self.index = 0
        self.last_label: RewardEvent | None = None
        self._queue: Queue[tuple[EpisodeStatus, bool | None] | StepReward | None] = Queue()
        self._thread = threading.Thread(target=self._settle, name="commits", daemon=True)
        self._thread.start()
        self.say(state="idle")

    def _open(
        self,
        folder: Path,
        features: Mapping[str, FeatureSpec],
        action: ActionSpec,
        noise_shape: tuple[int, int] | None,
        chunk_horizon: int | None,
        flush_s: float,
    ) -> EpisodeStore:
        if not (folder / "store.json").exists():
            return EpisodeStore.create(
                folder, observation_features=features, action=action, noise_shape=noise_shape, chunk_horizon=chunk_horizon,
                stats_hash=self.stats_hash, flush_interval_s=flush_s,
            )  # fmt: skip
        store = EpisodeStore.open(folder, mode="a")
        if dict(store.observation_features) != dict(features) or store.action.dim != action.dim:
            store.close()
            raise ValueError(
                f"store={str(folder)!r} holds episodes with {sorted(store.observation_features)} and {store.action.dim} action "
                f"dimensions; this policy and robot have {sorted(features)} and {action.dim}: name another folder"
            )
        return store

    # ---- the running episode

    def free_gb(self) -> float:
        if self.folder is None:
            return float("inf")
        return shutil.disk_usage(self.folder).free / 1e9

    def begin(
        self, *, task: str, robot: str, control_hz: float, version: int, extra: dict, now_ns: int, record: bool
    ) -> LossyWriter | None:
        """A new episode, running.

        Raises:
            OSError: less than 0.5 GB are free on the store's disk.
        """
        if self.store is not None and record and (free := self.free_gb()) < FULL_GB:
            raise OSError(f"{free:.2f} GB are free in {self.folder}: an episode needs {FULL_GB} GB to begin")
        identity = new_ulid()
        writer: LossyWriter | None = None
        if self.store is not None and record:
            meta = EpisodeMeta(
                identity, task=task, env_id=f"robot/{robot}", stratum=Stratum.ONLINE, weights_version=version,
                base_hash=self.base_hash, stats_hash=self.stats_hash, control_hz=control_hz, extra=extra,
            )  # fmt: skip
            writer = LossyWriter(self.store.begin(meta), self._warn)
        self.index += 1
        self.status = EpisodeStatus(
            episode_id=identity, state="running", index=self.index, step=0, task=task or None, outcome="none", control="hold",
            weights_version=version, base_hash=self.base_hash or None, stats_hash=self.stats_hash or None, started_ns=now_ns,
            store_uri=self.folder.resolve().as_uri() if writer is not None and self.folder is not None else None,
            robot_hash=self.status.robot_hash,
        )  # fmt: skip
        self._publish(self.status)
        return writer

    def say(self, **changes: object) -> None:
        """Publish the status with some fields changed."""
        self.status = replace(self.status, **changes)  # type: ignore[arg-type]
        self._publish(self.status)

    def ended(self, *, recorded: bool, label: bool | None, **changes: object) -> None:
        """The episode is over; once it is on disk, its label is written and ``committed`` is said."""
        self.say(state="ended", **changes)
        if recorded:
            self._queue.put((self.status, label))

    def aborted(self, **changes: object) -> None:
        self.say(state="aborted", **changes)

    # ---- rewards and labels

    def note(self, reward: StepReward) -> None:
        """Write down an event that its publisher could not (``recorded=false``), in this object's thread: nobody here waits for a disk."""
        if self.store is not None and not reward.recorded:
            self._queue.put(reward)

    def _write(self, reward: StepReward) -> None:
        assert self.store is not None
        known = self.store.reward_history(reward.episode_id) if reward.episode_id in self.store else []
        if all(e.event_id != reward.event_id for e in known):
            self.store.append_reward(reward.to_event())

    def undo_label(self) -> str:
        """Revoke the last outcome label; the sentence to answer with. Raises ValueError when there is none."""
        label = self.last_label
        if self.store is None or label is None:
            raise ValueError("no episode was labelled in this session")
        self.store.append_reward(
            replace(label, event_id="", value=float("nan"), valid=False, reason="undone", revokes=label.event_id)
        )
        self.last_label = None
        return f"the label of episode {label.episode_id} is revoked"

    # ---- the thread

    def _settle(self) -> None:
        while (item := self._queue.get()) is not None:
            if isinstance(item, StepReward):
                try:
                    self._write(item)
                except (OSError, ValueError, RuntimeError) as error:
                    self._warn(f"a reward of episode {item.episode_id} could not be written down: {error}")
                continue
            status, label = item
            assert self.store is not None
            try:
                self.store.flush()
                if status.episode_id not in self.store:
                    raise ValueError("not a single step of it could be logged")
                if label is not None:
                    self.last_label = self.store.set_success(status.episode_id, label)
            except (OSError, ValueError, RuntimeError, KeyError) as error:
                self._warn(f"episode {status.episode_id} could not be committed: {error}")
                continue
            committed = replace(status, state="committed")
            if self.status.episode_id == status.episode_id:
                self.status = committed
            self._publish(committed)

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join(4.0)
        if self.store is not None:
            self.store.close()
