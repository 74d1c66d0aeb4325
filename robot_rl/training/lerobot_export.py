"""A run's result as a checkpoint for LeRobot's own loader: adapters worked into the base's weights, other heads distilled into them.

LeRobot has no policy with a head in front. A fine-tuned head is the base's network with other weights, so it is written as such. What any
other head does can be imitated: the base's network is trained further to make, through its own sampler and of the same noise, the chunks
that base and head make together at the observations that the run recorded::

    loss = mean |sample(s, w) - head(s, w)|^2

so what is trained is what is compared afterwards, few sampling steps included.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robot_rl import seeding
from robot_rl.heads.base import Mode, prior_shape
from robot_rl.heads.fine_tuned import FineTunedHead
from robot_rl.policies.checkpoint_options import OPTIONS_FILE
from robot_rl.policies.lerobot import versions
from robot_rl.policies.lerobot.diffusion import LeRobotDiffusion
from robot_rl.policies.lerobot.options import LeRobotOptions
from robot_rl.replay.store import EpisodeStore
from robot_rl.runtime.acting import ActingPolicy
from robot_rl.training.ingest import encode_episode

HELD_OUT = 0.1
_FUSED = ("fine_tuned",)


@dataclass(frozen=True)
class DistilConfig:
    """How a head is distilled.

    Attributes:
        steps: gradient steps; 0 refuses heads that cannot be fused.
        batch_size, lr, ema: of Adam, with a cosine schedule; the running average is what is written.
        max_states: recorded observations, evenly spaced over what the run recorded.
    """

    steps: int = 0
    batch_size: int = 256
    lr: float = 5e-4
    ema: float = 0.99
    max_states: int = 50_000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"distil={self.steps}: accepted are integers >= 0")


@dataclass(frozen=True)
class Distilled:
    """What came of it.

    Attributes:
        states: observations learned from, and another tenth to compare on.
        loss: mean of the last tenth of the steps.
        before, after: mean difference from the teacher's chunk on observations that were held out, normalised, of the base and of
            what is written, from the same prior noise.
    """

    states: int
    steps: int
    loss: float
    before: float
    after: float


def as_lerobot(acting: ActingPolicy, store: Path, config: DistilConfig) -> tuple[LeRobotDiffusion, Distilled | None]:
    """The result as one LeRobot diffusion policy.

    Raises:
        ValueError: another kind of base, or a head that needs distilling when ``config.steps`` is 0.
    """
    base, head = acting.base, acting.head
    if not isinstance(base, LeRobotDiffusion):
        raise ValueError(
            f"format=lerobot: a head's work goes into the weights of a LeRobot diffusion policy, and this is a {type(base).__name__}; "
            "accepted is format=policy"
        )
    if head is None:
        return base, None
    if isinstance(head, FineTunedHead) and head.KIND in _FUSED:
        return head.merged(), None
    if not config.steps:
        raise ValueError(
            f"format=lerobot: a {head.KIND} head acts in front of the {base.TYPE} policy, which LeRobot has no policy class for; accepted are "
            "--distil STEPS, which trains the policy's own network to do the same, or format=policy"
        )
    return distil(acting, recorded_states(base, store, config, acting.device), config)


def distil(acting: ActingPolicy, states: Tensor, config: DistilConfig) -> tuple[LeRobotDiffusion, Distilled]:
    """Imitate base and head by a copy of the base's network, at ``states`` (N, C). Raises ValueError when it diverges."""
    base = acting.base
    assert isinstance(base, LeRobotDiffusion)
    order = np.random.default_rng(seeding.key("distil", config.seed)).permutation(len(states))
    held = max(1, round(HELD_OUT * len(states)))
    test, train = states[order[:held]], states[order[held:]]
    generator = torch.Generator().manual_seed(seeding.key("distil noise", config.seed))
    student = FineTunedHead(base)
    online = student.twin(base)
    parameters = list(online.denoiser.requires_grad_(True).parameters())
    optimizer = torch.optim.Adam(parameters, lr=config.lr)
    losses = []
    for step in range(config.steps):
        rows = train[torch.randint(0, len(train), (config.batch_size,), generator=generator)]
        noise = _prior(acting, len(rows), generator)
        target = _taught(acting, rows, noise, generator)
        for group in optimizer.param_groups:
            group["lr"] = config.lr * 0.5 * (1 + math.cos(math.pi * step / config.steps))
        made = online.policy.sample(rows, _alone(noise), grad=True)
        loss = (made - target).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        decay = min(config.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(student.denoiser.parameters()), parameters, 1 - decay)
    if not math.isfinite(losses[-1]):
        raise ValueError(f"distillation diverged after {config.steps} steps")
    noise = _prior(acting, len(test), generator)
    wanted = _taught(acting, test, noise, generator)
    apart = [float((p.sample(test, _alone(noise)) - wanted).abs().mean()) for p in (base, student.policy)]
    tail = max(1, config.steps // 10)
    return student.merged(), Distilled(len(states), config.steps, sum(losses[-tail:]) / tail, apart[0], apart[1])


def recorded_states(base: LeRobotDiffusion, store: Path, config: DistilConfig, device: str) -> Tensor:
    """(N, C) what the run recorded, at most ``max_states``, evenly spaced. Raises ValueError where it recorded nothing."""
    with EpisodeStore.open(store, mode="r") as opened:
        rows = [encode_episode(base, opened.read(i), device) for i in opened.episode_ids()]
    if not rows:
        raise ValueError(f"{store} holds no episodes; distilling needs the observations that the run recorded")
    states = np.concatenate(rows)
    if len(states) > config.max_states:
        states = states[np.linspace(0, len(states) - 1, config.max_states).astype(int)]
    return torch.from_numpy(states)


def _prior(acting: ActingPolicy, batch: int, generator: torch.Generator) -> Tensor:
    shape = prior_shape(acting.head, acting.base, batch)
    assert shape is not None  # a diffusion policy takes noise
    return torch.randn(shape, generator=generator)


def _alone(noise: Tensor) -> Tensor:
    """The first draw (B, H, A) of those (B, K, H, A) among which a head chooses; the only one of other heads."""
    return noise[:, 0] if noise.ndim == 4 else noise


@torch.no_grad()
def _taught(acting: ActingPolicy, rows: Tensor, noise: Tensor, generator: torch.Generator) -> Tensor:
    """(B, H, A) what base and head make of these observations (B, C)."""
    head, exploring = acting.head, acting.mode == "explore"
    assert head is not None
    drawn = torch.randn((len(rows), head.exploration_dim), generator=generator) if exploring else None
    mode: Mode = "explore" if exploring else "eval"
    return head.propose(rows, acting.base, noise, drawn, mode).chunk


def write_checkpoint(policy: LeRobotDiffusion, out: Path) -> None:
    """As ``save_pretrained`` writes it, sampled as it is here; our own options lie beside it.

    Raises:
        ValueError: what was written does not do what ``policy`` does (checked by loading it again).
    """
    from safetensors.torch import load_file, save_file

    from robot_rl.policies.lerobot.loading import load_lerobot

    out.mkdir(parents=True, exist_ok=True)
    for file in policy.folder.iterdir():
        if file.is_file() and file.name not in (versions.WEIGHTS_FILE, versions.CONFIG_FILE, OPTIONS_FILE):
            shutil.copyfile(file, out / file.name)
    before, now = load_file(policy.folder / versions.WEIGHTS_FILE), policy.policy.state_dict()
    save_file({n: now[n].contiguous().cpu() for n in before}, out / versions.WEIGHTS_FILE, {"format": "pt"})
    config = json.loads((policy.folder / versions.CONFIG_FILE).read_text(encoding="utf-8"))
    config |= {"noise_scheduler_type": "DDIM", "num_inference_steps": policy.spec.num_steps}
    (out / versions.CONFIG_FILE).write_text(json.dumps(config, indent=4), encoding="utf-8")
    plain = LeRobotOptions()
    told: dict[str, Any] = {
        f.name: getattr(policy.options, f.name)
        for f in fields(policy.options)
        if getattr(policy.options, f.name) != getattr(plain, f.name)
    }
    (out / OPTIONS_FILE).write_text(json.dumps(told, indent=2, default=dict), encoding="utf-8")
    again = load_lerobot(out, policy.device)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn((8, policy.spec.conditioning_dim), generator=generator)
    noise = torch.randn((8, *(policy.spec.noise_shape or ())), generator=generator)
    apart = float((again.sample(rows, noise) - policy.sample(rows, noise)).abs().max())
    if not apart < 1e-4:
        raise ValueError(f"{out}: the checkpoint that was written acts differently, by {apart:.2g}")
