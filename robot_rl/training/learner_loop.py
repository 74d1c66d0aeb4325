"""``LearnerLoop``: a learner that lives on episode stores alone, in whatever process its owner gives it.

It tails stores, updates, and publishes; nobody waits for it. Its folder holds::

    status.json      heartbeat (LearnerStatus)
    checkpoints/     everything an exact resume of the learner needs
    in_use.json      versions the acting side may come back to (written there): they are not pruned
    control.json     LearnerControl: pause, rates, an extra checkpoint (written by the owner)

Published versions are never taken back: after a crash the learner goes on from its checkpoint under the next free number,
because the acting side may be acting with the later ones.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from robot_rl.replay.errors import SchemaError
from robot_rl.replay.store import EpisodeStore, read_info
from robot_rl.replay.tailer import StoreTailer, Tailed
from robot_rl.runtime.weights import Manifest, WeightChannel
from robot_rl.training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from robot_rl.training.config import LearnerProcessConfig, MixtureConfig
from robot_rl.training.interrupt import Interrupted
from robot_rl.training.learner_control import IN_USE, LearnerControl, read_control
from robot_rl.training.learner_core import LearnerCore, LearningCounters
from robot_rl.training.learner_status import LearnerState, LearnerStatus
from robot_rl.types import Episode, RewardEvent, Stratum

logger = logging.getLogger(__name__)

SLICE = 50  # updates between two looks at everything else
HEARTBEAT_S = 0.5
EARNING = (Stratum.ONLINE, Stratum.INTERVENTION)
"""Strata whose steps are worth updates; demonstrations and prior data are not practice."""


@dataclass
class LoopCounters(LearningCounters):
    """Where the loop is; saved with its checkpoints."""

    episodes: int = 0
    episodes_refused: int = 0
    rewards_refused: int = 0
    updates_dropped: float = 0.0
    published_updates: int = -1
    share: float = 1.0  # of the base, in the newest episode

    def base_share(self, mixture: MixtureConfig) -> float:
        """What the acting side really did: it alone knows which version it had."""
        return self.share


class LearnerLoop:
    """Tail, learn, publish, checkpoint, say so.

    :meth:`step` does one bounded piece of work, for owners with a loop of their own; :meth:`run` is the loop.

    Args:
        core: made with a :class:`LoopCounters`.
        stores: to follow; they need not exist yet.
        channel: where heads are published. This loop is its only writer.
        folder: for heartbeat and checkpoints.
        stop: asked often; true ends :meth:`run` and cuts the warm-up short.
    """

    def __init__(
        self,
        core: LearnerCore,
        stores: Sequence[Path],
        channel: WeightChannel,
        folder: Path,
        settings: LearnerProcessConfig,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        if not isinstance(core.counters, LoopCounters):
            raise TypeError(f"core.counters is a {type(core.counters).__name__}; accepted is LoopCounters")
        self.core, self.channel, self.folder, self.settings, self.stop = core, channel, folder, settings, stop
        self.stores = [Path(s) for s in stores]
        self.status = LearnerStatus.begin()
        self._keys = list(core.base.spec.observation_features)
        self._tailer = StoreTailer(self.stores, keys=self._keys)
        self._where: dict[str, int] = {}  # episode to the store it came from
        self._clock = self._published = self._saved = time.monotonic()
        self._polled = self._beaten = -float("inf")
        self._defaults = settings, core.config
        self.control = replace(LearnerControl(), checkpoints=read_control(folder).checkpoints)
        folder.mkdir(parents=True, exist_ok=True)
        self.beat("starting")

    @property
    def counters(self) -> LoopCounters:
        assert isinstance(self.core.counters, LoopCounters)
        return self.core.counters

    # ---- the loop

    def run(self) -> None:
        """Work until ``stop()``, then save and say so. What goes wrong is left in the heartbeat, and raised."""
        try:
            while not self.stop():
                if not self.step():
                    time.sleep(self.settings.poll_s)
            self.checkpoint()
        except Interrupted:  # in the middle of the warm-up, which begins again from the checkpoint before it
            pass
        except BaseException as error:
            self.status.error = f"{type(error).__name__}: {error}"
            self.beat("failed")
            raise
        self.beat("stopped")

    def step(self) -> bool:
        """One bounded piece of work; False when there was nothing to learn from.

        Raises:
            Interrupted: ``stop()`` during the warm-up. FloatingPointError: parameters are not finite any more.
        """
        now = time.monotonic()
        self.counters.wall_seconds += now - self._clock
        self._clock = now
        if now - self._polled >= self.settings.poll_s:
            self._obey(read_control(self.folder))
            self._ingest_news()
            self._polled = time.monotonic()
        worked = not self.control.paused and self._learn()
        if self._publication_due():
            self.publish()
        if time.monotonic() - self._saved >= self.core.config.schedule.checkpoint_every_s:
            self.checkpoint()
        self._beat_if_due("paused" if self.control.paused else "learning" if self.core.warm else "collecting")
        return worked

    def _obey(self, control: LearnerControl) -> None:
        if control == self.control:
            return
        before, self.control = self.control, control
        settings, config = self._defaults
        schedule = replace(
            config.schedule,
            checkpoint_every_s=control.checkpoint_every_s or config.schedule.checkpoint_every_s,
            updates_per_step=control.updates_per_step or config.schedule.updates_per_step,
        )
        self.settings = replace(settings, publish_every_s=control.publish_every_s or settings.publish_every_s)
        self.core.config = replace(config, schedule=schedule)
        if control.checkpoints > before.checkpoints:
            self.checkpoint()

    def _learn(self) -> bool:
        core = self.core
        if core.offline_left:
            core.learn_offline(min(SLICE, core.offline_left), lambda: self._beat_if_due("offline"))
            if not core.offline_left and core.config.schedule.warmup_acting == "head":
                self.publish()
            return True
        if core.warm_up_due and core.ready:
            self.checkpoint()
            self.beat("warm-up")
            logger.info("critic warm-up on %d steps", len(core.buffer))
            core.warm_up(self._during_warm_up)
            self.publish()  # the untrained head: from here on the acting side may explore
            self.checkpoint()
            return True
        if not core.warm or self.counters.updates_owed < 1.0 or not core.ready:
            return False
        core.spend(SLICE, lambda: self._beat_if_due("learning"))
        return True

    def _during_warm_up(self) -> None:
        self._beat_if_due("warm-up")
        if self.stop():
            raise Interrupted

    # ---- data

    def _ingest_news(self) -> None:
        for news in self._tailer.poll():
            if news.episode is not None:
                self._ingest(news)
            for event in news.rewards:
                self._reward(event)
            self._beat_if_due("learning" if self.core.warm else "collecting")
            if self.stop():
                return

    def _ingest(self, news: Tailed) -> None:
        episode, c = news.episode, self.counters
        assert episode is not None
        if not self._add(episode):
            return
        self._where[episode.meta.episode_id] = self._store_of(episode.meta.episode_id)
        c.episodes += 1
        if episode.meta.stratum not in EARNING:
            return
        self.core.credit(len(episode))
        limit = self.settings.max_backlog_steps * self.core.config.schedule.updates_per_step
        if self.core.warm and c.updates_owed > limit:
            c.updates_dropped += c.updates_owed - limit
            c.updates_owed = limit
        if episode.meta.success is not None:
            c.remember([bool(episode.meta.success)])
        c.share = float(episode.meta.extra.get("base_share", c.share))

    def _add(self, episode: Episode) -> bool:
        """One bad episode must not end learning from all others."""
        try:
            self.core.ingest(episode)
        except ValueError as error:
            self.counters.episodes_refused += 1
            logger.error("episode refused: %s", error)
            return False
        return True

    def _store_of(self, episode_id: str) -> int:
        return next((i for i, path in enumerate(self.stores) if (path / "episodes" / episode_id).exists()), 0)

    def _reward(self, event: RewardEvent) -> None:
        try:
            self.core.reward(event)
        except ValueError as error:
            self.counters.rewards_refused += 1
            logger.error("reward event refused: %s", error)

    # ---- publishing

    def _publication_due(self) -> bool:
        settings, new = self.settings, self.core.learner.updates - self.counters.published_updates
        if not self.core.warm or new <= 0:
            return False
        by_updates = 0 < settings.publish_every_updates <= new
        return by_updates or time.monotonic() - self._published >= settings.publish_every_s

    def publish(self) -> Manifest:
        """Publish the head as it is now, and prune what nobody can come back to."""
        c, learner = self.counters, self.core.learner
        numbers = {"updates": learner.updates, "actor_updates": learner.actor_updates, "env_steps": c.env_steps}
        manifest = self.core.publish(self.channel, {name: float(value) for name, value in numbers.items()})
        c.version, c.published_updates = manifest.version, learner.updates
        self._published = time.monotonic()
        self.status.published_ns = time.time_ns()
        self.channel.prune(self.settings.keep_versions, protect=read_in_use(self.folder))
        self._beat_if_due("learning")
        return manifest

    # ---- what it tells

    def _beat_if_due(self, state: LearnerState) -> None:
        if time.monotonic() - self._beaten >= HEARTBEAT_S:
            self.beat(state)

    def beat(self, state: LearnerState) -> None:
        """Write the heartbeat now."""
        s, c, learner = self.status, self.counters, self.core.learner
        s.state, s.updates, s.actor_updates = state, learner.updates, learner.actor_updates
        s.env_steps, s.episodes, s.version = c.env_steps, c.episodes, c.version
        s.episodes_refused, s.rewards_refused = c.episodes_refused + len(self._tailer.damaged), c.rewards_refused
        s.updates_owed, s.updates_dropped = c.updates_owed, c.updates_dropped
        s.published_updates = max(c.published_updates, 0)
        s.write(self.folder)
        self._beaten = time.monotonic()

    # ---- saving and resuming

    def checkpoint(self) -> None:
        """Save learner, random state, what was ingested and how far every store was read."""
        cursors = self._tailer.cursors()
        ids = [i for i in self.core.buffer.episode_ids() if i in self._where]
        self._where = {i: self._where[i] for i in ids}
        state = {
            **self.core.state(),
            "counters": dict(vars(self.counters)),
            "stores": [[str(path), _identity(path)] for path in self.stores],
            "episodes": [[self._where[i], i] for i in ids],
            "cursors": [cursors[str(path)] for path in self.stores],
            "logs": self.core.folder.log_sizes(["metrics.jsonl"]),
        }
        name = f"updates-{self.core.learner.updates:09d}-episodes-{self.counters.episodes:07d}"
        save_checkpoint(self.folder / "checkpoints", name, self.core.tensors(), state)
        self._saved = time.monotonic()
        self.status.checkpoint_ns = time.time_ns()

    def _places(self, told: list[list[str]] | None) -> dict[int, int]:
        """Where the stores of a checkpoint are now: robots may have come and gone, and the run folder may have moved."""
        if told is None:  # a checkpoint of one store
            return {i: i for i in range(len(self.stores))}
        here = [[str(p), _identity(p)] for p in self.stores]
        found = {}
        for i, (path, identity) in enumerate(told):
            same = [k for k, (p, own) in enumerate(here) if (own == identity if identity else p == path)]
            if same:
                found[i] = next((k for k in same if here[k][0] == path), same[0])
        return found

    def resume(self) -> bool:
        """Continue from the latest checkpoint; False when there is none.

        Raises:
            ValueError: the checkpoint belongs to another configuration or base policy.
        """
        path = latest_checkpoint(self.folder / "checkpoints")
        if path is None:
            self.core.folder.rewind_logs({}, ["metrics.jsonl"])
            return False
        tensors, state = load_checkpoint(path)
        self.core.load(tensors, state, str(path))
        self.core.counters = LoopCounters(**state["counters"])
        self.core.folder.rewind_logs(state["logs"], ["metrics.jsonl"])
        opened: dict[int, EpisodeStore] = {}
        now_at = self._places(state.get("stores"))
        for told_index, episode_id in state["episodes"]:
            if (index := now_at.get(told_index, -1)) < 0:
                continue
            if index not in opened:
                opened[index] = EpisodeStore.open(self.stores[index])
            try:
                episode = opened[index].read(episode_id, self._keys)
            except (KeyError, ValueError) as error:  # set aside or damaged since
                logger.warning("episode %s is gone: %s", episode_id, error)
                continue
            if self._add(episode):
                self._where[episode_id] = index
            self._beat_if_due("starting")
        for store in opened.values():
            store.close()
        # Reward logs are read again from their start: events change nothing twice, and the tailer then knows all of them.
        cursors: dict[str, dict[str, Any]] = {
            str(self.stores[now_at[i]]): {**cursor, "rewards": {}} for i, cursor in enumerate(state["cursors"]) if i in now_at
        }
        self._tailer = StoreTailer(self.stores, keys=self._keys, cursors=cursors)
        self.beat("starting")
        return True


def _identity(store: Path) -> str:
    """What tells a store from another one at the same place; empty while there is none."""
    try:
        return str(read_info(store)["created_ns"])
    except (FileNotFoundError, SchemaError):
        return ""


def read_in_use(folder: Path) -> tuple[int, ...]:
    """Versions the acting side may come back to; none when it never said so."""
    try:
        return tuple(int(v) for v in json.loads((folder / IN_USE).read_bytes())["versions"])
    except FileNotFoundError:
        return ()
