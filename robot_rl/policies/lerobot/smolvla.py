"""LeRobot's SmolVLA (Shukor et al. 2025): a small vision-language model whose action expert integrates a flow from noise to a chunk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from robot_rl.policies.inpainting import Denoising
from robot_rl.policies.lerobot.adapter import LeRobotPolicy
from robot_rl.policies.prefix_memory import Prefix, PrefixMemory

_MASK = "mask"


class LeRobotSmolVLA(LeRobotPolicy):
    """Heads read the normalised state, the last token's hidden state, which has seen everything, and the mean over all tokens.

    The sampler reads attention keys and values, which are remembered by those features, see :mod:`robot_rl.policies.prefix_memory`.
    Noise has the padded width of the pretrained model (32), of which the robot's own A dimensions are cut from the result.
    """

    TYPE, SAMPLER = "smolvla", "euler"
    differentiable = True

    def _prepare(self) -> None:
        if self.options.num_inference_steps is not None:
            self.config.num_steps = self.options.num_inference_steps
        self.config.use_cache = True  # the observation's keys and values are computed once, whatever it was trained with
        if not self.config.image_features:
            raise ValueError("smolvla: the checkpoint names no camera; accepted are those with at least one")

    def _built(self) -> None:
        self.notes = (
            f"instruction {self.options.task!r}" + ("" if self.options.task else ": none given, set base.options.task"),
        )
        self._memory = PrefixMemory(
            self._prefix_of, self.options.prefix_cache_mb << 20, self.options.input_cache_mb << 20, self.device
        )
        blank = self._blank()
        with torch.no_grad():
            self.features, prefix = self._look(self.preprocess(blank))
        # what proves a head before it acts asks about a row of zeros: it stands for an empty observation
        self._zeros = prefix

    def _blank(self) -> dict[str, Tensor]:
        return {
            n: torch.zeros(
                (1, self.config.n_obs_steps, *f.shape), dtype=torch.uint8 if f.dtype == "uint8" else torch.float32
            ).to(self.device)
            for n, f in self._read.recorded.items()
        }

    def _shape(self) -> tuple[int, int, tuple[int, int] | None, int, int]:
        c = self.config
        width = self._action.dim if self.options.noise_dims == "real" else c.max_action_dim
        return c.chunk_size, c.n_action_steps, (c.chunk_size, width), self.features.shape[1], c.num_steps

    def _encode_rows(self, observation: Mapping[str, Tensor]) -> Tensor:
        rows, prefix = self._look(self.preprocess(observation))
        self._memory.add(rows, prefix, observation)
        return rows

    def _prefix_of(self, observation: dict[str, Tensor]) -> Prefix:
        with torch.no_grad():
            return self._look(self.preprocess(observation))[1]

    def _look(self, batch: dict[str, Any]) -> tuple[Tensor, Prefix]:
        """(B, C) features and what the sampler reads."""
        model, now = self.policy.model, {}
        for name, value in batch.items():
            if isinstance(value, Tensor) and name.startswith("observation."):
                now[name] = value if ".language." in name else value[:, -1].clone()
        now = self.policy._prepare_batch(now)
        pictures, present = self.policy.prepare_images(now)
        state = self.policy.prepare_state(now)
        tokens, known = now["observation.language.tokens"], now["observation.language.attention_mask"]
        embedded, mask, attention = model.embed_prefix(pictures, present, tokens, known, state=state)
        seen = torch.cumsum(attention, dim=1)
        allowed = (seen[:, None, :] <= seen[:, :, None]) & mask[:, None, :] & mask[:, :, None]
        outputs, cache = model.vlm_with_expert.forward(
            attention_mask=allowed, position_ids=torch.cumsum(mask, dim=1) - 1, past_key_values=None,
            inputs_embeds=[embedded, None], use_cache=True, fill_kv_cache=True,
        )  # fmt: skip
        hidden = outputs[0].float()
        last = mask.long().cumsum(1).argmax(1)
        weight = mask[..., None].float()
        mean = (hidden * weight).sum(1) / weight.sum(1).clamp(min=1.0)
        features = torch.cat([now["observation.state"].float(), hidden[torch.arange(len(hidden)), last], mean], dim=-1)
        tensors = {f"{layer} {kind}": v for layer, kinds in cache.items() for kind, v in kinds.items()}
        return features, Prefix({_MASK: mask, **tensors})

    def _find(self, conditioning: Tensor) -> Prefix:
        if not conditioning.any():
            return Prefix({n: t.expand(len(conditioning), *t.shape[1:]) for n, t in self._zeros.tensors.items()})
        return self._memory.find(conditioning)

    def _sample(self, conditioning: Tensor, noise: Tensor | None, grad: bool) -> Tensor:
        assert noise is not None
        velocity, steps = self._velocity(conditioning), self.config.num_steps
        x, dt = self._padded(noise), -1.0 / steps
        for i in range(steps):
            x = x + dt * velocity(i, x)
        return self._finish(x)

    def _padded(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, self.config.max_action_dim - x.shape[-1]))

    def _finish(self, x: Tensor) -> Tensor:
        chunk = x[:, :, : self._action.dim]
        if self.config.adapt_to_pi_aloha:
            chunk = self.policy._pi_aloha_encode_actions(chunk.clone())
        return self.actions.own_to_unit(chunk)

    def _own(self, chunk: Tensor) -> Tensor:
        own = self.actions.unit_to_own(chunk)
        return self.policy._pi_aloha_encode_actions_inv(own.clone()) if self.config.adapt_to_pi_aloha else own

    def _velocity(self, conditioning: Tensor) -> Callable[[int, Tensor], Tensor]:
        """(step, x) to noise - chunk, what the expert predicts; its time runs from 1 at the noise to 0."""
        model, prefix, steps = self.policy.model, self._find(conditioning), self.config.num_steps
        cache: dict[int, dict[str, Tensor]] = {}
        for name, value in prefix.tensors.items():
            if name != _MASK:
                layer, kind = name.split(" ")
                cache.setdefault(int(layer), {})[kind] = value

        def velocity(i: int, x: Tensor) -> Tensor:
            time = torch.tensor(1.0 + i * (-1.0 / steps), dtype=torch.float32, device=x.device).expand(len(x))
            return model.denoise_step(prefix_pad_masks=prefix.tensors[_MASK], past_key_values=cache, x_t=x, timestep=time)

        return velocity

    def denoising(self, conditioning: Tensor) -> Denoising:
        """The same flow taken apart, for in-painting."""
        velocity, steps = self._velocity(conditioning), self.config.num_steps
        return Denoising(
            levels=[(i / steps, 1.0 - i / steps) for i in range(steps)],
            clean=lambda i, x: x - (1.0 - i / steps) * velocity(i, x),
            advance=lambda i, x, clean: x + (clean - x) / (steps - i),
            start=self._padded, finish=self._finish, own=self._own, deviation=self.actions.deviation,
        )  # fmt: skip
