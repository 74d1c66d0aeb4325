"""From the person's last command to the policy's, without a jump."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np


class Rotation(NamedTuple):
    """Dimensions of an action that are one orientation: ``rotvec`` takes 3 of them, ``quaternion`` (x, y, z, w) takes 4."""

    start: int
    kind: Literal["rotvec", "quaternion"]

    @property
    def slice(self) -> slice:
        return slice(self.start, self.start + (3 if self.kind == "rotvec" else 4))


def min_jerk(x: float) -> float:
    """10x^3 - 15x^4 + 6x^5: 0 to 1 with no speed and no acceleration at either end; clipped outside."""
    x = min(max(x, 0.0), 1.0)
    return x * x * x * (10.0 + x * (-15.0 + 6.0 * x))


def blend(
    start: np.ndarray, end: np.ndarray, share: float, newest: np.ndarray, rotations: Sequence[Rotation] = ()
) -> np.ndarray:
    """(A,) ``(1 - share) * start + share * end``; orientations along the shortest way on SO(3).

    Args:
        newest: (A,) bool, dimensions that are never averaged (grippers): they keep ``start`` until ``share`` reaches 1.
    """
    mixed = (1.0 - share) * start + share * end
    for rotation in rotations:
        part = rotation.slice
        first, last = (_quaternion(v[part], rotation.kind) for v in (start, end))
        turned = slerp(first, last, share)
        mixed[part] = turned if rotation.kind == "quaternion" else _rotvec(turned)
    return np.where(newest, end if share >= 1.0 else start, mixed).astype(np.float32)


def slerp(first: np.ndarray, last: np.ndarray, share: float) -> np.ndarray:
    """Unit quaternion a ``share`` of the shortest way from ``first`` to ``last``."""
    dot = float(first @ last)
    if dot < 0.0:
        last, dot = -last, -dot
    if dot > 0.9995:  # nearly equal: the sine below would lose its digits
        mixed = first + share * (last - first)
    else:
        angle = np.arccos(dot)
        mixed = (np.sin((1.0 - share) * angle) * first + np.sin(share * angle) * last) / np.sin(angle)
    return mixed / np.linalg.norm(mixed)


def _quaternion(values: np.ndarray, kind: str) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if kind == "quaternion":
        norm = np.linalg.norm(values)
        return values / norm if norm > 1e-9 else np.array([0.0, 0.0, 0.0, 1.0])
    angle = float(np.linalg.norm(values))
    half = 0.5 * np.sinc(angle / (2.0 * np.pi))  # sin(angle / 2) / angle, also at 0
    return np.append(half * values, np.cos(angle / 2.0))


def _rotvec(quaternion: np.ndarray) -> np.ndarray:
    vector, w = quaternion[:3], float(quaternion[3])
    if w < 0.0:
        vector, w = -vector, -w
    sine = float(np.linalg.norm(vector))
    return 2.0 * vector if sine < 1e-9 else vector / sine * (2.0 * np.arctan2(sine, w))
