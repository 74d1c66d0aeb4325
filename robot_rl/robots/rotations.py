"""Quaternions (x, y, z, w) and rotation vectors; numpy only."""

from __future__ import annotations

import math

import numpy as np

IDENTITY = np.array([0.0, 0.0, 0.0, 1.0])


def normalized(q: np.ndarray) -> np.ndarray:
    """Raises ValueError for a quaternion without direction (a message that nobody filled in)."""
    norm = float(np.linalg.norm(q))
    if not math.isfinite(norm) or norm < 1e-6:
        raise ValueError(f"quaternion {q.tolist()} has norm {norm:g}: accepted are unit quaternions")
    return q / norm


def multiply(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The rotation ``b`` followed by ``a``."""
    ax, ay, az, aw = a
    bx, by, bz, bw = b
    return np.array([
        aw * bx + ax * bw + ay * bz - az * by,
        aw * by - ax * bz + ay * bw + az * bx,
        aw * bz + ax * by - ay * bx + az * bw,
        aw * bw - ax * bx - ay * by - az * bz,
    ])  # fmt: skip


def inverse(q: np.ndarray) -> np.ndarray:
    return np.array([-q[0], -q[1], -q[2], q[3]])


def from_rotvec(v: np.ndarray) -> np.ndarray:
    angle = float(np.linalg.norm(v))
    if angle < 1e-12:
        return normalized(np.array([v[0] / 2, v[1] / 2, v[2] / 2, 1.0]))
    s = math.sin(angle / 2) / angle
    return np.array([v[0] * s, v[1] * s, v[2] * s, math.cos(angle / 2)])


def to_rotvec(q: np.ndarray) -> np.ndarray:
    """The shortest rotation vector, (3,) radians."""
    if q[3] < 0:
        q = -q
    s = float(np.linalg.norm(q[:3]))
    if s < 1e-12:
        return 2.0 * q[:3]
    return q[:3] * (2.0 * math.atan2(s, float(q[3])) / s)


def from_rot6d(values: np.ndarray) -> np.ndarray:
    """First two columns of a rotation matrix, (6,), orthonormalised (Zhou et al., 2019)."""
    a, b = np.asarray(values[:3], float), np.asarray(values[3:], float)
    x = a / np.linalg.norm(a)
    y = b - (x @ b) * x
    y = y / np.linalg.norm(y)
    return from_matrix(np.stack([x, y, np.cross(x, y)], axis=1))


def to_matrix(q: np.ndarray) -> np.ndarray:
    x, y, z, w = q
    return np.array([
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ])  # fmt: skip


def from_matrix(r: np.ndarray) -> np.ndarray:
    """Of a proper rotation matrix (3, 3); the largest component is computed first, so no division is small."""
    t = [1 + r[0, 0] - r[1, 1] - r[2, 2], 1 - r[0, 0] + r[1, 1] - r[2, 2], 1 - r[0, 0] - r[1, 1] + r[2, 2], 1 + np.trace(r)]
    i = int(np.argmax(t))
    s = 2.0 * math.sqrt(t[i])
    d = (r[2, 1] - r[1, 2], r[0, 2] - r[2, 0], r[1, 0] - r[0, 1])
    if i == 3:
        q = [d[0] / s, d[1] / s, d[2] / s, s / 4]
    else:
        j, k = (i + 1) % 3, (i + 2) % 3
        q = [0.0, 0.0, 0.0, d[i] / s]
        q[i], q[j], q[k] = s / 4, (r[j, i] + r[i, j]) / s, (r[k, i] + r[i, k]) / s
    return normalized(np.array(q))


def to_rot6d(q: np.ndarray) -> np.ndarray:
    r = to_matrix(q)
    return np.concatenate([r[:, 0], r[:, 1]])


def slerp(a: np.ndarray, b: np.ndarray, weight: float) -> np.ndarray:
    """``weight`` of the way from ``a`` to ``b``, the short way round."""
    return multiply(a, from_rotvec(weight * to_rotvec(multiply(inverse(a), b))))


def yaw_of(q: np.ndarray) -> float:
    x, y, z, w = q
    return math.atan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z))


def same_sign(q: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """``q`` or ``-q``, whichever continues ``reference``: controllers interpolate the numbers, not the rotation."""
    return -q if float(q @ reference) < 0 else q
