"""Parts of a learner's configuration that only some recipes turn on. Reading them costs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from robot_rl.types import ActionSpec


@dataclass(frozen=True)
class ConservativeConfig:
    """The conservative term of CQL (Kumar et al. 2020) and its calibrated form (Nakamoto et al. 2023).

    Attributes:
        weight: alpha of the term. temperature: T of its log-sum-exp.
        samples: actions of each kind (uniform, of the policy here, of the policy at the next state).
    """

    weight: float = 5.0
    temperature: float = 1.0
    samples: int = 10

    def __post_init__(self) -> None:
        if self.weight < 0 or self.temperature <= 0 or self.samples < 1:
            raise ValueError(
                f"conservative: weight={self.weight}, temperature={self.temperature}, samples={self.samples}; accepted are "
                "weight >= 0, temperature > 0, samples >= 1"
            )


@dataclass(frozen=True)
class StudentConfig:
    """A one-step student of the base's sampler that the learner asks instead of the base; the base itself goes on acting.

    Attributes:
        hidden: of the student. lr: Adam. updates: of the student per update of the critic.
        tolerance: mean absolute error (normalised) at which the student takes over from the base in the learner.
    """

    hidden: tuple[int, ...] = (512, 512, 512)
    lr: float = 1e-3
    updates: int = 1
    tolerance: float = 0.05

    def __post_init__(self) -> None:
        if self.updates < 1 or not self.tolerance > 0 or not self.lr > 0:
            raise ValueError(
                f"updates={self.updates}, tolerance={self.tolerance}, lr={self.lr}: accepted are updates >= 1, numbers above 0"
            )


@dataclass(frozen=True)
class BaseUpdateConfig:
    """Training a copy of the base on by imitation, one step an actor update (EXPO; QC clones its flow policy on alike).

    Attributes:
        rows: what is imitated: ``none`` (the base stays as it is), ``all`` recorded rows of the policy and of humans, failures
            included, or ``success``: those of successful episodes, and of demonstrations that do not say how they ended.
        lr, weight_decay: AdamW. cosine_steps: steps over which ``lr`` falls to 0 as a cosine; 0: it stays.
        ema: how fast the copy that acts follows the one that is trained.
    """

    rows: Literal["none", "all", "success"] = "none"
    lr: float = 3e-4
    weight_decay: float = 1e-4
    cosine_steps: int = 0
    ema: float = 0.001

    def __post_init__(self) -> None:
        if self.lr < 0 or self.weight_decay < 0 or self.cosine_steps < 0 or not 0.0 < self.ema <= 1.0:
            raise ValueError(
                f"base_update: lr={self.lr}, weight_decay={self.weight_decay}, cosine_steps={self.cosine_steps}, ema={self.ema}; "
                "accepted are numbers >= 0 and 0 < ema <= 1"
            )


@dataclass(frozen=True)
class GripperConfig:
    """A critic of its own for discrete grippers (HIL-SERL, Luo et al. 2024).

    Attributes:
        values: what a gripper may be told (normalised). Empty: open and close, and 0, which leaves it as it is, where the robot takes a
            change; a gripper that is told a width has no word for staying, and 0 would be half open.
        penalty: added to this critic's reward, never to the arm's, wherever the commanded gripper opens or closes.
        hidden, lr: of the critic; its discount and target smoothing are the learner's.
    """

    values: tuple[float, ...] = ()
    penalty: float = -0.05
    hidden: tuple[int, ...] = (256, 256)
    lr: float = 3e-4

    def __post_init__(self) -> None:
        few = bool(self.values) and len(set(self.values)) < 2
        if few or any(abs(v) > 1 for v in self.values) or len(set(self.values)) < len(self.values):
            raise ValueError(
                f"gripper: values={self.values}; accepted are none (the robot's own), or two or more different numbers from -1 to 1"
            )
        if self.penalty > 0 or self.lr < 0:
            raise ValueError(f"gripper: penalty={self.penalty}, lr={self.lr}; accepted are a penalty <= 0 and lr >= 0")

    def told(self, action: ActionSpec) -> tuple[float, ...]:
        """``values``, or what the grippers of this robot understand."""
        if self.values:
            return self.values
        changes = bool(action.delta_mask[action.gripper_mask].all())
        return (-1.0, 0.0, 1.0) if changes else (-1.0, 1.0)


@dataclass(frozen=True)
class SupportConfig:
    """A density of recorded chunks that the actor pays for leaving (SPOT, Wu et al. 2022); its weight is ``support_penalty``.

    Attributes:
        model: ``unit``: half the squared unit action of a correction, which needs no model (ours); ``vae``: -ELBO of the chunk.
        hidden, latent_factor, kl_weight, lr: of the autoencoder; latent_factor latents for each entry of a chunk.
        updates: that fit it, before the actor moves.
        decay_updates, floor: online, the weight falls linearly over so many updates, to ``floor`` times itself; 0: it stays.
    """

    model: Literal["unit", "vae"] = "unit"
    hidden: tuple[int, ...] = (750, 750)
    latent_factor: int = 2
    kl_weight: float = 0.5
    lr: float = 1e-3
    updates: int = 100_000
    decay_updates: int = 0
    floor: float = 0.2

    def __post_init__(self) -> None:
        if self.latent_factor < 1 or self.kl_weight < 0 or self.lr < 0 or self.updates < 0 or self.decay_updates < 0:
            raise ValueError(
                f"support: latent_factor={self.latent_factor}, kl_weight={self.kl_weight}, lr={self.lr}, updates={self.updates}, "
                f"decay_updates={self.decay_updates}; accepted are numbers >= 0, latent_factor >= 1"
            )
        if not 0.0 <= self.floor <= 1.0:
            raise ValueError(f"support: floor={self.floor}; accepted are 0 to 1")


@dataclass(frozen=True)
class OptimismConfig:
    """Optimistic labels for data without rewards (ExPLORe, Li et al. 2023).

    Their windows get a predicted reward, a predicted end, and a bonus where they are unlike what was practised; all three are
    worked out anew at every update, so the bonus fades as practice covers them.

    Attributes:
        strata: whose rewards are not read; none: off.
        bonus: weight of the bonus, the error of random network distillation (Burda et al. 2019).
        hidden, features, lr: of its networks and of the models of reward and end.
        every: updates between two steps of the bonus's predictor (there: one an environment step).
        start_updates: of the models before such windows count at all.
    """

    strata: tuple[Literal["prior", "demonstration"], ...] = ()
    bonus: float = 1.0
    hidden: tuple[int, ...] = (256, 256, 256)
    features: int = 256
    lr: float = 3e-4
    every: int = 20
    start_updates: int = 0

    def __post_init__(self) -> None:
        if self.bonus < 0 or self.features < 1 or self.lr < 0 or self.every < 1 or self.start_updates < 0:
            raise ValueError(
                f"optimism: bonus={self.bonus}, features={self.features}, lr={self.lr}, every={self.every}, "
                f"start_updates={self.start_updates}; accepted are numbers >= 0, features and every >= 1"
            )


@dataclass(frozen=True)
class NoveltyConfig:
    """A bonus for rare pairs of state and value (SERA, value-conditional state entropy).

    Attributes:
        weight: eta; 0: off. neighbours: k. value_scale: c, how much the value counts among the features.
        updates: over which eta falls to 0; 0: it stays.
    """

    weight: float = 0.0
    neighbours: int = 5
    value_scale: float = 1.0
    updates: int = 0

    def __post_init__(self) -> None:
        if self.weight < 0 or self.neighbours < 1 or self.value_scale < 0 or self.updates < 0:
            raise ValueError(
                f"novelty: weight={self.weight}, neighbours={self.neighbours}, value_scale={self.value_scale}, updates={self.updates}; "
                "accepted are numbers >= 0, neighbours >= 1"
            )


@dataclass(frozen=True)
class RecapConfig:
    """Which actions count as better than usual (RECAP, Amin et al. 2025).

    A value function predicts steps to success: -1 a step, 0 at the end of a success, ``-failure_penalty`` at that of a failure.

    Attributes:
        failure_penalty: C_fail, in steps. value_range: steps that are worth -1; returns below are cut off there.
        bins, hidden, lr: of the value, a distribution over so many bins from -1 to 0.
        n_step: N of the advantage. positive_share: of all rows that are told to be positive; the threshold follows from it.
        dropout: share of rows about which nothing is said, which is what guidance needs.
        relabel_every: updates between two judgements of everything recorded.
    """

    failure_penalty: float = 300.0
    value_range: float = 600.0
    bins: int = 201
    hidden: tuple[int, ...] = (256, 256)
    lr: float = 3e-4
    n_step: int = 10
    positive_share: float = 0.3
    dropout: float = 0.2
    relabel_every: int = 1000

    def __post_init__(self) -> None:
        if self.failure_penalty < 0 or self.value_range <= 0 or self.bins < 2 or self.n_step < 1 or self.relabel_every < 1:
            raise ValueError(
                f"recap: failure_penalty={self.failure_penalty}, value_range={self.value_range}, bins={self.bins}, n_step={self.n_step}, "
                f"relabel_every={self.relabel_every}; accepted are a penalty >= 0, a range > 0, bins >= 2, and integers >= 1"
            )
        if not 0.0 < self.positive_share < 1.0 or not 0.0 <= self.dropout < 1.0:
            raise ValueError(
                f"recap: positive_share={self.positive_share}, dropout={self.dropout}; accepted are shares below 1, the first above 0"
            )


@dataclass(frozen=True)
class PrefixConfig:
    """A critic that values the beginnings of a chunk too (CO-RFT): ``width``, ``layers`` and ``heads`` of its transformer."""

    width: int = 128
    layers: int = 2
    heads: int = 4

    def __post_init__(self) -> None:
        if min(self.width, self.layers, self.heads) < 1 or self.width % self.heads:
            raise ValueError(
                f"prefix: width={self.width}, layers={self.layers}, heads={self.heads}; accepted are integers >= 1, width a multiple of heads"
            )


@dataclass(frozen=True)
class RowAdvantageConfig:
    """Critics that weigh rows to be cloned (IQL, Kostrikov et al. 2022).

    Attributes:
        n_critics: the least of them counts. expectile: tau of the value. tau: target smoothing.
    """

    n_critics: int = 2
    expectile: float = 0.7
    tau: float = 0.005

    def __post_init__(self) -> None:
        if self.n_critics < 1 or not 0.5 <= self.expectile < 1.0 or not 0.0 < self.tau <= 1.0:
            raise ValueError(
                f"iql: n_critics={self.n_critics}, expectile={self.expectile}, tau={self.tau}; accepted are an integer >= 1, 0.5 <= "
                "expectile < 1 and 0 < tau <= 1"
            )
