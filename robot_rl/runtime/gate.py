"""The promotion gate: which version of the head may act.

A head version is a ``candidate``, then on ``probation``, then ``promoted`` or ``rejected``; a promoted one may be
``demoted``. With ``threshold = p_ref - margin``, where ``p_ref`` is the base policy's success, frozen for the run:

* promote when ``n >= n_min`` and the candidate's lower bound reaches the threshold (and, with ``min_gain``, beats the head
  that acts by that much);
* reject when its upper bound falls below the threshold, or at ``n_max``;
* roll back when the upper bound of the acting version, over the episodes since its promotion, falls below the threshold, and
  at once for NaN or a safety stop: to the best promoted version that is left, or the base.

The bound is the beta-binomial confidence sequence, which holds at every look (``runtime/bounds.py``). The gate is pure
logic: it has no clock, no randomness and no files, and ``state_dict`` is plain JSON that resumes exactly.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from robot_rl.runtime.bounds import Interval, check_counts, confidence_sequence, wilson

logger = logging.getLogger(__name__)

BASE = 0
"""The version number of the base policy."""

State = Literal["candidate", "probation", "promoted", "rejected", "demoted", "superseded"]
EventKind = Literal["candidate", "promoted", "rejected", "rolled_back"]


@dataclass(frozen=True)
class GateConfig:
    """Rules of the gate.

    Attributes:
        margin: how far below the base's success a promoted version may lie, in success rate.
        alpha: error rate of one bound, over all looks at one version.
        n_min, n_max: fewest and most probation episodes (``n_max`` 200 in simulation, 60 on hardware).
        reference: ``mean`` of the base's success, or its one-sided 80 % ``upper`` bound (recommended on hardware, where
            the base is measured on few episodes).
        bound: ``sequence`` may be looked at after every episode; ``wilson_fixed`` is looked at once, at ``n_max``.
        min_gain: what a candidate's lower bound must exceed the acting head's lower bound by before it takes over. A
            candidate that qualifies but does not yet beat it stays on probation, at most until ``n_max``, so that it
            can gather the evidence (in simulation the acting head then plays as many starts); ``None`` promotes at the threshold. (Then nearly every version is promoted with a lower
            bound just above the threshold, and one that has acted for long is not replaced by a better one.)
        reference_n_min: fewest base episodes that may set the reference.
        share_max: largest share of acting episodes that a candidate gets where probation is played on the real robot.
        mode: ``strict`` bounds that share by ``margin / p_ref``, so that even a candidate that never succeeds keeps acting
            success within the margin; ``fast`` lifts the bound, and results then carry the label.
    """

    margin: float = 0.05
    alpha: float = 0.05
    n_min: int = 10
    n_max: int = 200
    reference: Literal["mean", "upper"] = "mean"
    bound: Literal["sequence", "wilson_fixed"] = "sequence"
    min_gain: float | None = 0.0
    reference_n_min: int = 30
    share_max: float = 0.2
    mode: Literal["strict", "fast"] = "strict"

    def __post_init__(self) -> None:
        checks: list[tuple[str, bool, str]] = [
            ("margin", 0.0 <= self.margin < 1.0, "numbers in [0, 1)"),
            ("alpha", 0.0 < self.alpha < 0.5, "numbers in (0, 0.5)"),
            ("n_min", self.n_min >= 1, "integers >= 1"),
            ("n_max", self.n_max >= self.n_min, f"integers >= n_min ({self.n_min})"),
            ("reference", self.reference in ("mean", "upper"), "mean, upper"),
            ("bound", self.bound in ("sequence", "wilson_fixed"), "sequence, wilson_fixed"),
            ("min_gain", self.min_gain is None or 0.0 <= self.min_gain < 1.0, "null or numbers in [0, 1)"),
            ("reference_n_min", self.reference_n_min >= 1, "integers >= 1"),
            ("share_max", 0.0 < self.share_max <= 1.0, "numbers in (0, 1]"),
            ("mode", self.mode in ("strict", "fast"), "strict, fast"),
        ]
        for key, good, accepted in checks:
            if not good:
                raise ValueError(f"gate.{key}={getattr(self, key)!r}: accepted are {accepted}")

    @classmethod
    def hardware(cls, **changes: Any) -> GateConfig:
        """Defaults for real robots: at most 60 probation episodes, and the base's upper bound as the reference."""
        return cls(**{"n_max": 60, "reference": "upper", **changes})


