"""A tiny OpenVLA of the published architecture with random weights, written as such checkpoints are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

CAMERA, TASK = "observation.images.front", "lift the block"
OPTIONS = {"camera": CAMERA, "task": TASK}
SIDE, PATCH, TEXT, BINS, PADDING = 28, 14, 48, 256, 64
WORDS = "In: What action should the robot take to lift the block put it away ?\nOut:"


def vit(width: int, depth: int, prefix: int, scaled: bool, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Weights of one vision transformer, named as timm names them (with OpenVLA's name for the scales of its layers)."""
    draw = lambda *shape: torch.randn(*shape, generator=generator) * 0.3  # noqa: E731
    patches = (SIDE // PATCH) ** 2
    out = {"patch_embed.proj.weight": draw(width, 3, PATCH, PATCH), "patch_embed.proj.bias": draw(width)}
    out["pos_embed"] = draw(1, patches, width)
    if prefix:
        out |= {"cls_token": draw(1, 1, width), "reg_token": draw(1, prefix - 1, width)}
    for i in range(depth):
        b = f"blocks.{i}."
        for name, shape in {
            "norm1.weight": (width,), "norm1.bias": (width,), "norm2.weight": (width,), "norm2.bias": (width,),
            "attn.qkv.weight": (3 * width, width), "attn.qkv.bias": (3 * width,), "attn.proj.weight": (width, width),
            "attn.proj.bias": (width,), "mlp.fc1.weight": (2 * width, width), "mlp.fc1.bias": (2 * width,),
            "mlp.fc2.weight": (width, 2 * width), "mlp.fc2.bias": (width,),
        }.items():  # fmt: skip
            out[b + name] = draw(*shape)
        if scaled:
            out |= {f"{b}ls1.scale_factor": draw(width), f"{b}ls2.scale_factor": draw(width)}
    return out | {"norm.weight": draw(width), "norm.bias": draw(width)}


def tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    known = ["<unk>", "<s>", "</s>", "\u2581", *dict.fromkeys(w for w in WORDS.replace(":", " :").replace("?", " ?").split())]
    assert len(known) <= TEXT
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(known)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.save(str(folder / "tokenizer.json"))


def openvla(folder: Path, *, dim: int = 3, seed: int = 0, statistics: dict[str, Any] | None = None) -> Path:
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    text = {
        "model_type": "llama", "vocab_size": TEXT + BINS + PADDING, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2,
    }  # fmt: skip
    torch.manual_seed(seed)
    language = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in text.items() if k != "model_type"}))
    eyes = {"featurizer": vit(32, 3, 5, True, generator), "fused_featurizer": vit(16, 3, 0, False, generator)}
    weights = {f"vision_backbone.{n}.{k}": v for n, part in eyes.items() for k, v in part.items()}
    for name, (into, out) in {"fc1": (48, 64), "fc2": (64, 32), "fc3": (32, 32)}.items():
        weights[f"projector.{name}.weight"] = torch.randn(out, into, generator=generator) * 0.2
        weights[f"projector.{name}.bias"] = torch.zeros(out)
    weights |= {f"language_model.{n}": v.detach().clone() for n, v in language.state_dict().items()}
    save_file({n: v.contiguous() for n, v in weights.items()}, folder / "model.safetensors")
    mine = {
        "q01": [-0.5, -2.0, 0.0, -1.0, -1.0][:dim],
        "q99": [1.5, 2.0, 1.0, 1.0, 1.0][:dim],
        "mask": [True, True, False, True, True][:dim],
    }
    config = {
        "model_type": "openvla", "text_config": text, "n_action_bins": BINS, "pad_to_multiple_of": PADDING, "use_fused_vision_backbone": True,
        "norm_stats": statistics or {"tabletop": {"action": mine}},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    pictures = {
        "input_sizes": [[3, SIDE, SIDE]] * 2,
        "means": [[0.48, 0.46, 0.41], [0.5] * 3],
        "stds": [[0.23, 0.22, 0.22], [0.5] * 3],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures))
    tokenizer(folder)
    return folder


def seen(batch: int, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {CAMERA: torch.randint(0, 256, (batch, 1, SIDE, SIDE, 3), generator=generator, dtype=torch.uint8)}
