"""Sentences as numbers: hashed words, or a transformer from this machine's disk."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch.nn import functional

from robot_rl.vision.encoders import file_hash, need


class TextEncoder(Protocol):
    """``dim`` numbers of unit length for a sentence."""

    model_id: str
    dim: int

    def encode(self, texts: list[str]) -> np.ndarray:
        """(N, dim) float32 rows of unit length."""


class HashedText:
    """Sentences as signed counts of words and word pairs in ``dim`` hashed bins: tells tasks apart, knows no meaning."""

    def __init__(self, dim: int = 64) -> None:
        self.dim, self.model_id = dim, f"hashed_text.{dim}"

    def encode(self, texts: list[str]) -> np.ndarray:
        out = np.zeros((len(texts), self.dim), np.float32)
        for row, text in zip(out, texts, strict=True):
            words = text.lower().split()
            for gram in [*words, *(" ".join(p) for p in itertools.pairwise(words))]:
                digest = hashlib.sha256(gram.encode()).digest()
                # Each gram spreads over several bins, so that two of them rarely cancel.
                for k in range(4):
                    place = int.from_bytes(digest[4 * k : 4 * k + 3], "big") % self.dim
                    row[place] += 1.0 if digest[4 * k + 3] & 1 else -1.0
            norm = float(np.linalg.norm(row))
            row /= norm if norm > 0 else 1.0
        return out


class TransformersText:
    """Mean of a transformer's last hidden states (MiniLM and the like), from a folder on disk."""

    def __init__(self, weights: str) -> None:
        transformers = need("transformers", "transformers")
        path = Path(weights).expanduser()
        if not path.is_dir():
            raise ValueError(f"text.weights={weights!r}: no such folder")
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(str(path), local_files_only=True)
        self._model = transformers.AutoModel.from_pretrained(str(path), local_files_only=True).eval()
        self.dim, self.model_id = int(self._model.config.hidden_size), f"{path.name}@{file_hash(path)}"

    @torch.inference_mode()
    def encode(self, texts: list[str]) -> np.ndarray:
        tokens = self._tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        hidden = self._model(**tokens).last_hidden_state
        mask = tokens["attention_mask"][:, :, None].float()
        return functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1).numpy()


def build_text_encoder(weights: str = "", dim: int = 64) -> TextEncoder:
    """``weights`` empty: hashed words; otherwise a transformers folder."""
    return TransformersText(weights) if weights else HashedText(dim)
