"""Differentiable costs of a chunk, in physical units: the closed registry of terms, expressions, and Python functions.

With p_h the tool's position after row h of the n that run, p_0 where it is now (:class:`PathConfig`):

    reach                 |p_n - target|^2
    avoid_sphere          mean_h relu(radius - |p_h - centre|)^2
    keep_out_plane        mean_h relu(-(p_h - point) . normal / |normal|)^2
    align_axis            1 - cos(p_n - p_0, axis)
    speed_limit           mean_h relu(|p_h - p_(h-1)| - limit)^2            (limit in metres a row)
    stay_near_reference   mean over entries of (a - a_base)^2, normalised
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from robot_rl.heads.expressions import Expression
from robot_rl.heads.guidance_config import CostConfig, PathConfig
from robot_rl.policies.compact import CompactPolicy

TINY = 1e-9  # metres; distances have no slope at zero


def _length(v: Tensor) -> Tensor:
    return v.square().sum(-1).clamp_min(TINY**2).sqrt()


@dataclass
class Scene:
    """What a cost reads.

    Attributes:
        action: (B, n, A) the executed rows, physical.
        change: (B, n, A) normalised difference to the base's own chunk.
        observation: feature to (B, dim), physical, newest frame.
        values: what expressions may name, each (B, n) or (B, 1).
        path: (B, n + 1, 3) positions of the tool from now on, or None.
    """

    action: Tensor
    change: Tensor
    observation: dict[str, Tensor]
    values: dict[str, Tensor]
    path: Tensor | None


Cost = Callable[[Scene], Tensor]


class ChunkCosts:
    """Weighed costs over one base policy; :meth:`reward` is what guidance climbs.

    Raises:
        ValueError: a cost that names what this policy does not have, or a term that needs a path and finds none.
    """

    def __init__(self, base: CompactPolicy, costs: tuple[CostConfig, ...], path: PathConfig) -> None:
        self.base, self.path_config = base, path
        self.rows, self.action = base.spec.n_action_steps, base.spec.action
        self.gripper = torch.from_numpy(self.action.gripper_mask)
        self.observed: dict[str, tuple[str, int]] = {}
        for feature in base.normalizer.vector_features:
            spec, short = base.features[feature], feature.removeprefix("observation.").replace(".", "_")
            names = spec.names or tuple(f"{short}_{i}" for i in range(spec.shape[0]))
            self.observed |= {name: (feature, i) for i, name in enumerate(names)}
        self.dims: list[int] = []
        if path.action:
            self._need(path.action, set(self.action.names), "path.action")
            self._need(path.observation, set(self.observed), "path.observation")
            self.dims = [self.action.names.index(n) for n in path.action]
        known = set(self.observed) | set(self.action.names) | {"row"} | ({"path_x", "path_y", "path_z"} if self.dims else set())
        self.costs = [(c.weight, c.gripper, self._build(c, known)) for c in costs]

    @staticmethod
    def _need(names: tuple[str, ...], known: set[str], key: str) -> None:
        for name in names:
            if name not in known:
                raise ValueError(f"{key}: {name!r} is unknown; accepted are {', '.join(sorted(known))}")

    def _build(self, config: CostConfig, known: set[str]) -> Cost:
        if config.term == "expression":
            return self._expression(Expression(config.expression, known))
        if config.term == "python":
            return self._python(config.function)
        if config.term == "stay_near_reference":
            return lambda scene: scene.change.square().mean((1, 2))
        if not self.dims:
            raise ValueError(f"term={config.term!r} measures where the tool goes; path.action and path.observation must say so")
        vectors = {n: self._vector(n, v, known) for n, v in config.options.items()}
        return {
            "reach": self._reach, "avoid_sphere": self._avoid_sphere, "keep_out_plane": self._keep_out_plane,
            "align_axis": self._align_axis, "speed_limit": self._speed_limit,
        }[config.term](**vectors)  # type: ignore[operator]  # fmt: skip

    def _vector(self, name: str, value: object, known: set[str]) -> Callable[[Scene], Tensor]:
        """A point or a number, each coordinate a number or an expression of the observation; (B, 3) or (B,)."""
        parts = list(value) if isinstance(value, (list, tuple)) else [value]
        wanted = 1 if name in ("radius", "limit") else 3
        if len(parts) != wanted:
            raise ValueError(f"option {name}={value!r}: accepted are {wanted} numbers or expressions")
        parsed = [Expression(str(p), known & set(self.observed)) for p in parts]

        def evaluate(scene: Scene) -> Tensor:
            one = scene.action[:, 0, 0].detach() * 0 + 1
            values = [e(scene.values) for e in parsed]
            columns = [v.reshape(len(one), -1)[:, 0] if isinstance(v, Tensor) and v.dim() else v * one for v in values]
            return columns[0] if wanted == 1 else torch.stack(columns, -1)

        return evaluate

    @staticmethod
    def _expression(expression: Expression) -> Cost:
        def cost(scene: Scene) -> Tensor:
            value = expression(scene.values)
            if not isinstance(value, Tensor) or value.dim() < 2:
                value = torch.zeros_like(scene.action[:, :1, 0]) + value
            return value.expand(len(scene.action), -1).sum(-1)

        return cost

    @staticmethod
    def _python(target: str) -> Cost:
        module, _, name = target.partition(":")
        try:
            function = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(
                f"function={target!r}: {error}; accepted is package.module:function that can be imported here"
            ) from None

        def cost(scene: Scene) -> Tensor:
            value = function(scene.action, scene.observation)
            if not isinstance(value, Tensor) or value.shape != scene.action.shape[:1]:
                raise ValueError(f"function={target!r} must return one cost a batch entry, a tensor ({len(scene.action)},)")
            return value

        return cost

    # ---- the registry

    @staticmethod
    def _reach(target: Callable[[Scene], Tensor]) -> Cost:
        return lambda s: (s.path[:, -1] - target(s)).square().sum(-1)  # type: ignore[index]

    @staticmethod
    def _avoid_sphere(centre: Callable[[Scene], Tensor], radius: Callable[[Scene], Tensor]) -> Cost:
        return lambda s: (
            F.relu(radius(s)[:, None] - _length(s.path[:, 1:] - centre(s)[:, None])).square().mean(-1)  # type: ignore[index]
        )

    @staticmethod
    def _keep_out_plane(point: Callable[[Scene], Tensor], normal: Callable[[Scene], Tensor]) -> Cost:
        def cost(s: Scene) -> Tensor:
            n = normal(s)
            n = n / _length(n)[:, None]
            height = ((s.path[:, 1:] - point(s)[:, None]) * n[:, None]).sum(-1)  # type: ignore[index]
            return F.relu(-height).square().mean(-1)

        return cost

    @staticmethod
    def _align_axis(axis: Callable[[Scene], Tensor]) -> Cost:
        def cost(s: Scene) -> Tensor:
            move, a = s.path[:, -1] - s.path[:, 0], axis(s)  # type: ignore[index]
            return 1.0 - (move * a).sum(-1) / (_length(move) * _length(a))

        return cost

    @staticmethod
    def _speed_limit(limit: Callable[[Scene], Tensor]) -> Cost:
        return lambda s: F.relu(_length(s.path.diff(dim=1)) - limit(s)[:, None]).square().mean(-1)  # type: ignore[union-attr]

    # ---- evaluation

    def scene(self, conditioning: Tensor, chunk: Tensor, reference: Tensor) -> Scene:
        """From a normalised chunk (B, H, A) and the base's own one."""
        rows = chunk[:, : self.rows]
        action = self.base.unnormalize_action(rows)
        observation = self.base.vector_observation(conditioning)
        values = {name: observation[feature][:, i : i + 1] for name, (feature, i) in self.observed.items()}
        values |= {name: action[:, :, i] for i, name in enumerate(self.action.names)}
        values["row"] = torch.arange(self.rows, dtype=action.dtype, device=action.device).expand(len(action), -1)
        path = None
        if self.dims:
            now = torch.cat([values[n] for n in self.path_config.observation], dim=-1)
            moved = self.path_config.scale * action[:, :, self.dims]
            delta = torch.from_numpy(self.action.delta_mask[self.dims]).to(action.device)
            ahead = torch.where(delta, now[:, None] + moved.cumsum(1), moved)
            path = torch.cat([now[:, None], ahead], dim=1)
            values |= {f"path_{axis}": ahead[:, :, i] for i, axis in enumerate("xyz")}
        return Scene(action, rows - reference[:, : self.rows], observation, values, path)

    def reward(self, conditioning: Tensor, chunk: Tensor, reference: Tensor) -> Tensor:
        """(B,) minus the weighed sum of costs; differentiable in ``chunk``. Grippers move only for costs that say so."""
        held = torch.where(self.gripper.to(chunk.device), chunk.detach(), chunk)
        free_scene = self.scene(conditioning, chunk, reference) if any(g for _, g, _ in self.costs) else None
        held_scene = self.scene(conditioning, held, reference)
        total = torch.zeros(len(chunk), dtype=chunk.dtype, device=chunk.device)
        for weight, gripper, cost in self.costs:
            scene = free_scene if gripper and free_scene is not None else held_scene
            total = total - weight * cost(scene)
        return total
