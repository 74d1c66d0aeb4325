"""Small trainable additions to a frozen denoiser: LoRA (Hu et al. 2022) and a pool of modulations (L2M, Schmied et al. 2023).

    LoRA         y = W x + b + (alpha / rank) B A x                     B starts at zero
    modulation   every feed-forward activation times 1 + d_e, one vector a layer for entry e of the pool; d starts at zero

Both start as the base bit for bit, share its weights instead of copying them, and publish nothing but themselves.
"""

from __future__ import annotations

import importlib
import math
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robot_rl.policies.config import AdapterConfig
from robot_rl.policies.networks import Denoiser


class LoRALinear(nn.Module):
    """A frozen linear layer with a low-rank correction; only the factors ``a`` (rank, in) and ``b`` (out, rank) are its own."""

    linear: nn.Linear

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, generator: torch.Generator | None) -> None:
        super().__init__()
        object.__setattr__(self, "linear", linear)  # not a submodule: the base's weights stay the base's
        like = linear.weight
        bound = 1.0 / math.sqrt(linear.in_features)
        drawn = torch.rand(rank, linear.in_features, generator=generator, dtype=torch.float32) * 2 * bound - bound
        self.a = nn.Parameter(drawn.to(like))
        self.b = nn.Parameter(torch.zeros(linear.out_features, rank, dtype=like.dtype, device=like.device))
        self.scale = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.scale * F.linear(F.linear(x, self.a), self.b)

    def merge(self) -> nn.Linear:
        """One plain layer that computes the same."""
        merged = deepcopy(self.linear)
        merged.weight.data += self.scale * (self.b.data @ self.a.data)
        return merged


class ModulationPool(nn.Module):
    """P entries of one vector a layer; ``entry`` is the one that is trained (and acts), the others are frozen for good.

    Attributes:
        change: (layers, width) d of ``entry``; there is none where ``entry`` is None.
        pool: (P, layers, width) d of all entries; ``entry``'s row is not read.
        keys: (P, C) mean direction of the states each entry was trained on. seen: (P,) how many those were.
    """

    pool: Tensor
    keys: Tensor
    seen: Tensor

    def __init__(self, entries: int, entry: int | None, layers: int, width: int, conditioning_dim: int, like: Tensor) -> None:
        super().__init__()
        kind: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
        self.entry = entry
        if entry is not None:
            self.change = nn.Parameter(torch.zeros(layers, width, **kind))
        self.register_buffer("pool", torch.zeros(entries, layers, width, **kind))
        self.register_buffer("keys", torch.zeros(entries, conditioning_dim, **kind))
        self.register_buffer("seen", torch.zeros(entries, dtype=torch.int64, device=like.device))

    @torch.no_grad()
    def saw(self, conditioning: Tensor) -> None:
        """Move the trained entry's key towards the mean direction of (B, C) states."""
        if self.entry is None:
            return
        before, b = int(self.seen[self.entry]), len(conditioning)
        unit = F.normalize(conditioning, dim=-1).mean(0)
        self.keys[self.entry] += (unit - self.keys[self.entry]) * (b / (before + b))
        self.seen[self.entry] += b

    def choose(self, conditioning: Tensor) -> Tensor:
        """(B,) the entry whose key is nearest by cosine, of those that were trained. Raises ValueError when none was."""
        if not bool((self.seen > 0).any()):
            raise ValueError(
                "modulation: no entry of the pool was ever trained, so none can be chosen; set adapter.entry or adapter.init"
            )
        cosine = F.normalize(conditioning, dim=-1) @ F.normalize(self.keys, dim=-1).T
        return cosine.masked_fill(self.seen == 0, -torch.inf).argmax(-1)

    def changes(self, conditioning: Tensor) -> Tensor:
        """(B or 1, layers, width) d for these states."""
        return self.change.unsqueeze(0) if self.entry is not None else self.pool[self.choose(conditioning)]

    @torch.no_grad()
    def adopt(self, earlier: ModulationPool) -> None:
        """Take over every entry, key and count of an earlier pool. Raises ValueError when the shapes differ."""
        if earlier.pool.shape != self.pool.shape or earlier.keys.shape != self.keys.shape:
            raise ValueError(
                f"adapter.init: its pool is {tuple(earlier.pool.shape)}, this one {tuple(self.pool.shape)}; accepted are equal shapes"
            )
        self.pool.copy_(earlier.pool)
        self.keys.copy_(earlier.keys)
        self.seen.copy_(earlier.seen)
        if earlier.entry is not None:
            self.pool[earlier.entry] = earlier.change
        if self.entry is not None:  # training goes on where this entry was left
            self.change.copy_(self.pool[self.entry])