@dataclass(frozen=True)
class GateEvent:
    """One decision, and the evidence it rests on: one line of ``gate.jsonl``.

    ``lower`` and ``upper`` bound the success of ``version``; for ``rolled_back`` over the episodes since its promotion.
    ``acting`` is the version that acts from the next episode on.
    """

    event: EventKind
    version: int
    mode: str
    successes: int
    n: int
    lower: float
    upper: float
    reference: float
    threshold: float
    acting: int
    acting_mode: str
    reason: str = ""

    def to_json(self, **extra: Any) -> dict[str, Any]:
        """The line to write; ``extra`` adds what the gate cannot know, such as ``env_steps``."""
        return {**extra, **asdict(self)}


@dataclass
class _Record:
    """What is known about one (version, mode)."""

    version: int
    mode: str
    key: str  # hash of the weights and mode: equal keys are equal policies
    state: State
    successes: int = 0  # probation
    n: int = 0
    acting_successes: int = 0  # since the last promotion
    acting_n: int = 0
    seeds: list[int] = field(default_factory=list)  # counted in the present probation


class PromotionGate:
    """Decides which version acts. Versions are integers from 1 on; 0 is the base.

    Explore and eval mode of one version act differently and are two candidates. One candidate is on probation at a time; a
    version that is submitted meanwhile waits, and only the newest one keeps waiting.
    """

    def __init__(self, config: GateConfig | None = None) -> None:
        self.config = config or GateConfig()
        self._reference: tuple[int, int] | None = None
        self._records: dict[tuple[int, str], _Record] = {}
        self._acting: tuple[int, str] | None = None  # None: the base
        self._probation: tuple[int, str] | None = None
        self._waiting: tuple[int, str] | None = None
        self._cache: dict[str, dict[int, bool]] = {}
        self._spent: dict[str, list[int]] = {}  # seeds of probations that ended in a demotion: they prove nothing twice
        self._late = 0

    # -- the reference ---------------------------------------------------------------------------------------------------

    def set_reference(self, successes: int, n: int) -> float:
        """Freeze the base's success for this run; returns ``p_ref``.

        Raises:
            ValueError: too few episodes, or a reference was set already.
        """
        check_counts(successes, n)
        if self._reference is not None and self._reference != (successes, n):
            old = self._reference
            raise ValueError(f"reference {successes}/{n}: the run's reference is {old[0]}/{old[1]} already and stays frozen")
        if n < self.config.reference_n_min:
            raise ValueError(
                f"reference from n={n} base episodes: accepted is n >= gate.reference_n_min ({self.config.reference_n_min})"
            )
        self._reference = (int(successes), int(n))
        if not self.promotable:
            logger.warning(
                "gate: with reference %.3f and margin %.3f not even %d of %d successes would promote; raise gate.n_max",
                self.p_ref, self.config.margin, self.config.n_max, self.config.n_max,
            )  # fmt: skip
        return self.p_ref

    @property
    def has_reference(self) -> bool:
        return self._reference is not None

    @property
    def p_ref(self) -> float:
        """The base's success that candidates are held against. Raises RuntimeError before :meth:`set_reference`."""
        if self._reference is None:
            raise RuntimeError("the gate has no reference: call set_reference with the base's successes first")
        k, n = self._reference
        return k / n if self.config.reference == "mean" else wilson(k, n, 0.6).high  # one-sided 80 %

    @property
    def threshold(self) -> float:
        """``p_ref - margin``."""
        return self.p_ref - self.config.margin

    @property
    def promotable(self) -> bool:
        """Whether a candidate that always succeeds could be promoted within ``n_max`` episodes."""
        return self.bound(self.config.n_max, self.config.n_max).low >= self.threshold

    def bound(self, successes: int, n: int) -> Interval:
        """The interval that decides about a candidate (one-sided level alpha for ``wilson_fixed``)."""
        if self.config.bound == "wilson_fixed":
            return wilson(successes, n, 1.0 - 2.0 * self.config.alpha)
        return confidence_sequence(successes, n, self.config.alpha)

    def successes_needed(self, n: int) -> int | None:
        """Fewest successes in ``n`` episodes whose lower bound reaches the threshold, or None when none does."""
        low, high = 0, n + 1
        while low < high:
            middle = (low + high) // 2
            if self.bound(middle, n).low >= self.threshold:
                high = middle
            else:
                low = middle + 1
        return low if low <= n else None

    # -- who acts --------------------------------------------------------------------------------------------------------

    @property
    def acting(self) -> int:
        """The version that acts; 0 is the base."""
        return self._acting[0] if self._acting else BASE

    @property
    def acting_mode(self) -> str:
        """``explore`` or ``eval``; ``base`` while the base acts."""
        return self._acting[1] if self._acting else "base"

    @property
    def on_probation(self) -> int | None:
        return self._probation[0] if self._probation else None

    @property
    def probation_mode(self) -> str | None:
        return self._probation[1] if self._probation else None

    @property
    def waiting(self) -> int | None:
        """The newest submitted version that waits for its probation."""
        return self._waiting[0] if self._waiting else None

    @property
    def late(self) -> int:
        """Results that came in after their version was decided, and therefore changed nothing."""
        return self._late

    @property
    def share(self) -> float:
        """Share of acting episodes for the candidate where probation is real: ``min(share_max, margin / p_ref)``."""
        if self._probation is None:
            return 0.0
        if self.config.mode == "fast" or self.p_ref == 0.0:
            return self.config.share_max
        return min(self.config.share_max, self.config.margin / self.p_ref)

    def assign(self, uniform: float) -> tuple[int, str]:
        """Version and mode of the next real episode, from a uniform draw: the candidate with probability ``share``."""
        if not 0.0 <= uniform < 1.0:
            raise ValueError(f"uniform={uniform}: accepted are numbers in [0, 1)")
        if self._probation is not None and uniform < self.share:
            return self._probation
        return self.acting, self.acting_mode

    def state(self, version: int, mode: str = "explore") -> State | None:
        """State of one version and mode, or None when it was never submitted."""
        record = self._records.get((version, mode))
        return record.state if record else None

    def evidence(self, version: int, mode: str = "explore") -> tuple[int, int]:
        """(successes, n) of probation and acting episodes together."""
        record = self._record(version, mode)
        return record.successes + record.acting_successes, record.n + record.acting_n

    # -- what happens ----------------------------------------------------------------------------------------------------

    def submit(self, version: int, mode: str = "explore", version_hash: str = "") -> list[GateEvent]:
        """Offer a new version, or one that was demoted. Starts its probation, or lets it wait for the present one's end.

        Args:
            version_hash: hash of the weights. Versions with equal hash and mode are the same policy and share results.

        Raises:
            ValueError: the base, an unknown mode, or a version that is on its way or decided already.
            RuntimeError: no reference yet.
        """
        _ = self.threshold
        if version < 1:
            raise ValueError(f"version={version}: accepted are integers >= 1 (0 is the base, which needs no promotion)")
        if mode not in ("explore", "eval"):
            raise ValueError(f"mode={mode!r}: accepted are explore, eval")
        known = self._records.get((version, mode))
        if known is not None and known.state not in ("demoted", "superseded"):
            raise ValueError(f"version {version} ({mode}) is {known.state} already; accepted are new or demoted versions")
        key = f"{version_hash or f'version-{version}'}/{mode}"
        self._records[version, mode] = _Record(version, mode, key, "candidate")
        if self._waiting is not None:
            self._records[self._waiting].state = "superseded"
        self._waiting = (version, mode)
        return self._start_next()

    def cached(self, seed: int) -> bool | None:
        """The known outcome of the candidate (or of an equal one) on a gate seed, or None when it has to be run."""
        if self._probation is None:
            return None
        return self._cache.get(self._records[self._probation].key, {}).get(int(seed))

    def fresh_seeds(self, seeds: Iterable[int], n: int) -> list[int]:
        """The first ``n`` of ``seeds`` that would still count for the candidate on probation."""
        if self._probation is None:
            return []
        record = self._records[self._probation]
        used = set(record.seeds) | set(self._spent.get(record.key, ()))
        chosen: list[int] = []
        for seed in seeds:
            if len(chosen) >= n:
                break
            if seed not in used:
                chosen.append(int(seed))
        return chosen

    def record(self, version: int, success: bool, *, mode: str | None = None, seed: int | None = None) -> list[GateEvent]:
        """One finished probation episode of ``version``. Returns what it decided, in order.

        Args:
            mode: checked when given.
            seed: gate seed of a simulated episode; the same seed counts once and is remembered under the weights' hash.

        Episodes that end after the decision about their version are counted in :attr:`late` and change nothing.

        Raises:
            ValueError: a version that was never submitted.
        """
        if not any(v == version for v, _ in self._records):
            raise ValueError(f"version {version} was never submitted; known are {sorted({v for v, _ in self._records})}")
        if self._probation is None or self._probation[0] != version or (mode is not None and self._probation[1] != mode):
            self._late += 1
            return []
        record = self._records[self._probation]
        if seed is not None:
            if seed in record.seeds or seed in self._spent.get(record.key, ()):
                return []
            self._cache.setdefault(record.key, {})[int(seed)] = bool(success)
            record.seeds.append(int(seed))
        record.n += 1
        record.successes += bool(success)
        return self._decide()

    def record_acting(self, success: bool, version: int | None = None) -> list[GateEvent]:
        """One finished episode of the acting version, for the rollback test.

        Args:
            version: who acted when the episode began; an episode of a version that no longer acts is counted as late.
        """
        if version is not None and version != self.acting:
            self._late += 1
            return []
        if self._acting is None:
            return []
        record = self._records[self._acting]
        record.acting_n += 1
        record.acting_successes += bool(success)
        upper = confidence_sequence(record.acting_successes, record.acting_n, self.config.alpha).high
        if upper < self.threshold:
            return self._demote(record, f"upper bound {upper:.3f} since promotion is below {self.threshold:.3f}")
        return []

    def fail(self, version: int, reason: str, mode: str | None = None) -> list[GateEvent]:
        """NaN, a limit violation or a safety stop attributed to the head: out at once, in every mode unless one is named.

        Raises:
            ValueError: a version that was never submitted.
        """
        hit = [r for (v, m), r in self._records.items() if v == version and mode in (None, m)]
        if not hit:
            raise ValueError(f"version {version} was never submitted; known are {sorted({v for v, _ in self._records})}")
        events: list[GateEvent] = []
        for record in hit:
            where = (record.version, record.mode)
            if record.state == "promoted":
                events += self._demote(record, reason)
            elif record.state in ("probation", "candidate"):
                record.state = "rejected"
                if where == self._probation:
                    self._probation = None
                if where == self._waiting:
                    self._waiting = None
                events.append(self._event("rejected", record, reason))
        return events + self._start_next()

    # -- decisions -------------------------------------------------------------------------------------------------------

    def _record(self, version: int, mode: str) -> _Record:
        try:
            return self._records[version, mode]
        except KeyError:
            raise ValueError(f"version {version} ({mode}) was never submitted") from None

    def _start_next(self) -> list[GateEvent]:
        if self._probation is not None or self._waiting is None:
            return []
        self._probation, self._waiting = self._waiting, None
        record = self._records[self._probation]
        record.state = "probation"
        spent = set(self._spent.get(record.key, ()))
        for seed, success in self._cache.get(record.key, {}).items():  # an equal policy already played these
            if seed not in spent and record.n < self.config.n_max:
                record.seeds.append(seed)
                record.n += 1
                record.successes += success
        return [self._event("candidate", record), *self._decide()]

    def _incumbent_lower(self) -> float | None:
        """Lower bound of the head that acts, from all its evidence; None while the base acts (the threshold speaks for it)."""
        return None if self._acting is None else self._total_bound(self._records[self._acting]).low

    def _total_bound(self, record: _Record) -> Interval:
        return confidence_sequence(record.successes + record.acting_successes, record.n + record.acting_n, self.config.alpha)

    def _decide(self) -> list[GateEvent]:
        if self._probation is None:
            return []
        record, config = self._records[self._probation], self.config
        if record.n < config.n_min or (config.bound == "wilson_fixed" and record.n < config.n_max):
            return []
        interval = self.bound(record.successes, record.n)
        last = record.n >= config.n_max
        if interval.low >= self.threshold:
            incumbent = self._incumbent_lower() if config.min_gain is not None else None
            if incumbent is not None:
                needed = incumbent + float(config.min_gain or 0.0)
                if interval.low < needed and not last and interval.high >= needed:
                    return []  # good enough to act, not yet shown to be better than the head that does: more evidence
                takes_over = interval.low >= needed
            else:
                takes_over = self._acting is None or self._total_bound(record).low >= (self._incumbent_lower() or 0.0)
            record.state = "promoted"
            record.acting_successes = record.acting_n = 0
            if takes_over:
                self._acting = (record.version, record.mode)
            self._probation = None
            reason = "" if takes_over else f"kept in reserve: version {self.acting} has the higher lower bound"
            return [self._event("promoted", record, reason), *self._start_next()]
        if interval.high < self.threshold or last:
            record.state = "rejected"
            self._probation = None
            reason = (
                f"upper bound {interval.high:.3f} is below {self.threshold:.3f}"
                if interval.high < self.threshold
                else f"not shown to reach {self.threshold:.3f} within {config.n_max} episodes"
            )
            return [self._event("rejected", record, reason), *self._start_next()]
        return []

    def _demote(self, record: _Record, reason: str) -> list[GateEvent]:
        interval = confidence_sequence(record.acting_successes, record.acting_n, self.config.alpha)
        record.state = "demoted"
        self._spent.setdefault(record.key, []).extend(record.seeds)
        if self._acting == (record.version, record.mode):
            left = [r for r in self._records.values() if r.state == "promoted"]
            best = max(left, key=lambda r: (self._total_bound(r).low, r.version), default=None)
            self._acting = (best.version, best.mode) if best else None
        wins, n = record.acting_successes, record.acting_n
        return [
            GateEvent(
                "rolled_back", record.version, record.mode, wins, n, interval.low, interval.high,
                self.p_ref, self.threshold, self.acting, self.acting_mode, reason,
            )
        ]  # fmt: skip

    def _event(self, kind: EventKind, record: _Record, reason: str = "") -> GateEvent:
        interval = self.bound(record.successes, record.n)
        return GateEvent(
            kind, record.version, record.mode, record.successes, record.n, interval.low, interval.high,
            self.p_ref, self.threshold, self.acting, self.acting_mode, reason,
        )  # fmt: skip

    # -- resume ----------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything an exact resume needs, as plain JSON."""
        return {
            "schema": 1,
            "config": asdict(self.config),
            "reference": list(self._reference) if self._reference else None,
            "acting": list(self._acting) if self._acting else None,
            "probation": list(self._probation) if self._probation else None,
            "waiting": list(self._waiting) if self._waiting else None,
            "late": self._late,
            "records": [asdict(r) for r in self._records.values()],
            "cache": {key: [[s, ok] for s, ok in seeds.items()] for key, seeds in self._cache.items()},
            "spent": {key: list(seeds) for key, seeds in self._spent.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken.

        Raises:
            ValueError: the state was made by another schema or with other rules (the differing keys are named).
        """
        if state.get("schema") != 1:
            raise ValueError(f"gate state: schema={state.get('schema')!r}: accepted is 1")
        mine, theirs = asdict(self.config), dict(state["config"])
        differing = sorted(k for k in mine.keys() | theirs.keys() if mine.get(k) != theirs.get(k))
        if differing:
            told = ", ".join(f"gate.{k}={mine.get(k)!r} (saved: {theirs.get(k)!r})" for k in differing)
            raise ValueError(f"gate state was saved under other rules: {told}; resume with the saved ones")

        def pair(value: Any) -> tuple[int, str] | None:
            return None if value is None else (int(value[0]), str(value[1]))

        self._reference = None if state["reference"] is None else (int(state["reference"][0]), int(state["reference"][1]))
        self._acting, self._probation, self._waiting = pair(state["acting"]), pair(state["probation"]), pair(state["waiting"])
        self._late = int(state["late"])
        self._records = {}
        for raw in state["records"]:
            record = _Record(**{**raw, "seeds": list(raw["seeds"])})
            self._records[record.version, record.mode] = record
        self._cache = {key: {int(s): bool(ok) for s, ok in seeds} for key, seeds in state["cache"].items()}
        self._spent = {key: [int(s) for s in seeds] for key, seeds in state["spent"].items()}
