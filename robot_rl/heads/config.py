"""What each head can be told. Reading a configuration costs no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

BasisMode = Literal["full", "repeat", "low_rank"]
SelectReduce = Literal["weighted_min_pair", "min_pair", "min", "mean", "lcb"]


@dataclass(frozen=True)
class LatentNoiseConfig:
    """Shape of a latent-noise head.

    Attributes:
        noise_bound: every controlled entry of the noise lies in [-bound, bound]. 1.0 is what the released DSRL-NA code
            really does, 1.5 its usual intent; at 1.5 a fresh head has nearly the spread of the base's own prior.
        noise_mode, rank: which part of the noise is controlled, see :class:`robot_rl.heads.basis.ChunkBasis`.
        executed_rows_only: leave the noise rows beyond ``n_action_steps`` to the prior.
        hidden: of the actor.
        layer_norm: in the actor.
    """

    noise_bound: float = 1.5
    noise_mode: BasisMode = "full"
    rank: int = 1
    executed_rows_only: bool = False
    hidden: tuple[int, ...] = (256, 256)
    layer_norm: bool = True

    def __post_init__(self) -> None:
        if not self.noise_bound > 0:
            raise ValueError(f"noise_bound={self.noise_bound}: accepted are numbers > 0")


@dataclass(frozen=True)
class CorrectionConfig:
    """How far, and in which shape, a chunk may be corrected.

    Attributes:
        scale: largest correction of a normalised action entry.
        gripper_scale: the same for gripper dimensions; 0 leaves them to the base.
        mode, rank: the correction's shape over the chunk, see :class:`robot_rl.heads.basis.ChunkBasis`.
        hidden, layer_norm: of the actor.
    """

    scale: float = 0.2
    gripper_scale: float = 0.0
    mode: BasisMode = "full"
    rank: int = 1
    hidden: tuple[int, ...] = (256, 256)
    layer_norm: bool = True

    def __post_init__(self) -> None:
        for name in ("scale", "gripper_scale"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: accepted are numbers >= 0")


@dataclass(frozen=True)
class GuidedNoiseConfig:
    """Demonstration-guided noise (DGN): explore by a Gaussian that is fitted to what demonstrations do differently.

    Attributes:
        on: whether there is any.
        mean: ``learned``, or ``zero``: only the covariance is.
        covariance: ``diagonal``, or ``full``, which costs d (d + 1) / 2 outputs for d entries of a chunk.
        hidden: of the network.
    """

    on: bool = False
    mean: Literal["learned", "zero"] = "learned"
    covariance: Literal["diagonal", "full"] = "diagonal"
    hidden: tuple[int, ...] = (256, 256)


@dataclass(frozen=True)
class ResidualConfig(CorrectionConfig):
    """Shape of a residual head, see :class:`CorrectionConfig`.

    Attributes:
        exploration_std: Gaussian exploration, in units of ``scale`` (deterministic actor only).
        guided: exploration towards what demonstrations do instead, for a share of the decisions.
    """

    exploration_std: float = 0.3
    guided: GuidedNoiseConfig = field(default_factory=lambda: GuidedNoiseConfig())

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.guided.on and (self.mode != "full" or self.gripper_scale == 0.0 == self.scale):
            raise ValueError(f"guided.on=true with mode={self.mode!r}: accepted is full, with a scale above 0")
        if self.exploration_std < 0:
            raise ValueError(f"exploration_std={self.exploration_std}: accepted are numbers >= 0")


@dataclass(frozen=True)
class SelectionConfig:
    """How one of several candidates is chosen.

    Attributes:
        candidates: K, chunks of the base among which to choose.
        select_reduce: how the critics' votes become one score; ``lcb`` is mean - ``select_k`` std, so a negative
            ``select_k`` is optimistic (E2O; ``learner.select_k_updates`` lets it fall). All are deterministic: acting and targets
            rank alike. Only ``min_pair`` draws: targets rank by one random pair of critics an update, as EXPO was released, which
            is a fifth of the work of ten; acting ranks by its expectation, ``weighted_min_pair``.
        temperature: eta; ``explore`` mode draws candidate k with probability exp(q_k / eta) / sum. 0 takes the best.
        kl_budget: raise eta per state until the choice's divergence from the base, log K - entropy, is at most this (nats).
        risk: ``neutral`` weighs candidates by q; ``bernoulli`` takes q as a chance of success p and weighs by
            1 - p + p exp(1 / eta), Q#'s exact solution for deterministic transitions.
        own_base: the head carries a denoiser of its own, which draws its candidates and which the learner trains on by imitation
            (``learner.base_update``); the frozen base stays beside it.
    """

    candidates: int = 8
    select_reduce: SelectReduce = "weighted_min_pair"
    select_k: float = 1.0
    temperature: float = 0.0
    kl_budget: float | None = None
    risk: Literal["neutral", "bernoulli"] = "neutral"
    own_base: bool = False

    def __post_init__(self) -> None:
        if self.candidates < 1:
            raise ValueError(f"candidates={self.candidates}: accepted are integers >= 1")
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature}: accepted are numbers >= 0")
        if self.kl_budget is not None and self.kl_budget <= 0:
            raise ValueError(f"kl_budget={self.kl_budget}: accepted are null or numbers > 0")
        if self.risk == "bernoulli" and not self.samples:
            raise ValueError(
                "risk='bernoulli' with temperature=0 takes the best either way; set temperature > 0 or a kl_budget"
            )

    @property
    def samples(self) -> bool:
        """Whether ``explore`` mode draws rather than takes the best."""
        return self.temperature > 0 or self.kl_budget is not None


@dataclass(frozen=True)
class EditConfig(CorrectionConfig, SelectionConfig):
    """Shape of an edit head: :class:`CorrectionConfig` for the edit, :class:`SelectionConfig` for the choice.

    Attributes:
        edits: E, how many of the K base chunks are also offered edited; at most ``candidates``.
    """

    scale: float = 0.05
    edits: int = 8

    def __post_init__(self) -> None:
        CorrectionConfig.__post_init__(self)
        SelectionConfig.__post_init__(self)
        if not 1 <= self.edits <= self.candidates:
            raise ValueError(f"edits={self.edits}: accepted are 1 to candidates ({self.candidates})")


@dataclass(frozen=True)
class ChunkPolicyConfig:
    """``hidden`` and ``layer_norm`` of the actor (WSRL puts LayerNorm there too; RLPD does not)."""

    hidden: tuple[int, ...] = (256, 256)
    layer_norm: bool = False


@dataclass(frozen=True)
class HybridPolicyConfig(ChunkPolicyConfig):
    """:class:`ChunkPolicyConfig` for the arm, and a choice for the gripper.

    Attributes:
        gripper_epsilon: chance that ``explore`` mode draws the gripper's choice evenly. HIL-SERL never does: people show it.
    """

    gripper_epsilon: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.gripper_epsilon <= 1.0:
            raise ValueError(f"gripper_epsilon={self.gripper_epsilon}: accepted are 0 to 1")


@dataclass(frozen=True)
class AdvantageConfig:
    """How a policy that knows what an advantage is acts on it.

    Attributes:
        guidance: beta of classifier-free guidance, out = out(nothing said) + beta (out(advantage is positive) - out(nothing said)).
            1 samples as if told that the advantage is positive (RECAP), larger values push further (1.5 to 2.5).
    """

    guidance: float = 1.0

    def __post_init__(self) -> None:
        if self.guidance < 0:
            raise ValueError(f"guidance={self.guidance}: accepted are numbers >= 0")


@dataclass(frozen=True)
class CoarseToFineConfig:
    """A critic that is its own policy: every action entry is found by zooming into the best of a few bins (CQN, Seo et al. 2024).

    Attributes:
        levels, bins: an entry is one of bins^levels values from -1 to 1.
        atoms, value_min, value_max: of the value's distribution (C51, Bellemare et al. 2017).
        sequence: read the rows of a chunk one after the other with a recurrent layer (CQN-AS); otherwise all at once.
        hidden: width of both layers of each stream, and of the recurrent one.
        exploration_std: of the Gaussian that ``explore`` mode adds before it rounds to the nearest bin.
    """

    levels: int = 3
    bins: int = 5
    atoms: int = 51
    value_min: float = -2.0
    value_max: float = 2.0
    sequence: bool = False
    hidden: int = 512
    exploration_std: float = 0.01

    def __post_init__(self) -> None:
        if min(self.levels, self.hidden) < 1 or min(self.bins, self.atoms) < 2 or self.exploration_std < 0:
            raise ValueError(
                f"levels={self.levels}, bins={self.bins}, atoms={self.atoms}, hidden={self.hidden}, exploration_std="
                f"{self.exploration_std}: accepted are levels, hidden >= 1, bins, atoms >= 2, exploration_std >= 0"
            )
        if not self.value_min < self.value_max:
            raise ValueError(f"value_min={self.value_min}, value_max={self.value_max}: accepted is value_min < value_max")


@dataclass(frozen=True)
class ChainConfig:
    """How a denoising chain explores.

    Attributes:
        std: of the Gaussian noise that ``explore`` mode adds to every trained step, for sampling and for likelihoods alike.
        trained_steps: K_ft, the last so many sampling steps are trained and noisy, the others are the base's; 0: all.
    """

    std: float = 0.1
    trained_steps: int = 0

    def __post_init__(self) -> None:
        if self.std <= 0 or self.trained_steps < 0:
            raise ValueError(f"std={self.std}, trained_steps={self.trained_steps}: accepted are std > 0, trained_steps >= 0")


@dataclass(frozen=True)
class TokenConfig:
    """How a policy that writes words is corrected, and how it explores.

    Attributes:
        temperature: of the words that ``explore`` mode draws (SimpleVLA-RL: 1.6), for drawing and for likelihoods alike.
        rank, alpha: of the low-rank factors (OpenVLA's own fine-tuning: 32 and 16; their product is scaled by alpha / rank).
        layers: linear layers of every block of the language model that get one.
    """

    temperature: float = 1.0
    rank: int = 32
    alpha: float = 16.0
    layers: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

    def __post_init__(self) -> None:
        if not self.temperature > 0 or not self.alpha > 0 or self.rank < 1:
            raise ValueError(
                f"temperature={self.temperature}, alpha={self.alpha}, rank={self.rank}: accepted are temperature, alpha > 0, rank >= 1"
            )
        if not self.layers:
            raise ValueError("layers=[]: accepted is at least one, e.g. q_proj")


@dataclass(frozen=True)
class DistilledConfig:
    """One head for several tasks.

    Attributes:
        student: kind of head, that of its teachers; shaped by that kind's own keys.
        slots: width of the one-hot code.
        code: the task that this run plays: the position of its teacher in ``learner.teachers``.
    """

    student: Literal["latent_noise", "residual", "gaussian_residual"] = "latent_noise"
    slots: int = 8
    code: int = 0

    def __post_init__(self) -> None:
        if self.slots < 1 or not 0 <= self.code < self.slots:
            raise ValueError(f"code={self.code} of slots={self.slots}: accepted are 0 to {max(self.slots - 1, 0)}")