class ModulatedDenoiser(nn.Module):
    """A frozen denoiser whose feed-forward activations are scaled by a pool's entry.

    What belongs to the state, the scales included, is worked out once by :meth:`condition`, as in the plain denoiser.
    """

    plain: Denoiser
    pool: ModulationPool

    def __init__(self, plain: Denoiser, pool: ModulationPool) -> None:
        super().__init__()
        object.__setattr__(self, "plain", plain)
        object.__setattr__(self, "pool", pool)
        self.width, self.count = plain.output.in_features, len(plain.layers) + 1

    def condition(self, conditioning: Tensor) -> Tensor:
        """(B, width + layers * width): the plain embedding, then the scales."""
        scales = 1.0 + self.pool.changes(conditioning).flatten(1)
        return torch.cat([self.plain.condition(conditioning), scales.expand(len(conditioning), -1)], dim=-1)

    def time(self, t: Tensor) -> Tensor:
        return self.plain.time(t)

    def forward(self, x: Tensor, condition: Tensor, time: Tensor) -> Tensor:
        p = self.plain
        scale = condition[:, self.width :].unflatten(1, (self.count, self.width))
        shift = condition[:, : self.width] + time
        h = p.input(x) + shift
        for i, (norm, layer) in enumerate(zip(p.norms, p.layers, strict=True)):
            h = h + layer(F.silu(norm(h) + shift) * scale[:, i])
        return p.output(F.silu(p.output_norm(h)) * scale[:, -1])


class Adapted:
    """A denoiser to act with, and the part of it that is trained and published.

    Attributes:
        denoiser: what samples; it has ``condition``, ``time`` and ``forward`` of :class:`Denoiser`.
        trained: a module that holds the trained parameters and nothing of the base (the whole copy where there is no adapter).
    """

    def __init__(self, base: nn.Module, config: AdapterConfig, generator: torch.Generator | None = None) -> None:
        """Raises ValueError where this kind of adapter needs our own denoiser and the base's is another."""
        self.config = config
        self.denoiser: nn.Module
        self.trained: nn.Module
        if config.kind == "none":
            self.denoiser = self.trained = deepcopy(base).requires_grad_(False)
        elif config.kind == "modulation":
            if not isinstance(base, Denoiser):
                raise ValueError(
                    f"adapter.kind='modulation' scales activations of a compact policy's denoiser, and this is a {type(base).__name__}; "
                    "accepted are none, lora"
                )
            like = base.output.weight
            pool = ModulationPool(
                config.entries, config.entry, len(base.layers) + 1, base.output.in_features,
                base.conditioning[0].in_features, like,
            )  # fmt: skip
            self.denoiser, self.trained = ModulatedDenoiser(base, pool), pool
        else:
            shared = deepcopy(base, {id(p): p for p in base.parameters()})  # its own modules, the base's parameters
            self._layers = {n: m for n, m in shared.named_modules() if isinstance(m, nn.Linear)}
            factors = {n: LoRALinear(m, config.rank, config.alpha, generator) for n, m in self._layers.items()}
            if config.backend == "peft":
                self.denoiser, parts = _with_peft(shared, factors, config)
                self.trained = nn.ModuleDict({n.replace(".", "_"): m for n, m in parts.items()})
            else:
                for name, layer in factors.items():
                    replace_module(shared, name, layer)
                self.denoiser = shared
                self.trained = nn.ModuleDict({n.replace(".", "_"): m for n, m in factors.items()})

    def saw(self, conditioning: Tensor) -> None:
        """The learner trained on these states (B, C)."""
        if isinstance(self.trained, ModulationPool):
            self.trained.saw(conditioning)

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """A plain denoiser that computes the same (a modulation's must have an ``entry``)."""
        if isinstance(self.denoiser, ModulatedDenoiser):
            if self.denoiser.pool.entry is None:
                raise ValueError("modulation chooses its entry by state, so it cannot be merged; set adapter.entry")
            merged = deepcopy(self.denoiser.plain)
            scale = 1.0 + self.denoiser.pool.change
            for layer, s in zip([*merged.layers, merged.output], scale, strict=True):
                layer.weight.mul_(s)
            return merged
        if self.config.kind == "lora" and self.config.backend == "peft":
            merged = deepcopy(self.denoiser)
            for name in self._layers:
                replace_module(merged, name, _peft_merged(merged.get_submodule(name)))
            return merged
        merged = deepcopy(self.denoiser)
        for name, module in list(merged.named_modules()):
            if isinstance(module, LoRALinear):
                replace_module(merged, name, module.merge())
        return merged


def replace_module(module: nn.Module, name: str, new: nn.Module) -> None:
    """Put ``new`` where ``module`` has the submodule ``name``."""
    parent, _, leaf = name.rpartition(".")
    module.get_submodule(parent)._modules[leaf] = new


def _with_peft(
    shared: nn.Module, factors: dict[str, LoRALinear], config: AdapterConfig
) -> tuple[nn.Module, dict[str, nn.Module]]:
    """The same low-rank layers by the peft library, with the same first values.

    Raises:
        ValueError: peft is not installed.
    """
    try:
        peft = importlib.import_module("peft")
    except ImportError as error:
        raise ValueError(
            f"adapter.backend='peft' needs the peft package ({error}); install it with `pip install 'robot_rl[vla]'`, or take 'builtin'"
        ) from None
    lora = peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=list(factors), lora_dropout=0.0, bias="none")
    with torch.random.fork_rng(devices=[]):  # its own first draw is replaced below
        model = peft.inject_adapter_in_model(lora, shared)
    parts: dict[str, nn.Module] = {}
    for name, own in factors.items():
        layer: Any = model.get_submodule(name)
        down, up = layer.lora_A["default"], layer.lora_B["default"]
        with torch.no_grad():
            down.weight.copy_(own.a)
            up.weight.zero_()
        parts[name] = nn.ModuleDict({"a": down, "b": up})
    return model, parts


def _peft_merged(layer: Any) -> nn.Linear:
    merged = deepcopy(layer.get_base_layer())
    merged.weight.data += layer.get_delta_weight("default")
    return merged
