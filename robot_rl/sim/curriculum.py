"""Success-driven choice of start states over a pool of starts whose parameters are known; deterministic in what was recorded.

success    weight_i = p_i (1 - p_i),  p_i = (1 + sum_j k_ij success_j) / (2 + sum_j k_ij),  k Gaussian in parameters
alp_gmm    ALP = |r - r_nearest earlier|; every ``window`` episodes Gaussian mixtures are fitted to the last (parameters, ALP), the one of
           least AIC is kept; a component is drawn by its mean ALP, parameters from it, and the nearest start of the pool is taken
sec        Q_arm <- Q_arm + rate (mean |advantage| - Q_arm);  arm ~ softmax(Q / temperature)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from robot_rl.sim.curriculum_config import CurriculumConfig


class Mixture(NamedTuple):
    """Gaussians over D dimensions: ``weight`` (K,), ``mean`` (K, D), ``covariance`` (K, D, D)."""

    weight: np.ndarray
    mean: np.ndarray
    covariance: np.ndarray


REGULAR = 1e-4  # added to variances, in units of the parameters' ranges


def log_densities(points: np.ndarray, mixture: Mixture) -> np.ndarray:
    """(N, K) log of weight times density."""
    d = points.shape[1]
    out = []
    for weight, mean, covariance in zip(*mixture, strict=True):
        lower = np.linalg.cholesky(covariance)
        z = np.linalg.solve(lower, (points - mean).T)
        out.append(np.log(weight) - 0.5 * (z**2).sum(0) - np.log(np.diag(lower)).sum() - 0.5 * d * np.log(2 * np.pi))
    return np.stack(out, axis=1)


def _log_sum(x: np.ndarray) -> np.ndarray:
    top = x.max(1, keepdims=True)
    return (top + np.log(np.exp(x - top).sum(1, keepdims=True)))[:, 0]


def fit_mixture(points: np.ndarray, k: int, rng: np.random.Generator, iterations: int = 60) -> tuple[Mixture, float]:
    """Expectation maximisation from ``k`` spread-out points; the mixture, and its log likelihood."""
    n, d = points.shape
    centres = [points[rng.integers(n)]]
    for _ in range(k - 1):  # k-means++: far points are likelier
        far = np.min([((points - c) ** 2).sum(1) for c in centres], axis=0)
        centres.append(points[rng.choice(n, p=far / far.sum())] if far.sum() > 0 else points[rng.integers(n)])
    spread = (np.cov(points.T).reshape(d, d) / k if n > 1 else 0.0) + REGULAR * np.eye(d)
    mixture = Mixture(np.full(k, 1.0 / k), np.array(centres), np.repeat(spread[None], k, axis=0))
    before = -np.inf
    for _ in range(iterations):
        joint = log_densities(points, mixture)
        total = _log_sum(joint)
        share = np.exp(joint - total[:, None])
        mass = share.sum(0) + 1e-9
        mean = share.T @ points / mass[:, None]
        gap = points[:, None] - mean[None]
        covariance = np.einsum("nk,nkd,nke->kde", share, gap, gap) / mass[:, None, None] + REGULAR * np.eye(d)
        mixture = Mixture(mass / mass.sum(), mean, covariance)
        if total.sum() - before < 1e-6 * n:
            break
        before = total.sum()
    return mixture, float(_log_sum(log_densities(points, mixture)).sum())


def best_mixture(points: np.ndarray, components: tuple[int, int], rng: np.random.Generator) -> Mixture:
    """The mixture of least AIC = 2 parameters - 2 log likelihood, of ``components`` smallest to largest sizes that the data allow."""
    d = points.shape[1]
    largest = max(components[0], min(components[1], len(points) // (d + 1)))
    found = []
    for k in range(components[0], largest + 1):
        mixture, likelihood = fit_mixture(points, k, rng)
        numbers = k * (d + d * (d + 1) // 2) + k - 1
        found.append((2 * numbers - 2 * likelihood, k, mixture))
    return min(found, key=lambda f: f[:2])[2]


class StartCurriculum:
    """Chooses starts of a pool and hears how they went.

    Args:
        seeds: of the pool's starts. starts: their parameters by name, in the same order.
        key: keys every draw, with the number of the round.

    Raises:
        ValueError: a parameter that the starts do not have.
    """

    def __init__(
        self, config: CurriculumConfig, seeds: Sequence[int], starts: Sequence[dict[str, float]], key: tuple[int | str, ...]
    ) -> None:
        known = sorted(starts[0]) if starts else []
        names = config.parameters or tuple(known)
        missing = [n for n in names if n not in known]
        if missing or not names:
            raise ValueError(f"curriculum.parameters={list(config.parameters)}: the task's starts have {known}")
        self.config, self.seeds, self.key = config, list(seeds), key
        values = np.array([[s[n] for n in names] for s in starts], np.float64)
        low, high = values.min(0), values.max(0)
        self.points = (values - low) / np.where(high > low, high - low, 1.0)  # (P, D) in the unit box
        order = np.argsort(self.points[:, 0], kind="stable")
        self.arm = np.empty(len(order), np.int64)
        self.arm[order] = np.arange(len(order)) * config.arms // len(order)
        self.history: list[tuple[int, float]] = []
        self.gains: list[float] = []  # ALP of every episode
        self.mixture: Mixture | None = None
        self.values = np.zeros(config.arms)
        self._baseline = np.full(config.arms, 0.5)

    # ---- choosing

    def choose(self, count: int, number: int) -> list[int]:
        """``count`` positions in the pool for round ``number``."""
        from robot_rl import seeding

        rng = seeding.rng("curriculum", *self.key, number)
        even = rng.random(count) < self.config.uniform
        drawn = rng.integers(0, len(self.seeds), count)
        weight = self._weights()
        out = []
        for i in range(count):
            if even[i] or (weight is None and self.mixture is None):
                out.append(int(drawn[i]))
            elif self.mixture is not None:
                out.append(self._from_mixture(rng))
            else:
                out.append(int(rng.choice(len(self.seeds), p=weight)))
        return out

    def _weights(self) -> np.ndarray | None:
        """(P,) chance of every start of the pool; None: they are all alike, or a mixture decides."""
        if self.config.starts == "alp_gmm" or not self.history:
            return None
        if self.config.starts == "sec":
            logits = (self.values - self.values.max()) / self.config.temperature
            chance = np.exp(logits) / np.exp(logits).sum()
            weight = chance[self.arm] / np.bincount(self.arm, minlength=self.config.arms)[self.arm]
            return weight / weight.sum()
        p = self.success_rates()
        weight = p * (1 - p)
        return weight / weight.sum()

    def success_rates(self) -> np.ndarray:
        """(P,) smoothed over neighbours; a half where nothing is known. Looks at the last ``4 window`` episodes."""
        recent = self.history[-4 * self.config.window :]
        index, success = np.array([i for i, _ in recent]), np.array([s for _, s in recent])
        distance = ((self.points[:, None] - self.points[index][None]) ** 2).sum(-1)
        k = np.exp(-0.5 * distance / self.config.bandwidth**2)
        return (1 + k @ success) / (2 + k.sum(1))

    def _from_mixture(self, rng: np.random.Generator) -> int:
        assert self.mixture is not None
        gain = np.maximum(self.mixture.mean[:, -1], 0.0)
        chance = gain / gain.sum() if gain.sum() > 0 else self.mixture.weight
        k = int(rng.choice(len(chance), p=chance / chance.sum()))
        wanted = rng.multivariate_normal(self.mixture.mean[k], self.mixture.covariance[k], method="cholesky")[:-1].clip(
            0.0, 1.0
        )
        return int(((self.points - wanted) ** 2).sum(1).argmin())

    # ---- hearing

    def record(self, results: Sequence[tuple[int, float]]) -> None:
        """What came of a round: (position in the pool, success) of every episode, in order."""
        if self.config.starts == "sec":
            self._hear_arms(results)
        for index, success in results:
            self._hear_gain(index, float(success))

    def _hear_gain(self, index: int, success: float) -> None:
        if self.history:
            past = np.array([i for i, _ in self.history])
            nearest = (
                len(past) - 1 - int(((self.points[past[::-1]] - self.points[index]) ** 2).sum(1).argmin())
            )  # the newest of equals
            gain = abs(success - self.history[nearest][1])
        else:
            gain = 0.0
        self.history.append((index, success))
        self.gains.append(gain)
        n, window = len(self.history), self.config.window
        if self.config.starts == "alp_gmm" and n % window == 0:
            from robot_rl import seeding

            recent = np.array([i for i, _ in self.history[-window:]])
            points = np.column_stack([self.points[recent], self.gains[-window:]])
            self.mixture = best_mixture(points, self.config.components, seeding.rng("curriculum fit", *self.key, n))

    def _hear_arms(self, results: Sequence[tuple[int, float]]) -> None:
        """An episode's advantage is its success less the mean of its start's others, or less its arm's moving mean where it is alone."""
        by_start: dict[int, list[float]] = {}
        for index, success in results:
            by_start.setdefault(index, []).append(float(success))
        found: dict[int, list[float]] = {}
        for index, success in results:
            group, arm = by_start[index], int(self.arm[index])
            if len(group) > 1:
                advantage = (len(group) * float(success) - sum(group)) / (len(group) - 1)
            else:
                advantage = float(success) - self._baseline[arm]
            found.setdefault(arm, []).append(abs(advantage))
        for index, success in results:
            arm = int(self.arm[index])
            self._baseline[arm] += 0.1 * (float(success) - self._baseline[arm])
        for arm, payoffs in found.items():
            self.values[arm] += self.config.rate * (float(np.mean(payoffs)) - self.values[arm])

    # ---- saving

    def state(self) -> dict[str, Any]:
        """JSON of everything that :meth:`choose` depends on."""
        mixture = None if self.mixture is None else [part.tolist() for part in self.mixture]
        return {
            "history": [[i, s] for i, s in self.history], "gains": self.gains, "mixture": mixture, "values": self.values.tolist(),
            "baseline": self._baseline.tolist(),
        }  # fmt: skip

    def load(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state`."""
        self.history = [(int(i), float(s)) for i, s in state["history"]]
        self.gains = [float(g) for g in state["gains"]]
        self.mixture = None if state["mixture"] is None else Mixture(*(np.array(part) for part in state["mixture"]))
        self.values, self._baseline = np.array(state["values"]), np.array(state["baseline"])


class ResetCurriculum:
    """Starts along successful demonstrations, from near their end towards their beginning as success allows.

    Args:
        demonstrations: (seed, executed actions (L, A)) of successes that were made in this very simulation.

    Raises:
        ValueError: there is none.
    """

    def __init__(
        self, config: CurriculumConfig, demonstrations: Sequence[tuple[int, np.ndarray]], key: tuple[int | str, ...]
    ) -> None:
        if not demonstrations:
            raise ValueError(
                "curriculum.resets='demonstrations': no demonstration is a success with a known training seed; accepted are demonstrations "
                "collected in this task (demos.source=expert)"
            )
        self.config, self.demonstrations, self.key = config, list(demonstrations), key
        self.stage = 0
        self.recent: list[float] = []

    @property
    def share_done(self) -> float:
        """Share of a demonstration that is replayed at most; 0 once the curriculum is over."""
        return max(0.0, self.config.reset_first - self.stage * self.config.reset_step)

    def choose(self, count: int, number: int) -> list[tuple[int, np.ndarray] | None]:
        """For every group of round ``number``: (seed, actions to replay), or None for an ordinary start."""
        from robot_rl import seeding

        rng = seeding.rng("resets", *self.key, number)
        out: list[tuple[int, np.ndarray] | None] = []
        for _ in range(count):
            chance, which, part = rng.random(), int(rng.integers(len(self.demonstrations))), rng.random()
            if self.share_done == 0.0 or chance >= self.config.reset_share:
                out.append(None)
                continue
            seed, actions = self.demonstrations[which]
            share = self.share_done + (self.config.reset_first - self.share_done) * part
            steps = min(int(share * len(actions)), len(actions) - 1)
            out.append((seed, actions[:steps]) if steps else None)
        return out

    def record(self, successes: Sequence[float]) -> None:
        """How the episodes that began inside a demonstration ended."""
        for success in successes:
            self.recent.append(float(success))
            if len(self.recent) >= self.config.reset_window:
                if np.mean(self.recent) >= self.config.reset_success:
                    self.stage += 1
                self.recent = []

    def state(self) -> dict[str, Any]:
        return {"stage": self.stage, "recent": self.recent}

    def load(self, state: dict[str, Any]) -> None:
        self.stage, self.recent = int(state["stage"]), [float(s) for s in state["recent"]]
