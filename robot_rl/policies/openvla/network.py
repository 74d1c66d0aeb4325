"""OpenVLA's network (Kim et al. 2024): pictures and words in one sequence through a Llama, which writes action words behind them.

Rebuilt from a checkpoint's ``config.json`` and safetensors; the code that such checkpoints carry for transformers is never run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robot_rl.policies.openvla.tokens import ActionBins
from robot_rl.policies.openvla.vision import Eyes, Projector

CONFIG_FILE, PICTURE_FILE = "config.json", "preprocessor_config.json"
PROMPT = "In: What action should the robot take to {task}?\nOut:"
_EMPTY = "\u2581"
"""Llama's word for a space, which OpenVLA was trained to read last."""
Choose = Callable[[int, Tensor], Tensor]


class TransformersMissing(ImportError):
    """The language model's library is not installed."""


def read_config(folder: Path) -> dict[str, Any] | None:
    """An OpenVLA checkpoint's ``config.json``; None where the folder holds none. transformers need not be installed."""
    try:
        data = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) and data.get("model_type") == "openvla" else None


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise TransformersMissing(
            "this is an OpenVLA checkpoint, and transformers is not installed: pip install 'robot_rl[vla]'"
        ) from None
    return transformers


def _shards(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    files = [folder / Path(n).name for n in names]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{folder} holds no {file.name}; accepted are OpenVLA checkpoints in safetensors files")
    return files


def _weights(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return {n: v for file in _shards(folder) for n, v in load_file(file).items()}


def replace_weights(folder: Path, changed: Mapping[str, Tensor]) -> None:
    """Write tensors of a checkpoint anew, in the files and the precision that they were in. Raises ValueError for a name that it lacks."""
    from safetensors.torch import load_file, save_file

    left = dict(changed)
    for file in _shards(folder):
        held = load_file(file)
        here = {n: left.pop(n).to(held[n].dtype).cpu().contiguous() for n in held if n in left}
        if here:
            save_file({**held, **here}, file, {"format": "pt"})
    if left:
        raise ValueError(f"{folder} holds no {', '.join(sorted(left)[:3])}")


def weight_files(folder: Path) -> list[Path]:
    """Everything that the checkpoint's actions depend on."""
    return sorted(
        p for p in folder.iterdir() if p.suffix == ".safetensors" or (p.suffix == ".json" and "robot_rl" not in p.name)
    )


class OpenVLANetwork(nn.Module):
    """Embeds observations, writes action words, and tells how likely words are.

    Args:
        folder: ``config.json``, ``preprocessor_config.json``, ``tokenizer.json`` and safetensors, as published.
        dtype: of the weights.

    Raises:
        TransformersMissing: transformers is not installed. FileNotFoundError, ValueError: it is no checkpoint that can be used.
    """

    def __init__(self, folder: Path, task: str, dtype: torch.dtype) -> None:
        super().__init__()
        transformers = _transformers()
        config = read_config(folder)
        if config is None:
            raise ValueError(f"{folder} holds no OpenVLA checkpoint: accepted is model_type 'openvla' in its {CONFIG_FILE}")
        text = dict(config["text_config"])
        if text.pop("model_type", "llama") != "llama":
            raise ValueError(f"{folder}: text_config.model_type={config['text_config']['model_type']!r}; accepted is llama")
        weights = _weights(folder)

        def part(prefix: str) -> dict[str, Tensor]:
            return {n[len(prefix) :]: v.float() for n, v in weights.items() if n.startswith(prefix)}

        pictures = json.loads((folder / PICTURE_FILE).read_text(encoding="utf-8"))
        eyes = [part("vision_backbone.featurizer."), part("vision_backbone.fused_featurizer.")]
        try:
            self.eyes = Eyes([e for e in eyes if e], pictures["means"], pictures["stds"])
            self.projector = Projector(part("projector."))
            self.language = transformers.LlamaForCausalLM(transformers.LlamaConfig(**text)).eval()
            self.language.load_state_dict(part("language_model."))
        except (RuntimeError, KeyError, ValueError) as error:
            raise ValueError(f"{folder}: weights, {CONFIG_FILE} and {PICTURE_FILE} do not fit together: {error}") from error
        self.size = int(pictures["input_sizes"][0][-1])
        padding = int(config.get("pad_to_multiple_of", 64))
        self.bins = ActionBins(self.language.config.vocab_size - padding, int(config.get("n_action_bins", 256)))
        self.to(dtype)
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
        words = tokenizer(PROMPT.format(task=task.lower()))["input_ids"]
        empty = tokenizer.convert_tokens_to_ids(_EMPTY)
        if empty is not None and words[-1] != empty:
            words.append(empty)
        self.register_buffer("words", torch.tensor(words), persistent=False)

    words: Tensor

    @property
    def width(self) -> int:
        return int(self.language.config.hidden_size)

    def prompt(self, picture: Tensor) -> Tensor:
        """(B, H, W, 3) uint8 to (B, T, D): the first word, the picture's patches, the other words."""
        words = self.language.get_input_embeddings()(self.words).expand(len(picture), -1, -1)
        return torch.cat([words[:, :1], self.projector(self.eyes(picture)), words[:, 1:]], dim=1)

    def read(self, prompt: Tensor, language: Any = None) -> Any:
        """What the language model makes of (B, T, D): hidden states, and the keys and values with which it goes on.

        Args:
            language: another language model of the same shape, the checkpoint's own by default.
        """
        return (self.language if language is None else language).model(inputs_embeds=prompt, use_cache=True)

    @staticmethod
    def features(found: Any) -> Tensor:
        """(B, 2 D) of :meth:`read`: the hidden state of the last word, which has seen everything, and the mean over all."""
        hidden = found.last_hidden_state.float()
        return torch.cat([hidden[:, -1], hidden.mean(1)], dim=-1)

    def write(self, found: Any, count: int, choose: Choose, language: Any = None) -> Tensor:
        """(B, count) bins, each chosen by ``choose(place, log probabilities (B, bins))`` and read before the next is written.

        Args:
            found: of :meth:`read` by the same language model; it is used up.
        """
        language, out = self.language if language is None else language, list[Tensor]()
        for place in range(count):
            logits = self.bins.of_words(language.lm_head(found.last_hidden_state[:, -1])).float()
            out.append(choose(place, logits.log_softmax(-1)))
            if place + 1 < count:
                word = language.get_input_embeddings()(self.bins.word(out[-1]))[:, None]
                found = language.model(inputs_embeds=word, past_key_values=found.past_key_values, use_cache=True)
        return torch.stack(out, dim=1)

    def log_probs(self, prompt: Tensor, written: Tensor, language: Any = None) -> Tensor:
        """(B, count, bins): log probabilities of every bin at every place, given the words ``written`` (B, count) before it."""
        language = self.language if language is None else language
        words = language.get_input_embeddings()(self.bins.word(written[:, :-1]))
        hidden = language.model(inputs_embeds=torch.cat([prompt, words], dim=1)).last_hidden_state
        return self.bins.of_words(language.lm_head(hidden[:, prompt.shape[1] - 1 :])).float().log_softmax(-1)
