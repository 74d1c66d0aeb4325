"""From configuration to objects."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from robot_rl import seeding
from robot_rl.heads.advantage import AdvantageHead
from robot_rl.heads.base import Head
from robot_rl.heads.best_of_n import BestOfNHead
from robot_rl.heads.chain import ChainHead
from robot_rl.heads.chunk_policy import ChunkPolicyHead
from robot_rl.heads.coarse_to_fine import CoarseToFineHead
from robot_rl.heads.distilled import CodedBase, DistilledHead
from robot_rl.heads.edit import EditHead
from robot_rl.heads.fine_tuned import FineTunedHead
from robot_rl.heads.guidance import GuidedHead, ScoreCorrectedHead, need_compact
from robot_rl.heads.hybrid import HybridPolicyHead
from robot_rl.heads.latent_noise import LatentNoiseHead
from robot_rl.heads.one_step import OneStepHead
from robot_rl.heads.reference_denoise import ReferenceHead
from robot_rl.heads.residual import GaussianResidualHead, ResidualHead
from robot_rl.heads.token import TokenHead
from robot_rl.learners.coarse_to_fine import CoarseToFineLearner
from robot_rl.learners.config import (
    CoarseToFineLearnerConfig,
    DistillConfig,
    FixedConfig,
    GripperConfig,
    LearnerConfig,
    OffPolicyConfig,
    OnPolicyConfig,
    WeightedBCConfig,
)
from robot_rl.learners.distill import DistillLearner, Teacher
from robot_rl.learners.ensemble import CriticEnsemble
from robot_rl.learners.fixed import FixedLearner
from robot_rl.learners.off_policy import OffPolicyLearner
from robot_rl.learners.on_policy import OnPolicyLearner
from robot_rl.learners.updates import make_critic
from robot_rl.learners.weighted_bc import WeightedBCLearner
from robot_rl.policies.adapters import ModulationPool
from robot_rl.policies.base import BasePolicy, PolicySpec
from robot_rl.replay.store import EpisodeStore
from robot_rl.training.checkpoint import latest_checkpoint, load_checkpoint
from robot_rl.training.config import HeadConfig, PostTrainConfig
from robot_rl.training.earlier_runs import acting_head, read_references, read_teacher


def build_head(base: BasePolicy, head: HeadConfig, seed: int, learner: LearnerConfig | None = None) -> Head:
    """A fresh head; the same seed gives the same parameters.

    Args:
        learner: shapes the critic of a head that chooses by value (``edit``, ``best_of_n``); others do not read it.

    Raises:
        ValueError: the head does not fit the base, or chooses by value and ``learner`` is not given.
    """
    generator = torch.Generator().manual_seed(seeding.key("head", seed))
    if head.kind == "latent_noise":
        return LatentNoiseHead(base, head.latent_noise, generator=generator)
    if head.kind == "residual":
        return ResidualHead(base, head.residual, generator=generator)
    if head.kind == "gaussian_residual":
        return GaussianResidualHead(base, head.gaussian_residual, generator=generator)
    if head.kind == "distilled":
        coded = CodedBase(base, head.distilled.slots)
        return DistilledHead(head.distilled, build_head(coded, replace(head, kind=head.distilled.student), seed, learner))
    if head.kind == "chunk_policy":
        return ChunkPolicyHead(base, head.chunk_policy, generator=generator)
    if head.kind == "coarse_to_fine":
        return CoarseToFineHead(base, head.coarse_to_fine, generator=generator)
    if head.kind == "one_step":
        return OneStepHead(base, head.one_step, generator=generator)
    if head.kind == "hybrid_policy":
        gripper = learner.gripper if isinstance(learner, OffPolicyConfig) else GripperConfig()
        return HybridPolicyHead(base, head.hybrid_policy, gripper.told(base.spec.action), gripper.hidden, generator=generator)
    if head.kind == "fine_tuned":
        return _adapted(FineTunedHead(base, head.adapter, generator=generator), base)
    if head.kind == "advantage_conditioned":
        return AdvantageHead(base, head.advantage_conditioned)
    if head.kind == "chain":
        return _adapted(ChainHead(base, head.chain, head.adapter, generator=generator), base)
    if head.kind == "token":
        return TokenHead(base, head.token, generator=generator)
    if head.kind == "reference":
        compact = need_compact(base, "reference denoising")
        return ReferenceHead(compact, head.reference, *read_references(compact, head.reference))
    if head.kind == "score_corrected":
        run, compact = head.score_corrected.run, need_compact(base, "score correction")
        inner = None if run is None else acting_head(run, compact, "head.score_corrected.run")[0]
        return ScoreCorrectedHead(compact, head.score_corrected, inner)
    if head.kind == "guided" and head.guided.value_weight == 0:
        return GuidedHead(base, head.guided)
    critic = _chunk_critic(base, head, seed, learner)
    if head.kind == "guided":
        return GuidedHead(base, head.guided, critic)
    if head.kind == "edit":
        return EditHead(base, head.edit, critic, generator=generator)
    return BestOfNHead(base, head.best_of_n, critic)


Learner = OffPolicyLearner | WeightedBCLearner | OnPolicyLearner | CoarseToFineLearner | FixedLearner | DistillLearner


def build_learner(base: BasePolicy, config: PostTrainConfig, device: str) -> Learner:
    """A fresh learner with a fresh head.

    Raises:
        ValueError: ``learner.critic_init`` holds no critic that fits.
    """
    head = build_head(base, config.head, config.seed, config.learner)
    if isinstance(config.learner, WeightedBCConfig):
        return WeightedBCLearner(base, head, config.learner, device)
    if isinstance(config.learner, OnPolicyConfig):
        return OnPolicyLearner(base, head, config.learner, device)
    if isinstance(config.learner, CoarseToFineLearnerConfig):
        return CoarseToFineLearner(base, head, config.learner, device)
    if isinstance(config.learner, FixedConfig):
        return FixedLearner(base, head, config.learner, device)
    if isinstance(config.learner, DistillConfig):
        compact = need_compact(base, "distillation")
        teachers = [Teacher(*read_teacher(p, compact, config.learner, i)) for i, p in enumerate(config.learner.teachers)]
        return DistillLearner(base, head, config.learner, teachers, device)
    learner = OffPolicyLearner(base, head, config.learner, device)
    if config.learner.critic_init is not None:
        learner.warm_start(saved_critic(config.learner.critic_init))
    return learner


def saved_critic(run: Path) -> dict[str, torch.Tensor]:
    """The critic of another run's latest checkpoint, wherever its learner ran."""
    for folder in (run / "checkpoints", run / "learner" / "checkpoints"):
        path = latest_checkpoint(folder)
        tensors = load_checkpoint(path)[0] if path is not None else {}
        if "critic" in tensors.get("learner", {}):
            return tensors["learner"]["critic"]["network"]
    raise ValueError(
        f"learner.critic_init={str(run)!r}: no checkpoint with a critic; accepted is the folder of an off-policy run"
    )


