"""Rotations as networks should see them: without a quaternion's two signs (Zhou et al. 2019, "On the Continuity of Rotation Representations").

q and -q are the same rotation, and recordings jump from one to the other: robosuite's relative orientations do so several times an
episode. A network then has to learn everything twice, and what lies between the two signs is no rotation at all. The first two
columns of the rotation matrix have neither problem.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

QUATERNION = ("qx", "qy", "qz", "qw")


def quaternions(names: Sequence[str]) -> list[int]:
    """Where quaternions begin in a vector: four names in a row that end in qx, qy, qz, qw and begin alike."""
    found = []
    for i, name in enumerate(names):
        stem = name.removesuffix(QUATERNION[0])
        if tuple(names[i : i + 4]) == tuple(stem + end for end in QUATERNION):
            found.append(i)
    return found


def matrix_columns(quaternion: Tensor) -> Tensor:
    """(..., 4) xyzw, of any length but zero, to the first two columns (..., 6) of the rotation matrix."""
    x, y, z, w = F.normalize(quaternion, dim=-1).unbind(-1)
    first = (1 - 2 * (y * y + z * z), 2 * (x * y + z * w), 2 * (x * z - y * w))
    second = (2 * (x * y - z * w), 1 - 2 * (x * x + z * z), 2 * (y * z + x * w))
    return torch.stack([*first, *second], -1)


def quaternion_of(columns: Tensor) -> Tensor:
    """(..., 6), not quite orthonormal where clipping bent them, to the unit quaternion (..., 4) xyzw with w >= 0."""
    a = F.normalize(columns[..., :3], dim=-1)
    b = F.normalize(columns[..., 3:] - (a * columns[..., 3:]).sum(-1, keepdim=True) * a, dim=-1)
    c = torch.linalg.cross(a, b)
    r00, r11, r22 = a[..., 0], b[..., 1], c[..., 2]
    # Four times the squares of x, y, z, w; the largest is safe to divide by (Shepperd 1978).
    squares = torch.stack([1 + r00 - r11 - r22, 1 - r00 + r11 - r22, 1 - r00 - r11 + r22, 1 + r00 + r11 + r22], -1)
    xy, xz, yz = b[..., 0] + a[..., 1], c[..., 0] + a[..., 2], c[..., 1] + b[..., 2]
    wx, wy, wz = b[..., 2] - c[..., 1], c[..., 0] - a[..., 2], a[..., 1] - b[..., 0]
    rows = torch.stack(
        [
            torch.stack([squares[..., 0], xy, xz, wx], -1),
            torch.stack([xy, squares[..., 1], yz, wy], -1),
            torch.stack([xz, yz, squares[..., 2], wz], -1),
            torch.stack([wx, wy, wz, squares[..., 3]], -1),
        ],
        -2,
    )
    best = squares.argmax(-1)[..., None, None].expand(*squares.shape[:-1], 1, 4)
    found = F.normalize(rows.gather(-2, best)[..., 0, :], dim=-1)
    return torch.where(found[..., 3:] < 0, -found, found)


def widened(vector: Tensor, starts: Sequence[int]) -> Tensor:
    """(..., D) with quaternions at ``starts`` to (..., D + 2 a quaternion): each one's matrix columns in its place."""
    if not starts:
        return vector
    parts, at = [], 0
    for start in starts:
        parts += [vector[..., at:start], matrix_columns(vector[..., start : start + 4])]
        at = start + 4
    return torch.cat([*parts, vector[..., at:]], -1)


def narrowed(vector: Tensor, starts: Sequence[int]) -> Tensor:
    """Back from :func:`widened`, the sign of each quaternion chosen such that w >= 0."""
    if not starts:
        return vector
    parts, at = [], 0
    for i, start in enumerate(starts):
        begin = start + 2 * i
        parts += [vector[..., at:begin], quaternion_of(vector[..., begin : begin + 6])]
        at = begin + 6
    return torch.cat([*parts, vector[..., at:]], -1)
