"""The promotion gate of a running session: outcomes come from recorded episodes, whoever recorded them.

With the gate on, the base acts until enough of its own outcomes are known; then a candidate gets a share of the episodes until
it is promoted or rejected. Without it every published version acts. An operator may overrule both.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robot_rl.replay.errors import SchemaError
from robot_rl.replay.files import replace_json
from robot_rl.replay.store import EpisodeStore
from robot_rl.runtime.gate import GateConfig, GateEvent, PromotionGate

logger = logging.getLogger(__name__)

MODE = "explore"  # how heads act on robots that are learning


@dataclass(frozen=True)
class Standing:
    """Which versions act: ``promoted`` (0 is the base), and ``candidate`` in a ``share`` of the episodes (0: none)."""

    promoted: int = 0
    candidate: int = 0
    share: float = 0.0
    state: str = ""  # of the candidate: candidate, probation


class LiveGate:
    """Gate, evidence and overrides of one session, saved after every change."""

    def __init__(self, config: GateConfig, path: Path, *, enabled: bool = True) -> None:
        self.gate, self.path, self.enabled = PromotionGate(config), path, enabled
        self.newest = 0
        self.forced: list[int] = []  # versions an operator chose, the last one acts
        self.base = [0, 0]  # successes and episodes of the base
        self.refused: set[int] = set()
        self._counted: set[str] = set()
        if path.exists():
            self._load(json.loads(path.read_bytes()))

    @property
    def standing(self) -> Standing:
        if self.forced:
            return Standing(self.forced[-1])
        if not self.enabled:
            return Standing(self.newest)
        on = self.gate.on_probation
        if on is not None:
            return Standing(self.gate.acting, on, self.gate.share, "probation")
        return Standing(self.gate.acting)

    def offer(self, version: int, sha256: str) -> list[GateEvent]:
        """A new version was published."""
        if version <= self.newest:
            return []
        self.newest = version
        events = self.gate.submit(version, MODE, sha256) if self.enabled and self.gate.has_reference else []
        self._save()
        return events

    def record(self, episode_id: str, version: int, success: bool) -> list[GateEvent]:
        """The outcome of one episode, counted once."""
        if episode_id in self._counted:
            return []
        self._counted.add(episode_id)
        events: list[GateEvent] = []
        if version == 0:
            self.base = [self.base[0] + int(success), self.base[1] + 1]
            if self.enabled and not self.gate.has_reference and self.base[1] >= self.gate.config.reference_n_min:
                self.gate.set_reference(*self.base)
        elif self.enabled and version == self.gate.on_probation:
            events = self.gate.record(version, success, mode=MODE)
        elif self.enabled and version == self.gate.acting:
            events = self.gate.record_acting(success, version)
        self._save()
        return events

    def promote(self) -> int:
        """Let the newest version act without further proof. Raises ValueError when there is none."""
        if not self.newest:
            raise ValueError("no version has been published yet")
        self.forced.append(self.newest)
        self._save()
        return self.newest

    def rollback(self) -> int:
        """Return to what acted before; gives the version (0: the base). Raises ValueError when the base acts already."""
        now = self.standing.promoted
        if now == 0:
            raise ValueError("the base policy acts already")
        if self.forced:
            self.forced.pop()
        elif self.enabled:
            self.gate.fail(now, "an operator rolled it back")
        if self.standing.promoted == now:  # without a gate, the newest version would act again at once
            self.forced.append(0)
        self._save()
        return self.standing.promoted

    def _save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        state: dict[str, Any] = {
            "gate": self.gate.state_dict(), "newest": self.newest, "forced": self.forced, "base": self.base,
            "counted": sorted(self._counted)[-20_000:],
        }  # fmt: skip
        replace_json(self.path, state, sync=False)

    def _load(self, state: dict[str, Any]) -> None:
        self.gate.load_state_dict(state["gate"])
        self.newest, self.forced, self.base = int(state["newest"]), list(state["forced"]), list(state["base"])
        self._counted = set(state["counted"])


class OutcomeReader:
    """Outcomes of the episodes of many stores, each once, as soon as somebody has said how it ended."""

    def __init__(self, stores: list[Path], *, patience: int = 500) -> None:
        self.stores, self.patience = stores, patience
        self._open: dict[Path, EpisodeStore] = {}
        self._seen: dict[Path, int] = {}
        self._waiting: dict[Path, list[str]] = {}
        self.episodes = self.successes = self.steps = 0

    def poll(self) -> list[tuple[str, int, bool]]:
        """(episode, version, success) of what became known since the last call; never waits."""
        found = []
        for path in self.stores:
            if path not in self._open:
                try:
                    self._open[path] = EpisodeStore.open(path)
                except (FileNotFoundError, SchemaError) as error:
                    if isinstance(error, SchemaError):
                        logger.error("%s", error)
                    continue
                self._seen[path], self._waiting[path] = 0, []
            store, waiting = self._open[path], self._waiting[path]
            for episode_id in store.episode_ids():
                attributes = store.attributes(episode_id)
                if attributes["sequence"] > self._seen[path]:
                    self._seen[path] = attributes["sequence"]
                    self.episodes += 1
                    self.steps += int(attributes["length"])
                    if attributes["meta"]["stratum"] in ("online", "intervention"):
                        waiting.append(episode_id)
            del waiting[: -self.patience]
            for episode_id in list(waiting):
                try:
                    meta = store.meta(episode_id)
                except KeyError:  # set aside
                    waiting.remove(episode_id)
                    continue
                if meta.success is not None:
                    waiting.remove(episode_id)
                    self.successes += int(meta.success)
                    found.append((episode_id, meta.weights_version, bool(meta.success)))
        return found
