"""Recipes are configuration: this is all there is to choose. Reading it costs no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from robot_rl.learners.part_configs import (
    BaseUpdateConfig,
    ConservativeConfig,
    GripperConfig,
    NoveltyConfig,
    OptimismConfig,
    PrefixConfig,
    RecapConfig,
    RowAdvantageConfig,
    StudentConfig,
    SupportConfig,
)

CriticLoss = Literal["td", "iql", "cql", "calql"]
Weighting = Literal["uniform", "filtered", "hg_dagger", "iwr", "sirius", "awr", "iql", "iw_sft", "recap"]
Reduction = Literal["min_pair", "weighted_min_pair", "min", "mean", "lcb"]
REDUCTIONS: tuple[str, ...] = get_args(Reduction)


def check_reduction(how: str, n: int, key: str = "how") -> None:
    """Raises ValueError, naming ``key``, unless ``how`` is a reduction that works with ``n`` heads."""
    if how not in REDUCTIONS:
        raise ValueError(f"{key}={how!r}: accepted are {', '.join(REDUCTIONS)}")
    if how.endswith("min_pair") and n < 2:
        raise ValueError(f"{key}={how!r} needs at least 2 critic heads, got {n}")


@dataclass(frozen=True)
class OffPolicyConfig:
    """The choices that make a recipe.

    Attributes:
        algorithm: ``dsrl_na`` (critic on chunks, distilled to noise), ``dsrl_sac`` (critic on noise, decision starts
            only), ``residual`` (deterministic correction, TD3), ``residual_sac`` (Gaussian correction), ``edit`` (Gaussian
            edits, best of N), ``best_of_n`` (no actor), ``chunk_sac`` (Gaussian actor over the whole chunk), ``hybrid_sac`` (the
            same for the arm, a discrete critic for the gripper), ``one_step`` (a student of the base's sampler that climbs),
            ``guided`` (no actor: the critic's slope steers the base's sampler).
        n_critics, hidden, layer_norm: of every critic ensemble.
        critic: ``chunk``: networks over whole chunks; ``prefix``: a causal transformer over rows, shaped by ``prefix``, that is trained
            on every beginning of a chunk as well, so windows that were cut short teach too.
        gamma: discount per environment step. tau: target smoothing.
        critic_lr, actor_lr, temperature_lr: Adam.
        target_reduce, actor_reduce: how N critics become one value.
        entropy_backup: subtract alpha log pi in the target (DSRL does; the default does not).
        initial_alpha, alpha_floor, fixed_alpha, target_entropy: of the temperature; entropy is that of unit space.
        target_entropy_per_dim: added to ``target_entropy`` once per dimension of the actor's output (SAC's -1, RLPD's -1/2).
        actor_every: critic updates an actor update.
        critic_grad_clip: largest gradient norm of a critic step; 0 turns it off.
        distill_every: critic updates a noise-critic update (``dsrl_na``).
        distill_actor_share: share of distillation noise drawn from the actor instead of the prior.
        actor_gradient: ``distilled`` climbs the noise critic; ``sampler`` differentiates the chunk critic through the
            base's sampler (needs a base that can), which needs no distillation; ``auto``: ``sampler`` where the base can.
        kl_base: weight of KL(head || N(0, I)) before squashing in the actor loss; never beside a temperature.
        critic_loss: how the critic learns online. ``td``: temporal difference to what acts at the next state. ``iql``: to an
            expectile of the value of recorded actions. ``cql``, ``calql``: ``td`` and a conservative term, see ``conservative``.
        offline_critic, offline_actor: the same in the offline phase (``schedule.offline_updates``), and whether the actor
            trains in it.
        offline_reduce: ``target_reduce`` of the offline phase (E2O: ``min`` there); None: the same.
        backup: ``head`` acts at the next state; ``base`` evaluates the base instead, so the head is one step of improvement
            on it (Q#).
        expectile: of ``iql``.
        actor_source: rows that edits and corrections are trained on: ``replay`` takes the recorded ones, ``base`` fresh
            samples of the base.
        support_penalty: weight of half the squared unit action in the actor loss, which keeps corrections small (SPOT's role).
        support: which support that is, and how the weight falls.
        normalize_q: divide the actor's gradient by the mean absolute value, so that penalties mean the same at every reward
            scale (SPOT, TD3+BC).
        bc_weight: weight of -log pi(recorded chunk) in the actor loss of ``chunk_sac``.
        failure_reward: reward a step that an episode which ran into its time limit would have gone on getting; returns of such
            episodes are continued with it (Cal-QL's reference values must not be truncated sums).
        critic_init: run folder whose critic this one starts from; inputs that critic did not have start at zero weight.
        base_samples: M, chunks of the frozen base that are drawn once per recorded observation and reused by every update
            (``edit``, ``best_of_n``; ``dsrl_na`` keeps their noise too and distils from them); 0 draws afresh each time. At least
            the head's ``candidates``.
        student: ask a one-step student instead of the base (targets, distillation, gradients); None: the base itself.
        base_update: whether a copy of the base is trained on beside the head (``edit`` and ``best_of_n`` with ``own_base``, which
            sample from it; ``one_step``, whose teacher it is).
        n_step: decisions whose rewards are summed before the target bootstraps; above 1 the later ones are others' choices, so
            the target is biased off-policy. ResFiT: 3 (5 for some tasks), with a base that re-plans every step.
        select_k_updates: updates after the offline phase over which the head's ``select_k`` (E2O's optimism) falls to 0; 0: it stays.
        kl_demos: demonstrations behind a base that earn the whole of ``kl_base``; with fewer it counts in proportion. 0: off.
        kl_backup: subtract the divergence at the next state in the target too, so that it is part of the return.
        guided_updates: updates after the offline phase over which the share of guided exploration (DGN) falls to 0; 0: it stays.
        gripper: of ``hybrid_sac``.
        distill_weight: of the squared distance to the teacher in the loss of ``one_step``.
        smoothing_clip: bound of target smoothing (``residual``), in units of the correction's scale.
        optimism: labels for data without rewards. novelty: a bonus on every reward, for exploration.
        takeover_reward: a reward on the policy's last step before a person takes over (RLIF, Luo et al. 2024: -1); it lives in the
            learner's buffer alone. task_reward: False learns from takeovers only, as RLIF does; True adds them to the task's.
        value_max, value_min: bounds of what a return can be, to clamp targets with; None leaves them open.
    """

    algorithm: Literal[
        "dsrl_na", "dsrl_sac", "residual", "residual_sac", "edit", "best_of_n", "chunk_sac", "hybrid_sac", "one_step", "guided"
    ] = "dsrl_na"
    n_critics: int = 5
    hidden: tuple[int, ...] = (256, 256, 256)
    layer_norm: bool = True
    critic: Literal["chunk", "prefix"] = "chunk"
    prefix: PrefixConfig = field(default_factory=PrefixConfig)
    gamma: float = 0.99
    tau: float = 0.005
    critic_lr: float = 3e-4
    actor_lr: float = 3e-4
    temperature_lr: float = 3e-4
    target_reduce: Reduction = "min_pair"
    actor_reduce: Reduction = "mean"
    entropy_backup: bool = False
    initial_alpha: float = 1.0
    alpha_floor: float = 0.0
    fixed_alpha: bool = False
    target_entropy: float = 0.0
    target_entropy_per_dim: float = 0.0
    actor_every: int = 1
    critic_grad_clip: float = 0.0
    distill_every: int = 2
    distill_actor_share: float = 0.0
    actor_gradient: Literal["distilled", "sampler", "auto"] = "distilled"
    kl_base: float = 0.0
    critic_loss: CriticLoss = "td"
    offline_critic: CriticLoss = "td"
    offline_actor: bool = True
    offline_reduce: Reduction | None = None
    backup: Literal["head", "base"] = "head"
    expectile: float = 0.7
    conservative: ConservativeConfig = field(default_factory=ConservativeConfig)
    actor_source: Literal["replay", "base"] = "replay"
    support_penalty: float = 0.0
    support: SupportConfig = field(default_factory=SupportConfig)
    normalize_q: bool = False
    bc_weight: float = 0.0
    failure_reward: float = 0.0
    critic_init: Path | None = None
    base_samples: int = 0
    student: StudentConfig | None = None
    base_update: BaseUpdateConfig = field(default_factory=BaseUpdateConfig)
    n_step: int = 1
    gripper: GripperConfig = field(default_factory=GripperConfig)
    select_k_updates: int = 0
    kl_demos: int = 0
    kl_backup: bool = False
    guided_updates: int = 0
    distill_weight: float = 100.0
    smoothing_clip: float = 0.3
    optimism: OptimismConfig = field(default_factory=OptimismConfig)
    novelty: NoveltyConfig = field(default_factory=NoveltyConfig)
    takeover_reward: float = 0.0
    task_reward: bool = True
    value_min: float | None = None
    value_max: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("n_critics", "actor_every", "distill_every", "n_step"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: accepted are integers >= 1")
        if not 0.0 < self.gamma <= 1.0:
            raise ValueError(f"gamma={self.gamma}: accepted are 0 < gamma <= 1")
        if not 0.0 <= self.distill_actor_share <= 1.0:
            raise ValueError(f"distill_actor_share={self.distill_actor_share}: accepted are 0 to 1")
        if self.kl_base > 0 and not (self.fixed_alpha and self.initial_alpha == 0.0):
            raise ValueError(
                "kl_base > 0 with a temperature: one density cannot carry both; set fixed_alpha and initial_alpha=0"
            )
        if not 0.5 <= self.expectile < 1.0:
            raise ValueError(f"expectile={self.expectile}: accepted are 0.5 <= expectile < 1")
        if (self.kl_backup or self.kl_demos) and not self.kl_base:
            raise ValueError(
                f"kl_backup={self.kl_backup}, kl_demos={self.kl_demos} with kl_base=0, which never reads them; accepted are false and 0"
            )
        for name in ("support_penalty", "bc_weight", "base_samples", "select_k_updates", "kl_demos", "guided_updates"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: accepted are numbers >= 0")
        if self.failure_reward != 0.0 and self.gamma == 1.0:
            raise ValueError(
                f"failure_reward={self.failure_reward} with gamma=1: such a return has no bound; accepted is gamma < 1"
            )
        self._refuse_unread()
        for name in ("target_reduce", "actor_reduce"):
            check_reduction(getattr(self, name), self.n_critics, name)

    def _refuse_unread(self) -> None:
        """A key that this algorithm never reads would lie about what was run."""
        dense = ("residual", "residual_sac", "edit", "chunk_sac", "one_step")
        entropic = ("dsrl_na", "dsrl_sac", "residual_sac", "edit", "chunk_sac", "hybrid_sac")
        readers: dict[str, tuple[tuple[str, ...], object]] = {
            "target_entropy_per_dim": (entropic, 0.0),
            "entropy_backup": ((*entropic, "residual"), False),  # a deterministic actor has none: zero is subtracted
            "support_penalty": (dense if self.support.model == "vae" else ("residual_sac", "edit"), 0.0),
            "support": (dense, SupportConfig()),
            "select_k_updates": (("edit", "best_of_n"), 0),
            "guided_updates": (("residual",), 0),
            "kl_base": (("dsrl_na", "dsrl_sac"), 0.0),
            "distill_weight": (("one_step",), 100.0),
            "smoothing_clip": (("residual",), 0.3),
            "normalize_q": ((*dense, "hybrid_sac"), False),
            "bc_weight": (("chunk_sac", "hybrid_sac"), 0.0),
            "gripper": (("hybrid_sac",), GripperConfig()),
            "actor_source": (("edit",), "replay"),
            "base_samples": (("edit", "best_of_n", "dsrl_na"), 0),
            "student": (("dsrl_na", "residual", "residual_sac", "edit", "best_of_n"), None),
        }
        for name, (algorithms, default) in readers.items():
            if getattr(self, name) != default and self.algorithm not in algorithms:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} with algorithm={self.algorithm!r}, which never reads it; accepted is "
                    f"{default!r}, or one of the algorithms {', '.join(algorithms)}"
                )
        if self.n_step > 1 and self.algorithm == "dsrl_sac":
            raise ValueError(
                f"n_step={self.n_step} with algorithm='dsrl_sac', whose windows are single decisions; accepted is 1"
            )
        if self.base_update.rows != "none":
            if self.algorithm not in ("edit", "best_of_n", "one_step"):
                raise ValueError(
                    f"base_update.rows={self.base_update.rows!r} with algorithm={self.algorithm!r}, which never reads it; accepted "
                    "is 'none', or one of the algorithms edit, best_of_n, one_step"
                )
            if self.student is not None:
                raise ValueError(
                    f"student with base_update.rows={self.base_update.rows!r}: the copy that is trained on is asked, not the base; accepted "
                    "is null"
                )
            if self.base_samples:
                raise ValueError(
                    f"base_samples={self.base_samples} with base_update.rows={self.base_update.rows!r}: what was drawn of the base "
                    "would be out of date; accepted is 0"
                )
        conservative = {self.critic_loss, self.offline_critic} & {"cql", "calql"}
        if conservative and self.algorithm in ("dsrl_sac", "hybrid_sac"):
            raise ValueError(
                f"a conservative critic needs whole chunks as actions; with algorithm={self.algorithm!r} accepted are td, iql"
            )
        if self.critic == "prefix" and (
            self.algorithm not in ("one_step", "residual", "residual_sac", "chunk_sac")
            or "iql" in (self.critic_loss, self.offline_critic)
            or self.critic_init is not None
            or self.n_step > 1
            or self.optimism.strata
            or self.novelty.weight
        ):
            raise ValueError(
                f"critic='prefix' with algorithm={self.algorithm!r}, critic_loss={self.critic_loss!r}, offline_critic="
                f"{self.offline_critic!r}, critic_init={self.critic_init}, n_step={self.n_step}: accepted are one_step, residual, "
                "residual_sac and chunk_sac with td, cql or calql and n_step=1, without critic_init, optimism or novelty"
            )
        if self.critic == "chunk" and self.prefix != PrefixConfig():
            raise ValueError(f"prefix={self.prefix} with critic='chunk', which never reads it; accepted are its defaults")
        if self.support.model == "vae" and not self.support_penalty:
            raise ValueError("support.model='vae' with support_penalty=0, which never reads it; accepted is a penalty above 0")
        if not self.task_reward and not self.takeover_reward:
            raise ValueError("task_reward=false with takeover_reward=0: there would be nothing to learn from")


@dataclass(frozen=True)
class WeightedBCConfig:
    """How a policy is cloned from mixed data, and which of it counts.

    Attributes:
        weights: ``uniform``; ``filtered``: rows of successful episodes, and of demonstrations that do not say how they ended;
            ``hg_dagger``: demonstrations and what humans executed; ``iwr``: human rows weigh as much as all others together; ``sirius``: fixed masses per class;
            ``awr``: exp(return - V); ``iql``: exp(Q - V), which also tells apart rows of one episode by late and dense rewards; ``iw_sft``: ``filtered`` times the likelihood ratio to the frozen base; ``recap``: everything
            counts alike and is labelled by its advantage instead (an ``advantage_conditioned`` head).
        recap: of those labels. iql: of those critics; their sizes and rates are ``value_hidden`` and ``value_lr``.
        lr, weight_decay: AdamW. ema: decay of the averaged weights that act. grad_clip: largest gradient norm, 0: none.
        intervention_mass, pre_intervention_mass: shares of the loss of those classes (``sirius``).
        beta, weight_clip: of ``awr`` and ``iql``: exp(beta A), at most ``weight_clip``.
        value_hidden, value_lr: of V(s), which ``awr`` fits to returns.
        iw_temperature, iw_clip, iw_draws: of ``iw_sft``: exp(T (l_theta - l_base)) within [0, clip], the log likelihoods being
            minus the denoising loss, averaged over so many shared draws of time and noise.
        gamma, failure_reward: of the returns, see :class:`OffPolicyConfig`.
    """

    algorithm: Literal["weighted_bc"] = "weighted_bc"
    weights: Weighting = "filtered"
    lr: float = 1e-4
    weight_decay: float = 1e-4
    ema: float = 0.995
    grad_clip: float = 0.0
    intervention_mass: float = 0.5
    pre_intervention_mass: float = 0.002
    beta: float = 3.0
    weight_clip: float = 100.0
    value_hidden: tuple[int, ...] = (256, 256)
    value_lr: float = 3e-4
    iw_temperature: float = 1.0
    iw_clip: float = 16.0
    iw_draws: int = 8
    recap: RecapConfig = field(default_factory=RecapConfig)
    iql: RowAdvantageConfig = field(default_factory=RowAdvantageConfig)
    gamma: float = 0.99
    failure_reward: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.ema < 1.0:
            raise ValueError(f"ema={self.ema}: accepted are 0 <= ema < 1")
        if not 0.0 < self.gamma <= 1.0 or (self.failure_reward and self.gamma == 1.0):
            raise ValueError(f"gamma={self.gamma}: accepted are 0 < gamma <= 1, below 1 with a failure_reward")
        if (
            self.intervention_mass < 0
            or self.pre_intervention_mass < 0
            or self.intervention_mass + self.pre_intervention_mass > 1
        ):
            raise ValueError(
                f"intervention_mass={self.intervention_mass}, pre_intervention_mass={self.pre_intervention_mass}: accepted are "
                "shares >= 0 of at most 1 together"
            )
        for name, default in (("recap", RecapConfig()), ("iql", RowAdvantageConfig())):
            if self.weights != name and getattr(self, name) != default:
                raise ValueError(
                    f"{name}={getattr(self, name)} with weights={self.weights!r}, which never reads it; accepted are its defaults"
                )
        if self.iw_draws < 1 or self.iw_clip <= 0 or self.weight_clip <= 0:
            raise ValueError(
                f"iw_draws={self.iw_draws}, iw_clip={self.iw_clip}, weight_clip={self.weight_clip}: accepted are numbers above 0"
            )


@dataclass(frozen=True)
class OnPolicyConfig:
    """The choices of an on-policy recipe.

    Attributes:
        advantage: ``gae`` (a value function; Schulman et al. 2016, over decisions of m steps each), or ``rloo`` (success of an
            episode less the mean of the others from the same start; groups that all end alike teach nothing), ``polychromic``
            (episodes from one start in sets, each scored by its mean success times its diversity; Polychromic PPO), or ``return``
            (what the decision's episode still earned, as it is).
        objective: ``clipped`` (the ratio's surrogate); ``reinforce`` (advantage times log likelihood, one pass; DPOK, Fan et al.
            2023); ``value_gradient`` (chains only: a value of the half-denoised chunk is climbed one step at a time; VARD).
        set_size, diversity_scale: of ``polychromic``: episodes in a set, and the distance of two paths (root mean square of their
            normalised states) that counts as diversity 1 - 1/e.
        gamma, lam: per environment step, and of GAE. denoise_gamma: gamma_d, later denoising steps count more.
        lr, value_lr: Adam. value_hidden: of the value function.
        epochs, target_kl: passes over a round, and the divergence from the round's policy that ends them early.
        clip, clip_start: c1 and c0; equal ones clip every step alike.
        log_prob_min, log_prob_max: limits of an entry's log likelihood (chains only).
        advantage_quantile: advantages are clipped to [q, 1 - q] quantiles of the round.
        kl_base: weight of the divergence from the base, closed form per step.
        critic_warmup_rounds: rounds that train the value function alone.
        grad_clip: largest gradient norm of the head, 0: none.
    """

    algorithm: Literal["on_policy"] = "on_policy"
    advantage: Literal["gae", "rloo", "polychromic", "return"] = "gae"
    objective: Literal["clipped", "reinforce", "value_gradient"] = "clipped"
    set_size: int = 4
    diversity_scale: float = 1.0
    gamma: float = 0.99
    lam: float = 0.95
    denoise_gamma: float = 0.99
    lr: float = 1e-4
    value_lr: float = 1e-3
    value_hidden: tuple[int, ...] = (256, 256, 256)
    epochs: int = 10
    target_kl: float = 1.0
    clip: float = 0.2
    clip_start: float = 0.2
    log_prob_min: float = -5.0
    log_prob_max: float = 2.0
    advantage_quantile: float = 0.0
    kl_base: float = 0.01
    critic_warmup_rounds: int = 0
    grad_clip: float = 0.0
    failure_reward: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 < self.gamma <= 1.0 or not 0.0 <= self.lam <= 1.0 or not 0.0 < self.denoise_gamma <= 1.0:
            raise ValueError(
                f"gamma={self.gamma}, lam={self.lam}, denoise_gamma={self.denoise_gamma}: accepted are shares, gammas above 0"
            )
        if self.epochs < 1 or self.target_kl <= 0 or not 0.0 < self.clip_start <= self.clip < 1.0:
            raise ValueError(
                f"epochs={self.epochs}, target_kl={self.target_kl}, clip_start={self.clip_start}, clip={self.clip}: accepted are "
                "epochs >= 1, target_kl > 0, 0 < clip_start <= clip < 1"
            )
        if not 0.0 <= self.advantage_quantile < 0.5 or self.kl_base < 0 or self.critic_warmup_rounds < 0:
            raise ValueError(
                f"advantage_quantile={self.advantage_quantile}, kl_base={self.kl_base}, critic_warmup_rounds="
                f"{self.critic_warmup_rounds}: accepted are a quantile below 0.5, and numbers >= 0"
            )
        if self.objective == "reinforce" and self.epochs != 1:
            raise ValueError(
                f"epochs={self.epochs} with objective='reinforce', which has no ratio to correct them by: accepted is 1"
            )
        if self.objective == "value_gradient" and self.advantage != "return":
            raise ValueError(
                f"advantage={self.advantage!r} with objective='value_gradient', whose value is that of what was earned: accepted is return"
            )
        if self.advantage != "polychromic" and (self.set_size, self.diversity_scale) != (4, 1.0):
            raise ValueError(
                f"set_size={self.set_size}, diversity_scale={self.diversity_scale} with advantage={self.advantage!r}, which never reads "
                "them; accepted are 4 and 1"
            )
        if self.set_size < 1 or self.diversity_scale <= 0:
            raise ValueError(
                f"set_size={self.set_size}, diversity_scale={self.diversity_scale}: accepted are integers >= 1, numbers > 0"
            )
        if self.failure_reward:
            raise ValueError(
                f"failure_reward={self.failure_reward}: on-policy learners bootstrap at a time limit; accepted is 0"
            )


@dataclass(frozen=True)
class FixedConfig:
    """Nothing is learnt: the head acts as it is, and the gate says whether it may. ``gamma`` is that of recorded returns."""

    algorithm: Literal["fixed"] = "fixed"
    gamma: float = 0.99
    failure_reward: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 < self.gamma <= 1.0 or (self.failure_reward and self.gamma == 1.0):
            raise ValueError(f"gamma={self.gamma}: accepted are 0 < gamma <= 1, below 1 with a failure_reward")


@dataclass(frozen=True)
class DistillConfig:
    """Several specialised heads become one (COMPASS).

    Attributes:
        teachers: folders of finished runs over the same base, whose acting heads are of one kind; a teacher's position is its code.
        lr: Adam. max_states: recorded states kept of every teacher, evenly spaced over the episodes that its head played.
    """

    algorithm: Literal["distill"] = "distill"
    teachers: tuple[Path, ...] = ()
    lr: float = 3e-4
    max_states: int = 50_000
    gamma: float = 0.99
    failure_reward: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.lr > 0 or self.max_states < 1 or not 0.0 < self.gamma <= 1.0 or self.failure_reward:
            raise ValueError(
                f"lr={self.lr}, max_states={self.max_states}, gamma={self.gamma}, failure_reward={self.failure_reward}: accepted are "
                "lr > 0, max_states >= 1, 0 < gamma <= 1, failure_reward 0"
            )


@dataclass(frozen=True)
class CoarseToFineLearnerConfig:
    """How a coarse-to-fine critic learns (CQN, Seo et al. 2024); its shape is the head's.

    Attributes:
        gamma: discount per environment step. tau: of the network that acts and of targets.
        lr, weight_decay: AdamW.
        critic_weight, bc_weight: of the temporal difference, and of the demonstrations' lead over other actions.
        margin: by which a demonstrated action should be worth more than others.
        dominance: whether its whole distribution should dominate theirs too (in the first order).
        failure_reward: of the returns, see :class:`OffPolicyConfig`.
    """

    algorithm: Literal["cqn"] = "cqn"
    gamma: float = 0.99
    tau: float = 0.02
    lr: float = 5e-5
    weight_decay: float = 0.1
    critic_weight: float = 0.1
    bc_weight: float = 1.0
    margin: float = 0.1
    dominance: bool = True
    failure_reward: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 < self.gamma <= 1.0 or (self.failure_reward and self.gamma == 1.0):
            raise ValueError(f"gamma={self.gamma}: accepted are 0 < gamma <= 1, below 1 with a failure_reward")
        if not 0.0 < self.tau <= 1.0 or min(self.lr, self.weight_decay, self.critic_weight, self.bc_weight, self.margin) < 0:
            raise ValueError(
                f"tau={self.tau}, lr={self.lr}, weight_decay={self.weight_decay}, critic_weight={self.critic_weight}, bc_weight="
                f"{self.bc_weight}, margin={self.margin}: accepted are 0 < tau <= 1 and numbers >= 0"
            )


LearnerConfig = OffPolicyConfig | WeightedBCConfig | OnPolicyConfig | CoarseToFineLearnerConfig | FixedConfig | DistillConfig
"""What a run may learn with, chosen by ``algorithm``."""
