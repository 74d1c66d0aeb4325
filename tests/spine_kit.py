"""Small base policies, tasks and recorders that the tests of policies, heads, learners, runtime and training share."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robot_rl.policies.base import PolicySpec
from robot_rl.policies.checkpoint import build_policy
from robot_rl.policies.compact import CompactPolicy
from robot_rl.policies.config import CompactPolicyConfig
from robot_rl.policies.normalizer import Normalizer
from robot_rl.policies.rotations import QUATERNION
from robot_rl.sim.env import EnvSpec
from robot_rl.types import ActionSpec, Decision, Episode, EpisodeMeta, FeatureSpec, Observation, Step

STATE = "observation.state"
IMAGE = "observation.images.top"
ARM = ActionSpec((-1.0, -2.0, 0.0), (1.0, 2.0, 1.0), kind=("continuous", "continuous", "gripper_continuous"),
                 mode=("absolute", "delta", "absolute"))  # fmt: skip


def compact(
    kind: str = "diffusion", *, images: bool = False, action: ActionSpec = ARM, state: int = 4, seed: int = 0, **config: Any
) -> CompactPolicy:
    """A frozen compact policy with random weights and statistics that are not the identity. With ``rotations="matrix"`` the
    state begins with a quaternion."""
    rotations = config.get("rotations", "quaternion")
    names = tuple(f"hand_{q}" for q in QUATERNION) + tuple(f"x{i}" for i in range(state - 4))
    features = {STATE: FeatureSpec((state,), names=names if rotations == "matrix" else ())}
    if images:
        features[IMAGE] = FeatureSpec((32, 32, 3), "uint8")
    rng = np.random.default_rng(seed)
    width = state + 2 * (rotations == "matrix")
    vectors = {STATE: rng.normal(size=width)}, {STATE: rng.uniform(0.5, 2.0, width)}
    normalizer = Normalizer(features, *vectors, np.array(action.low), np.array(action.high), rotations)
    config = {
        "width": 32,
        "depth": 2,
        "num_steps": 4,
        "train_steps": 20,
        "horizon": 4,
        "n_action_steps": 3,
        "image_dim": 8,
        "rotations": rotations,
    } | config
    torch.manual_seed(seed)
    return build_policy(CompactPolicyConfig(kind=kind, **config), features, action, normalizer).freeze()


def observations(policy: CompactPolicy, batch: int, seed: int = 0) -> dict[str, Tensor]:
    """Random physical observations that fit ``policy``."""
    rng = np.random.default_rng(seed)
    out = {}
    for name, f in policy.features.items():
        shape = (batch, policy.config.n_obs_steps, *f.shape)
        value = rng.integers(0, 256, shape) if f.dtype == "uint8" else rng.normal(size=shape)
        out[name] = torch.from_numpy(value.astype(f.dtype))
    return out


class SmoothBase:
    """chunk = tanh(P s + M w): differentiable, in any precision, and it remembers every noise it was given."""

    differentiable = True

    def __init__(
        self, *, conditioning: int = 3, horizon: int = 3, n_action_steps: int = 2, noise: bool = True,
        action: ActionSpec = ARM, seed: int = 0, gain: float = 1.0,
    ) -> None:  # fmt: skip
        self.spec = PolicySpec(
            {STATE: FeatureSpec((conditioning,))}, action, horizon, n_action_steps, 1, (horizon, action.dim) if noise else None,
            conditioning, "smooth", 1, "stats", f"smooth-{seed}",
        )  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        width = horizon * action.dim
        self.state_map = gain * torch.randn(conditioning, width, generator=generator, dtype=torch.float64)
        self.noise_map = gain * torch.randn(width, width, generator=generator, dtype=torch.float64) / width**0.5
        self.noises: list[Tensor] = []
        self.calls = 0

    def encode(self, observation: dict[str, Tensor]) -> Tensor:
        return observation[STATE].flatten(1).to(torch.get_default_dtype())

    def sample(self, conditioning: Tensor, noise: Tensor | None, *, grad: bool = False) -> Tensor:
        self.calls += 1
        with torch.set_grad_enabled(grad):
            x = conditioning @ self.state_map.to(conditioning.dtype)
            if noise is not None:
                self.noises.append(noise.detach().clone())
                x = x + noise.flatten(1) @ self.noise_map.to(conditioning.dtype)
            return torch.tanh(x).unflatten(1, (self.spec.horizon, self.spec.action.dim))

    def normalize_action(self, action: Tensor) -> Tensor:
        low, high = (torch.tensor(x, dtype=action.dtype) for x in (self.spec.action.low, self.spec.action.high))
        return (action - low) * 2 / (high - low) - 1

    def unnormalize_action(self, action: Tensor) -> Tensor:
        low, high = (torch.tensor(x, dtype=action.dtype) for x in (self.spec.action.low, self.spec.action.high))
        return low + (action + 1) * (high - low) / 2


class TwoModeBase(SmoothBase):
    """One action row whose sign is the sign of the first noise entry: a policy that goes left or right by chance.

    Where the state's first entry lies between -1 and 1, ``bias`` makes one side more likely than the other.
    """

    def __init__(self, bias: float = 0.0) -> None:
        super().__init__(conditioning=1, horizon=1, n_action_steps=1, action=ActionSpec((-1.0, -1.0), (1.0, 1.0)))
        self.bias = bias

    def sample(self, conditioning: Tensor, noise: Tensor | None, *, grad: bool = False) -> Tensor:
        assert noise is not None
        self.calls += 1
        side = torch.where(noise[:, 0, :1] + self.bias > 0, 0.7, -0.7)
        return torch.cat([side, 0.3 * torch.tanh(noise[:, 0, 1:])], 1).unsqueeze(1)


@dataclass
class FakeEnv:
    """Counts steps, succeeds when ``success_at`` is reached, and raises when it is stepped after its end."""

    length: int = 10
    success_at: int | None = None
    action: ActionSpec = ARM
    steps: int = 0
    ended: bool = True
    commands: list[np.ndarray] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.spec = EnvSpec("fake/Count", "count", {STATE: FeatureSpec((3,))}, self.action, 10.0, self.length)

    def observation(self) -> Observation:
        return {STATE: np.array([self.steps, self.steps / 10, 1.0], np.float32)}

    def reset(self, *, seed: int) -> tuple[Observation, dict[str, Any]]:
        self.steps, self.ended, self.commands, self.seed = 0, False, [], seed
        return self.observation(), {"success": False, "start": {"seed": float(seed)}}

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        if self.ended:
            raise RuntimeError("stepped after the episode's end")
        self.commands.append(np.array(action))
        self.steps += 1
        success = self.steps == self.success_at
        truncated = not success and self.steps >= self.length
        self.ended = success or truncated
        return self.observation(), float(success), success, truncated, {"success": success}

    def render(self, camera: str = "", width: int = 320, height: int = 240) -> np.ndarray:
        return np.zeros((height, width, 3), np.uint8)

    def get_state(self) -> Any:
        return self.steps

    def set_state(self, state: Any) -> None:
        self.steps = state

    def close(self) -> None:
        pass


@dataclass
class ListRecorder:
    """What an episode's recorder was told, in RAM."""

    steps: list[Step] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    final: Observation | None = None
    success: bool | None = None
    aborted: bool = False

    def append(self, step: Step) -> None:
        self.steps.append(replace(step))

    def decide(self, decision: Decision) -> int:
        self.decisions.append(decision)
        return len(self.decisions) - 1

    def commit(self, final_observation: Observation, *, success: bool | None = None, background: bool = False) -> Episode:
        self.final, self.success = final_observation, success
        rows = [s.observation[STATE] for s in self.steps] + [final_observation[STATE]]
        return Episode.from_arrays(
            EpisodeMeta("fake", success=success), {STATE: np.stack(rows)}, np.stack([s.action for s in self.steps])
        )

    def abort(self) -> None:
        self.aborted = True
