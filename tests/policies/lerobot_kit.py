"""Tiny LeRobot checkpoints, made here and saved with LeRobot's own ``save_pretrained``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

STATE, ENV, TOP, WRIST = (
    "observation.state", "observation.environment_state", "observation.images.top", "observation.images.wrist",
)  # fmt: skip


def statistics(state: int = 4, env: int = 3, action: int = 3, cameras: tuple[str, ...] = (), seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)

    def of(dim: int) -> dict[str, np.ndarray]:
        low, high = -rng.uniform(0.5, 2.0, dim), rng.uniform(0.5, 2.0, dim)
        found = {"min": low, "max": high, "mean": 0.4 * (low + high), "std": 0.25 * (high - low)}
        return {k: v.astype(np.float32) for k, v in found.items()}

    picture = {"mean": np.full((3, 1, 1), 0.45, np.float32), "std": np.full((3, 1, 1), 0.2, np.float32)}
    picture |= {"min": np.zeros((3, 1, 1), np.float32), "max": np.ones((3, 1, 1), np.float32)}
    return {STATE: of(state), ENV: of(env), "action": of(action), **dict.fromkeys(cameras, picture)}


def features(state: int = 4, env: int | None = 3, action: int = 3, cameras: tuple[str, ...] = (), size: int = 32) -> Any:
    from lerobot.configs.types import FeatureType, PolicyFeature

    inputs = {STATE: PolicyFeature(FeatureType.STATE, (state,))}
    if env is not None:
        inputs[ENV] = PolicyFeature(FeatureType.ENV, (env,))
    inputs |= {c: PolicyFeature(FeatureType.VISUAL, (3, size, size)) for c in cameras}
    return {"input_features": inputs, "output_features": {"action": PolicyFeature(FeatureType.ACTION, (action,))}}


def save(folder: Path, policy: Any, stats: dict[str, Any], seed: int = 0) -> Path:
    from lerobot.policies.factory import make_pre_post_processors

    tensors = {k: {n: torch.from_numpy(v) for n, v in s.items()} for k, s in stats.items()}
    pre, post = make_pre_post_processors(policy.config, dataset_stats=tensors)
    policy.save_pretrained(folder)
    pre.save_pretrained(folder)
    post.save_pretrained(folder)
    return folder


def diffusion(folder: Path, *, cameras: tuple[str, ...] = (), seed: int = 0, **changes: Any) -> Path:
    from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
    from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy

    torch.manual_seed(seed)
    shape = features(env=None if cameras else 3, cameras=cameras)
    config = DiffusionConfig(
        **{
            **shape, "n_obs_steps": 2, "horizon": 8, "n_action_steps": 4, "down_dims": (16, 32), "diffusion_step_embed_dim": 16,
            "kernel_size": 3, "n_groups": 4, "crop_shape": (28, 28), "spatial_softmax_num_keypoints": 4, "num_train_timesteps": 20,
            "pretrained_backbone_weights": None, "device": "cpu", **changes,
        }
    )  # fmt: skip
    return save(folder, DiffusionPolicy(config), statistics(cameras=cameras))


def act(folder: Path, *, cameras: tuple[str, ...] = (TOP,), seed: int = 0, **changes: Any) -> Path:
    from lerobot.policies.act.configuration_act import ACTConfig
    from lerobot.policies.act.modeling_act import ACTPolicy

    torch.manual_seed(seed)
    config = ACTConfig(
        **{
            **features(env=None if cameras else 3, cameras=cameras), "chunk_size": 6, "n_action_steps": 4, "dim_model": 32,
            "n_heads": 2, "dim_feedforward": 32, "n_encoder_layers": 1, "n_decoder_layers": 1, "n_vae_encoder_layers": 1,
            "latent_dim": 4, "pretrained_backbone_weights": None, "device": "cpu", **changes,
        }
    )  # fmt: skip
    return save(folder, ACTPolicy(config), statistics(cameras=cameras))


def vqbet(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    from lerobot.policies.vqbet.configuration_vqbet import VQBeTConfig
    from lerobot.policies.vqbet.modeling_vqbet import VQBeTPolicy

    torch.manual_seed(seed)
    config = VQBeTConfig(
        **{
            **features(env=None, cameras=(TOP,)), "n_obs_steps": 3, "action_chunk_size": 4, "n_action_pred_token": 2,
            "gpt_input_dim": 32, "gpt_output_dim": 32, "gpt_n_layer": 1, "gpt_n_head": 2, "gpt_hidden_dim": 32, "gpt_block_size": 64,
            "vqvae_n_embed": 8, "vqvae_embedding_dim": 16, "vqvae_enc_hidden_dim": 16, "crop_shape": (28, 28),
            "spatial_softmax_num_keypoints": 4, "device": "cpu", **changes,
        }
    )  # fmt: skip
    policy = VQBeTPolicy(config)
    policy.vqbet.action_head.vqvae_model.discretized = torch.tensor(True)
    return save(folder, policy, statistics(cameras=(TOP,)))


def frames(n: int, batch: int, *, env: bool = True, cameras: tuple[str, ...] = (), seed: int = 1) -> dict[str, np.ndarray]:
    """Observations (batch, n, ...): ``n`` successive frames of ``batch`` robots."""
    rng = np.random.default_rng(seed)
    out = {STATE: rng.normal(size=(batch, n, 4)).astype(np.float32)}
    if env:
        out[ENV] = rng.normal(size=(batch, n, 3)).astype(np.float32)
    return out | {c: rng.integers(0, 256, (batch, n, 32, 32, 3), np.uint8) for c in cameras}


def lerobot_actions(
    folder: Path, seen: dict[str, np.ndarray], steps: int, noise: torch.Tensor | None, **config: Any
) -> np.ndarray:
    """(B, steps, A): LeRobot's own loop, one ``select_action`` a step, on ``seen``'s frames and then its last one repeated."""
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors

    loaded = PreTrainedConfig.from_pretrained(folder)
    for name, value in {"pretrained_backbone_weights": None, **config}.items():
        if hasattr(loaded, name):
            setattr(loaded, name, value)
    policy = get_policy_class(loaded.type).from_pretrained(folder, config=loaded)
    pre, post = make_pre_post_processors(loaded, pretrained_path=str(folder))
    policy.reset()
    out = []
    (length,) = {v.shape[1] for v in seen.values()}
    for t in range(length - 1 + steps):
        batch: dict[str, Any] = {}
        for name, rows in seen.items():
            value = torch.from_numpy(rows[:, min(t, length - 1)])
            batch[name] = (value.float() / 255).permute(0, 3, 1, 2).contiguous() if value.dtype == torch.uint8 else value
        if t < length - 1:  # fill the queues as select_action would, without acting
            ready = pre(batch)
            ready = {k: v for k, v in ready.items() if k.startswith("observation.")}
            _remember(policy, ready)
            continue
        ready = pre({**batch, "task": ["" for _ in range(len(rows))]})
        given = {} if noise is None else {"noise": noise}
        out.append(
            post(policy.select_action({k: v for k, v in ready.items() if k.startswith("observation.")}, **given)).numpy()
        )
    return np.stack(out, axis=1)


def _remember(policy: Any, ready: dict[str, Any]) -> None:
    from lerobot.policies.utils import populate_queues

    cameras = list(policy.config.image_features)
    if cameras:
        ready["observation.images"] = torch.stack([ready[c] for c in cameras], dim=-4)
    policy._queues = populate_queues(policy._queues, ready)


WORDS = "lift the block put it in a bin open drawer"


def tiny_vlm(folder: Path, words: str = WORDS, width: int = 32, layers: int = 2) -> Path:
    """Configuration, tokenizer (of ``words``) and processor of a SmolVLM so small that it is drawn at random in no time."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        PreTrainedTokenizerFast,
        SmolVLMConfig,
        SmolVLMImageProcessor,
        SmolVLMProcessor,
        SmolVLMVideoProcessor,
    )

    special = {
        "image_token": "<image>", "fake_image_token": "<fake_token_around_image>", "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>",
    }  # fmt: skip
    known = ["<unk>", "<pad>", "<s>", "</s>", *special.values(), *words.split()]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(known)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=special,
    )
    text = {
        "model_type": "llama", "vocab_size": 32, "hidden_size": width, "intermediate_size": width, "num_hidden_layers": layers, "head_dim": width // 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 1, "max_position_embeddings": 128,
    }  # fmt: skip
    vision = {
        "model_type": "smolvlm_vision", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 32, "patch_size": 8,
    }  # fmt: skip
    SmolVLMConfig(text_config=text, vision_config=vision, scale_factor=2, image_token_id=4, pad_token_id=1).save_pretrained(
        folder
    )
    SmolVLMProcessor(SmolVLMImageProcessor(), fast, SmolVLMVideoProcessor(), image_seq_len=4).save_pretrained(folder)
    return folder


def smolvla(folder: Path, *, cameras: tuple[str, ...] = (TOP,), seed: int = 0, **changes: Any) -> Path:
    from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

    torch.manual_seed(seed)
    config = SmolVLAConfig(
        **{
            **features(env=None, cameras=cameras), "chunk_size": 6, "n_action_steps": 4, "max_state_dim": 8, "max_action_dim": 5,
            "resize_imgs_with_padding": (32, 32), "num_steps": 4, "num_vlm_layers": 2, "vlm_model_name": str(tiny_vlm(folder / "vlm")),
            "load_vlm_weights": False, "tokenizer_max_length": 8, "pad_language_to": "max_length", "device": "cpu", **changes,
        }
    )  # fmt: skip
    return save(folder, SmolVLAPolicy(config), statistics(cameras=cameras))
