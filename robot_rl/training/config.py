"""Everything a post-training run can be told, as typed configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from robot_rl.heads.config import (
    AdvantageConfig,
    ChainConfig,
    ChunkPolicyConfig,
    CoarseToFineConfig,
    CorrectionConfig,
    DistilledConfig,
    EditConfig,
    HybridPolicyConfig,
    LatentNoiseConfig,
    ResidualConfig,
    SelectionConfig,
    TokenConfig,
)
from robot_rl.heads.guidance_config import GuidanceConfig, ReferenceConfig, ScoreCorrectionConfig
from robot_rl.learners.config import DistillConfig, FixedConfig, LearnerConfig, OffPolicyConfig, OnPolicyConfig
from robot_rl.policies.config import AdapterConfig, BCConfig
from robot_rl.rewards.composition_config import LABEL, RECORDED, CompositionConfig
from robot_rl.runtime.gate import GateConfig
from robot_rl.sim.curriculum_config import CurriculumConfig
from robot_rl.sim.operator_config import OperatorConfig


def _at_least(config: object, low: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value < low:
            raise ValueError(f"{name}={value}: accepted are numbers >= {low}")


def _share(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name}={value}: accepted are numbers from 0 to 1")


@dataclass(frozen=True)
class EnvConfig:
    """Which task, and how many copies of it.

    Attributes:
        id: ``tabletop/...``, ``robosuite/...`` or ``gymnasium/<registered id>``.
        options: keyword arguments of the task.
        num_envs: simulated robots that are played side by side (the policy is asked for all of them at once).
        workers: ``serial``, ``threads`` or ``processes``.
    """

    id: str = "tabletop/Lift"
    options: dict[str, Any] = field(default_factory=dict)
    num_envs: int = 16
    workers: Literal["serial", "threads", "processes"] = "serial"

    def __post_init__(self) -> None:
        _at_least(self, 1, "num_envs")


@dataclass(frozen=True)
class DemosConfig:
    """Where the demonstrations come from.

    Attributes:
        source: ``expert`` (scripted, of chosen quality), ``dataset`` (a recording in a known format) or ``store``.
        path: of the dataset or store; a dataset is also looked for below ``$ROBOT_RL_DATA`` (``../shared/data``).
        format, options: of the dataset, see ``robot-rl import --help``.
        episodes, skill, noise, only_successful: of the expert.
        prefill: put the demonstrations into the replay buffer too.
    """

    source: Literal["expert", "dataset", "store"] = "expert"
    path: Path | None = None
    format: str = "auto"
    options: dict[str, Any] = field(default_factory=dict)
    episodes: int = 100
    skill: float | tuple[float, float] = 1.0
    noise: float = 0.0
    only_successful: bool = False
    prefill: bool = True

    def __post_init__(self) -> None:
        _at_least(self, 1, "episodes")
        if self.source != "expert" and self.path is None:
            raise ValueError(f"path=null with source={self.source!r}: accepted is the path of the {self.source}")


@dataclass(frozen=True)
class BaseConfig:
    """The base policy: loaded from ``path``, or cloned from the demonstrations with ``bc``.

    Attributes:
        path: a policy or run folder of ours, a LeRobot checkpoint, or a policy server (``remote:HOST:PORT``).
        options: of a LeRobot checkpoint, see :class:`robot_rl.policies.lerobot.options.LeRobotOptions`. They are part of the base's own
            identity, which a run folder keeps and checks.
        replan_every: rows of a chunk that run before a compact base is asked again; 0: as many as it was made for. With 1 a head
            corrects every single step (ResFiT). The base that is asked so lies in the run folder's own ``base/``.
    """

    path: Path | None = None
    options: dict[str, Any] = field(default_factory=dict, metadata={"hash": False})
    replan_every: int = 0
    bc: BCConfig = field(default_factory=BCConfig)

    def __post_init__(self) -> None:
        _at_least(self, 0, "replan_every")
        if self.options and self.path is None:
            raise ValueError(
                f"options={self.options!r} with path=null: only a base that is loaded has options; accepted is {{}}"
            )
        if self.options and self.replan_every:
            raise ValueError(
                f"replan_every={self.replan_every} with options={self.options!r}, which a compact policy does not have: it alone can be asked "
                "more often than it was made for; accepted is 0"
            )


@dataclass(frozen=True)
class HeadConfig:
    """Which head, and its shape; only the chosen kind's part is read. ``adapter``: what a ``fine_tuned`` or ``chain`` head trains."""

    kind: Literal[
        "latent_noise", "residual", "gaussian_residual", "edit", "best_of_n", "chunk_policy", "hybrid_policy", "fine_tuned",
        "advantage_conditioned", "one_step", "coarse_to_fine", "chain", "guided", "score_corrected", "reference", "distilled",
        "token",
    ] = "latent_noise"  # fmt: skip
    latent_noise: LatentNoiseConfig = field(default_factory=LatentNoiseConfig)
    residual: ResidualConfig = field(default_factory=ResidualConfig)
    gaussian_residual: CorrectionConfig = field(default_factory=CorrectionConfig)
    edit: EditConfig = field(default_factory=EditConfig)
    best_of_n: SelectionConfig = field(default_factory=SelectionConfig)
    chunk_policy: ChunkPolicyConfig = field(default_factory=ChunkPolicyConfig)
    hybrid_policy: HybridPolicyConfig = field(default_factory=HybridPolicyConfig)
    advantage_conditioned: AdvantageConfig = field(default_factory=AdvantageConfig)
    one_step: ChunkPolicyConfig = field(default_factory=ChunkPolicyConfig)
    coarse_to_fine: CoarseToFineConfig = field(default_factory=CoarseToFineConfig)
    chain: ChainConfig = field(default_factory=ChainConfig)
    guided: GuidanceConfig = field(default_factory=GuidanceConfig)
    score_corrected: ScoreCorrectionConfig = field(default_factory=ScoreCorrectionConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    distilled: DistilledConfig = field(default_factory=DistilledConfig)
    token: TokenConfig = field(default_factory=TokenConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)

    def __post_init__(self) -> None:
        if self.adapter.kind != "none" and self.kind not in ("fine_tuned", "chain"):
            raise ValueError(
                f"adapter.kind={self.adapter.kind!r} with kind={self.kind!r}: accepted is none, or fine_tuned and chain"
            )

    @property
    def starts_as_base(self) -> bool:
        """Whether an untrained head acts like the base, bit for bit, when it does not explore."""
        kinds = ("residual", "gaussian_residual", "fine_tuned", "advantage_conditioned", "chain", "token")
        return self.kind in kinds and self.adapter.init is None

    @property
    def selection(self) -> SelectionConfig | None:
        """Of a head that chooses by value."""
        return {"edit": self.edit, "best_of_n": self.best_of_n}.get(self.kind)


ALGORITHMS = {
    "latent_noise": ("dsrl_na", "dsrl_sac", "on_policy"), "residual": ("residual",), "gaussian_residual": ("residual_sac",),
    "edit": ("edit",), "best_of_n": ("best_of_n",), "chunk_policy": ("chunk_sac",), "hybrid_policy": ("hybrid_sac",),
    "fine_tuned": ("weighted_bc", "fixed"), "advantage_conditioned": ("weighted_bc",), "one_step": ("one_step",), "coarse_to_fine": ("cqn",),
    "chain": ("on_policy",), "guided": ("guided", "fixed"), "score_corrected": ("fixed",), "reference": ("fixed",), "distilled": ("distill",),
    "token": ("on_policy",),
}  # fmt: skip
"""What can train which kind of head."""


@dataclass(frozen=True)
class MixtureConfig:
    """Mixture acting: the chance per decision that the base acts falls linearly from ``start`` to ``end`` over ``env_steps``.

    Attributes:
        greedy: share of the head's training episodes that it plays as candidates act (eval mode, no base). Without them the
            critics never see where the head's mode leads, and what they overrate there stays overrated.
        handover: the base makes the first decisions of an episode, the head the others (JSRL, Uchendu et al. 2023). ``random``:
            0 to ``handover_decisions`` of them, drawn per episode. ``curriculum``: from ``handover_decisions`` to none in
            ``handover_stages`` steps, one whenever the last ``handover_window`` episodes succeeded as often as in the best
            stage so far, less ``handover_tolerance``.
    """

    start: float = 1.0
    end: float = 0.1
    env_steps: int = 10_000
    greedy: float = 0.0
    handover: Literal["off", "random", "curriculum"] = "off"
    handover_decisions: int = 0
    handover_stages: int = 10
    handover_window: int = 50
    handover_tolerance: float = 0.05

    def __post_init__(self) -> None:
        _share(self, "start", "end", "greedy", "handover_tolerance")
        _at_least(self, 1, "env_steps", "handover_stages", "handover_window")
        if (self.handover == "off") != (self.handover_decisions == 0):
            raise ValueError(
                f"handover={self.handover!r} with handover_decisions={self.handover_decisions}: accepted are off with 0, or random "
                "or curriculum with a number above 0"
            )

    def share(self, env_steps: int) -> float:
        """The base's share ``env_steps`` after the actor's first update."""
        return self.start + (self.end - self.start) * min(1.0, max(0.0, env_steps / self.env_steps))


@dataclass(frozen=True)
class ScheduleConfig:
    """The course of a run.

    Attributes:
        env_steps: training steps after which the run ends whatever it has reached.
        round_episodes: episodes played between two blocks of updates.
        group_size: episodes that share one start state (RLOO compares them); divides ``round_episodes``.
        offline_updates: updates on demonstrations before the first episode, with ``learner.offline_critic``.
        warmup_steps: environment steps that are played before the first online update.
        warmup_acting: who plays them: ``base``, or ``head`` as the offline phase left it (WSRL).
        warmup_perturbation: the base's chunks are disturbed by uniform noise up to this much (normalised; not the gripper)
            while it plays them (ResFiT).
        return_updates: critic regressions on Monte-Carlo returns that start the warm-up.
        warmup_updates: critic updates by temporal difference (the target follows the base) before the first actor update.
        warmup_gate: rank correlation between critic and return that held-out warm-up episodes (one in five) must show before the
            actor moves; the warm-up goes on by temporal difference until they do, at most ``warmup_gate_limit`` updates. 0: off.
        updates_per_step: gradient updates an environment step.
        batch_size: windows an update.
        demo_ratio, demo_ratio_end, demo_ratio_steps: share of demonstrations in every batch, falling linearly.
        replay_capacity: steps in RAM.
        random_shift, shift_views: critics and actor learn from ``shift_views`` encodings of every observation, all but the first of
            pictures moved by up to ``random_shift`` pixels (4 is usual for 84x84; 0: off). Replay then takes so many times the memory.
        candidate_every: environment steps between two candidates for promotion.
        candidate_modes: how a candidate would act; each mode of one version is a candidate of its own.
        evaluate_every: environment steps between two points of the learning curve.
        checkpoint_every_s: wall seconds between two checkpoints.
        learner: ``inline`` learns between two rounds (exactly repeatable); ``process`` learns beside them, see
            :class:`LearnerProcessConfig`.
    """

    env_steps: int = field(default=100_000, metadata={"hash": False})
    round_episodes: int = 16
    group_size: int = 1
    offline_updates: int = 0
    warmup_steps: int = 5_000
    warmup_acting: Literal["base", "head"] = "base"
    warmup_perturbation: float = 0.0
    return_updates: int = 1_000
    warmup_updates: int = 1_000
    warmup_gate: float = 0.0
    warmup_gate_limit: int = 10_000
    updates_per_step: float = 0.5
    batch_size: int = 256
    demo_ratio: float = 0.25
    demo_ratio_end: float = 0.25
    demo_ratio_steps: int = 100_000
    replay_capacity: int = 1_000_000
    random_shift: int = 0
    shift_views: int = 4
    candidate_every: int = 5_000
    candidate_modes: tuple[Literal["explore", "eval"], ...] = ("eval",)
    evaluate_every: int = 5_000
    checkpoint_every_s: float = 60.0
    learner: Literal["inline", "process"] = "inline"

    def __post_init__(self) -> None:
        _at_least(self, 1, "env_steps", "round_episodes", "batch_size", "replay_capacity", "candidate_every", "evaluate_every")
        _at_least(self, 0, "warmup_steps", "return_updates", "warmup_updates", "updates_per_step", "checkpoint_every_s")
        _at_least(self, 0, "offline_updates", "warmup_perturbation", "random_shift")
        _at_least(self, 2, "shift_views")
        if self.group_size < 1 or self.round_episodes % self.group_size:
            raise ValueError(
                f"group_size={self.group_size} with round_episodes={self.round_episodes}: accepted are its divisors"
            )
        _share(self, "demo_ratio", "demo_ratio_end", "warmup_gate")
        if not self.candidate_modes:
            raise ValueError("candidate_modes=[]: accepted is at least one of explore, eval")

    def demo_share(self, env_steps: int) -> float:
        progress = min(1.0, env_steps / max(self.demo_ratio_steps, 1))
        return self.demo_ratio + (self.demo_ratio_end - self.demo_ratio) * progress


@dataclass(frozen=True)
class LearnerProcessConfig:
    """A learner in a process of its own (``schedule.learner=process``).

    Attributes:
        publish_every_s, publish_every_updates: a new version is published when either has passed (0 updates: never by count).
        keep_versions: newest versions that stay on disk, beside those that act, are on probation or may be rolled back to.
        max_backlog_steps: steps that may wait to be learned from; what a slow learner owes beyond them is dropped and counted.
        max_lead_steps: simulated robots rest while they are this many steps ahead of a living learner; 0: acting never waits.
        poll_s: seconds between two looks at the stores.
        threads: of the learner; 0 leaves torch's own choice.
        restarts: how often in a row a learner that dies before it publishes again is restarted.
        backoff_s: wait before the first restart; it doubles up to a minute.
        stale_after_s: a learner without a heartbeat for so long is killed and restarted.
    """

    publish_every_s: float = 10.0
    publish_every_updates: int = 0
    keep_versions: int = 20
    max_backlog_steps: int = 20_000
    max_lead_steps: int = 0
    poll_s: float = 0.2
    threads: int = field(default=0, metadata={"hash": False})
    restarts: int = field(default=5, metadata={"hash": False})
    backoff_s: float = field(default=1.0, metadata={"hash": False})
    stale_after_s: float = field(default=300.0, metadata={"hash": False})

    def __post_init__(self) -> None:
        _at_least(self, 0, "publish_every_s", "publish_every_updates", "max_lead_steps", "threads", "restarts", "backoff_s")
        _at_least(self, 1, "keep_versions", "max_backlog_steps", "stale_after_s")
        _at_least(self, 0.001, "poll_s")


@dataclass(frozen=True)
class StopConfig:
    """When a run ends before its last step.

    Attributes:
        success, episodes: the acting head has succeeded in this share of at least so many gate episodes,
        intervention_rate, intervention_steps: and a person has driven less than this share of the last so many training steps;
            1: whether anybody drives does not matter.
    """

    success: float = 0.97
    episodes: int = 200
    intervention_rate: float = 1.0
    intervention_steps: int = 1000

    def __post_init__(self) -> None:
        _at_least(self, 0, "success")
        _at_least(self, 1, "episodes", "intervention_steps")
        if not 0.0 < self.intervention_rate <= 1.0:
            raise ValueError(f"intervention_rate={self.intervention_rate}: accepted are numbers above 0, to 1")


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured.

    Attributes:
        reference_episodes: base episodes on gate seeds that set the gate's reference.
        curve_episodes: evaluation seeds a point of the learning curve.
        final_episodes: held-out starts of the final table, never played before (the ``final`` seed range).
        videos: starts filmed before and after; ``video_size`` in pixels.
    """

    reference_episodes: int = 400
    curve_episodes: int = 200
    final_episodes: int = field(default=200, metadata={"hash": False})
    videos: int = field(default=4, metadata={"hash": False})
    video_size: tuple[int, int] = field(default=(320, 240), metadata={"hash": False})

    def __post_init__(self) -> None:
        _at_least(self, 1, "reference_episodes", "curve_episodes", "final_episodes")
        _at_least(self, 0, "videos")


@dataclass(frozen=True)
class LoggingConfig:
    """``tensorboard`` scalars always; ``wandb`` when asked (project name, needs the package and an account)."""

    wandb: str = ""
    every_updates: int = 100


def default_learner() -> OffPolicyConfig:
    """What learns when nothing else is said: ``configs/recipes/noise_gradient.yaml``, which wins the table of docs/recipes.md among the recipes
    that need nothing but a base and its demonstrations; over a base without a gradient it distils, as ``dsrl_na`` does."""
    return OffPolicyConfig(
        algorithm="dsrl_na", actor_gradient="auto", n_critics=4, hidden=(256, 256), tau=0.01, critic_lr=5e-4, actor_lr=5e-4,
        actor_reduce="min", initial_alpha=0.005, fixed_alpha=True, value_min=0.0, value_max=1.0,
    )  # fmt: skip


@dataclass(frozen=True)
class PostTrainConfig:
    """One post-training run, from demonstrations to report.

    Attributes:
        run_dir: the run folder; the same command on the same folder resumes.
        device: ``cpu``, ``cuda`` or ``auto``.
        threads: of networks; 0 leaves torch's own choice.
        operator: a simulated person who takes over in training episodes; never in the gate's, nor in evaluations.
        reward: which sources' events make up the reward; without channels it is the one that was recorded.

    When a run ends (``schedule.env_steps``, ``stop``) and how its end is shown are no part of its identity: a run may be
    resumed with more steps or another bar.
    """

    run_dir: Path = field(default=Path("runs/posttrain"), metadata={"hash": False})
    seed: int = 0
    device: str = "auto"
    threads: int = field(default=0, metadata={"hash": False})
    env: EnvConfig = field(default_factory=EnvConfig)
    demos: DemosConfig = field(default_factory=DemosConfig)
    base: BaseConfig = field(default_factory=BaseConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    learner: LearnerConfig = field(default_factory=default_learner)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    learner_process: LearnerProcessConfig = field(default_factory=LearnerProcessConfig)
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    operator: OperatorConfig = field(default_factory=OperatorConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    reward: CompositionConfig = field(default_factory=CompositionConfig)
    stop: StopConfig = field(default_factory=StopConfig, metadata={"hash": False})
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def __post_init__(self) -> None:
        if self.reward.channels:
            self._check_rewards()
        accepted = ALGORITHMS[self.head.kind]
        if self.learner.algorithm not in accepted:
            raise ValueError(
                f"learner.algorithm={self.learner.algorithm!r} with head.kind={self.head.kind!r}: accepted is {' or '.join(accepted)}"
            )
        if isinstance(self.learner, OnPolicyConfig):
            self._check_on_policy(self.learner)
        if self.operator.patience and self.env.workers == "processes":
            raise ValueError(
                f"operator.patience={self.operator.patience} with env.workers='processes', where nobody can watch: accepted are serial, "
                "threads"
            )
        if self.stop.intervention_rate < 1.0 and not self.operator.patience:
            raise ValueError(
                f"stop.intervention_rate={self.stop.intervention_rate} with operator.patience=0, where nobody could drive less: accepted is 1"
            )
        if self.curriculum.discount_start is not None:
            self._check_discount(self.curriculum.discount_start)
        chosen = self.head.adapter.kind == "modulation" and self.head.adapter.entry is None
        if isinstance(self.learner, FixedConfig):
            self._check_fixed()
        elif chosen:
            raise ValueError("head.adapter.entry=null chooses entries and trains none: accepted is learner.algorithm='fixed'")
        if self.head.kind == "guided" and (self.head.guided.value_weight > 0) != (self.learner.algorithm == "guided"):
            raise ValueError(
                f"head.guided.value_weight={self.head.guided.value_weight} with learner.algorithm={self.learner.algorithm!r}: accepted are "
                "a weight above 0 with 'guided', or 0 with 'fixed'"
            )
        selection, cached = self.head.selection, getattr(self.learner, "base_samples", 0)
        if selection is not None and 0 < cached < selection.candidates:
            raise ValueError(
                f"learner.base_samples={cached} with {selection.candidates} candidates: accepted are 0, or at least as many"
            )
        if self.schedule.offline_updates and not self.demos.prefill and not isinstance(self.learner, DistillConfig):
            raise ValueError("schedule.offline_updates > 0 with demos.prefill=false: there would be nothing to learn from")
        self._check_falling(selection)
        update = getattr(getattr(self.learner, "base_update", None), "rows", "none")
        if selection is not None and selection.own_base != (update != "none"):
            raise ValueError(
                f"head.{self.head.kind}.own_base={str(selection.own_base).lower()} with learner.base_update.rows={update!r}: accepted "
                "are true with all or success, false with none"
            )
        if self.learner.algorithm == "dsrl_sac" and self.demos.prefill:
            raise ValueError(
                "demos.prefill=true with learner.algorithm='dsrl_sac': demonstrations have no noise; accepted is false"
            )

    def _check_discount(self, start: float) -> None:
        """Only temporal differences can change their horizon on the way."""
        learner = self.learner
        if (
            not isinstance(learner, OffPolicyConfig)
            or "calql" in (learner.critic_loss, learner.offline_critic)
            or learner.algorithm == "hybrid_sac"
            or start > learner.gamma
        ):
            raise ValueError(
                f"curriculum.discount_start={start} with learner.algorithm={learner.algorithm!r}, learner.gamma={learner.gamma}: accepted is an "
                "off-policy learner without reference values (calql) or a gripper's critic (hybrid_sac), whose columns are discounted once, and "
                "a start of at most its gamma"
            )

    def _check_fixed(self) -> None:
        """A learner that learns nothing must not be asked to."""
        s = self.schedule
        asked = {
            n: getattr(s, n) for n in ("offline_updates", "return_updates", "warmup_updates", "updates_per_step", "warmup_gate")
        }
        if any(asked.values()):
            named = ", ".join(f"schedule.{n}={v}" for n, v in asked.items() if v)
            raise ValueError(f"{named} with learner.algorithm='fixed', which learns nothing: accepted is 0")
        if s.learner == "process":
            raise ValueError(
                "schedule.learner='process' with learner.algorithm='fixed', which learns nothing: accepted is inline"
            )

    def _check_rewards(self) -> None:
        """What learns from rewards as they were recorded cannot learn from ones that come later, nor add its own to them."""
        if isinstance(self.learner, OffPolicyConfig):
            for name, value, accepted in (
                ("takeover_reward", self.learner.takeover_reward, "0"),
                ("optimism.strata", list(self.learner.optimism.strata), "[]"),
            ):
                if value:
                    raise ValueError(
                        f"learner.{name}={value!r} with reward.channels: the learner's own rewards and composed ones exclude each other; "
                        f"accepted is {accepted}, or no channels"
                    )
        if isinstance(self.learner, OnPolicyConfig):
            raise ValueError("reward.channels with an on-policy learner: accepted are none, it cannot wait for late rewards")
        for name, value in (("return_updates", self.schedule.return_updates), ("warmup_gate", self.schedule.warmup_gate)):
            if value:
                raise ValueError(
                    f"schedule.{name}={value} with reward.channels: accepted is 0, returns are of recorded rewards"
                )
        if self.curriculum.discount_start is not None:
            raise ValueError(
                f"curriculum.discount_start={self.curriculum.discount_start} with reward.channels: accepted is null, rewards are composed "
                "with one discount"
            )
        late = [c.source for c in self.reward.channels if c.source not in (RECORDED, LABEL)]
        if late and self.schedule.learner != "process":
            raise ValueError(
                f"reward.channels name {', '.join(late)} with schedule.learner={self.schedule.learner!r}: accepted is process, which "
                "follows the store's reward events"
            )

    def _check_falling(self, selection: SelectionConfig | None) -> None:
        """What a learner lets fall must be there."""
        falls = getattr(self.learner, "select_k_updates", 0)
        if falls and selection is not None and selection.select_reduce != "lcb":
            raise ValueError(
                f"learner.select_k_updates={falls} with head.{self.head.kind}.select_reduce={selection.select_reduce!r}: accepted is lcb"
            )
        guided = getattr(self.learner, "guided_updates", 0)
        if guided and not self.head.residual.guided.on:
            raise ValueError(f"learner.guided_updates={guided} with head.residual.guided.on=false: accepted is true")

    def _check_on_policy(self, learner: OnPolicyConfig) -> None:
        """What makes episodes something else than this policy's own, or leaves the learner without them."""
        s, m = self.schedule, self.mixture
        if s.learner == "process":
            raise ValueError(
                "schedule.learner='process' with an on-policy learner, whose data must be its own: accepted is inline"
            )
        if m.start > 0 or m.end > 0 or m.greedy > 0 or m.handover != "off":
            raise ValueError(
                f"mixture.start={m.start}, mixture.end={m.end}, mixture.greedy={m.greedy}, mixture.handover={m.handover!r} with an "
                "on-policy learner: only its own draws are; accepted are 0, 0, 0, off"
            )
        if self.operator.patience:
            raise ValueError(
                f"operator.patience={self.operator.patience} with an on-policy learner, which learns from its own steps alone: accepted is 0"
            )
        if s.warmup_steps or s.offline_updates:
            raise ValueError(
                f"schedule.warmup_steps={s.warmup_steps}, schedule.offline_updates={s.offline_updates} with an on-policy learner: "
                "accepted is 0 (its value function warms up by learner.critic_warmup_rounds)"
            )
        if learner.advantage == "rloo" and s.group_size < 2:
            raise ValueError(f"schedule.group_size={s.group_size} with learner.advantage='rloo': accepted are 2 or more")
        if learner.advantage == "polychromic" and s.group_size <= learner.set_size:
            raise ValueError(
                f"schedule.group_size={s.group_size} with learner.advantage='polychromic': accepted is more than learner.set_size "
                f"({learner.set_size}), so that there are sets to compare"
            )
        if learner.objective == "value_gradient" and self.head.kind != "chain":
            raise ValueError(f"learner.objective='value_gradient' with head.kind={self.head.kind!r}: accepted is chain")


@dataclass(frozen=True)
class BCRunConfig:
    """``robot-rl bc``: a base policy from an episode store or a dataset.

    Attributes:
        data: an episode store, or a recording in a known format (``format``, ``options`` as for ``robot-rl import``).
        out: folder of the policy.
        only_successful: leave out episodes that are known to have failed.
    """

    data: Path = Path("runs/demos")
    out: Path = Path("runs/base")
    format: str = "auto"
    options: dict[str, Any] = field(default_factory=dict)
    only_successful: bool = False
    device: str = "auto"
    bc: BCConfig = field(default_factory=BCConfig)


@dataclass(frozen=True)
class EvalConfig:
    """``robot-rl eval``: success on fixed seeds, with a Wilson interval.

    Attributes:
        policy: a run folder (its acting head), or the folder of a base policy.
        who: with a run folder, ``policy`` is the acting head and ``base`` the frozen base.
        env: the task; left out, that of the run.
        seeds: ``evaluation`` or ``final``; ``episodes`` of them from ``offset`` on.
        out: also write the episodes there, one JSON line each.
        code: of a distilled head, the task to play instead of the run's own.
    """

    policy: Path = Path("runs/posttrain")
    who: Literal["policy", "base"] = "policy"
    env: EnvConfig | None = None
    seeds: Literal["evaluation", "final"] = "evaluation"
    episodes: int = 200
    offset: int = 0
    out: Path | None = None
    device: str = "auto"
    code: int | None = None

    def __post_init__(self) -> None:
        _at_least(self, 1, "episodes")
        _at_least(self, 0, "offset")