def _adapted(head: FineTunedHead, base: BasePolicy) -> FineTunedHead:
    """With the pool of ``head.adapter.init``, where one is named."""
    run = head.adapter.init
    if run is not None:
        earlier, _ = acting_head(run, need_compact(base, "an adapter"), "head.adapter.init")
        if not isinstance(earlier, FineTunedHead) or not isinstance(earlier.denoiser, ModulationPool):
            raise ValueError(f"head.adapter.init={str(run)!r}: accepted is a finished run whose acting head is a modulation")
        assert isinstance(head.denoiser, ModulationPool)
        head.denoiser.adopt(earlier.denoiser)
    return head


def _chunk_critic(base: BasePolicy, head: HeadConfig, seed: int, learner: LearnerConfig | None) -> CriticEnsemble:
    """An ensemble that reads a state and the executed rows, shaped like the learner's."""
    if not isinstance(learner, OffPolicyConfig):
        raise ValueError(
            f"head.kind={head.kind!r} chooses by its learner's critic: accepted is an off-policy learner's configuration"
        )
    spec, generator = base.spec, torch.Generator().manual_seed(seeding.key("head critic", seed))
    width = spec.conditioning_dim + spec.n_action_steps * spec.action.dim
    return make_critic(learner, width, generator, torch.device("cpu"))


def open_store(path: Path, spec: PolicySpec) -> EpisodeStore:
    """The store that a run appends to, made to fit the policy where there is none yet.

    Not synchronised at every episode: a run repeats what a power cut took.
    """
    if (path / "store.json").exists():
        return EpisodeStore.open(path, mode="a", sync=False)
    return EpisodeStore.create(
        path, observation_features=spec.observation_features, action=spec.action, noise_shape=spec.noise_shape,
        chunk_horizon=spec.horizon, stats_hash=spec.stats_hash, sync=False,
    )  # fmt: skip


def pick_device(name: str) -> str:
    """``auto`` is CUDA where there is one. Raises ValueError for a device that torch does not have."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device={name!r}: torch sees no CUDA device here; accepted are cpu, auto")
    if not name.startswith(("cpu", "cuda")):
        raise ValueError(f"device={name!r}: accepted are auto, cpu, cuda, cuda:<n>")
    return name
