"""Closed-form inverse kinematics of the table-top arm.

The arm is yaw-pitch-roll-pitch-roll-pitch-roll with a spherical shoulder and wrist, and its tool always points down. That
leaves one redundancy, the swivel of the elbow, which is spent on keeping the elbow up in the vertical plane of the arm (roll
joints at zero): the posture a null-space term would pull to. The solution is exact, has no iterations to converge and costs
about two microseconds, so one Cartesian command becomes one joint command without touching the physics.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class ArmGeometry:
    """Lengths in metres: where the shoulder is, the two links, and wrist centre to tool centre point."""

    shoulder: tuple[float, float, float]
    upper: float
    fore: float
    tool: float

    @classmethod
    def from_model(cls, model: Any) -> ArmGeometry:
        """Read the lengths from the bodies ``base, link1 .. link6, hand`` and the site ``tcp`` of an ``mujoco.MjModel``."""
        base, link1, link2 = (model.body(n).pos for n in ("base", "link1", "link2"))
        shoulder = base + link1 + link2
        return cls(
            shoulder=(float(shoulder[0]), float(shoulder[1]), float(shoulder[2])),
            upper=float(model.body("link3").pos[2] + model.body("link4").pos[2]),
            fore=float(model.body("link5").pos[2] + model.body("link6").pos[2]),
            tool=float(model.body("hand").pos[2] + model.site("tcp").pos[2]),
        )

    def solve(self, x: float, y: float, z: float, yaw: float) -> np.ndarray:
        """(7,) joint angles that put the tool centre at (x, y, z) pointing down, the fingers turned by ``yaw`` about vertical.

        Raises:
            ValueError: the point is out of reach.
        """
        dx, dy, dz = x - self.shoulder[0], y - self.shoulder[1], z + self.tool - self.shoulder[2]
        radial = math.hypot(dx, dy)
        distance = math.hypot(radial, dz)
        a, b = self.upper, self.fore
        if not abs(a - b) < distance < a + b or radial < 1e-6:
            raise ValueError(f"tool position ({x:.3f}, {y:.3f}, {z:.3f}) m is out of the arm's reach")
        q1 = math.atan2(dy, dx)
        q2 = math.atan2(radial, dz) - math.acos((a * a + distance * distance - b * b) / (2 * a * distance))
        q4 = math.pi - math.acos((a * a + b * b - distance * distance) / (2 * a * b))
        return np.array([q1, q2, 0.0, q4, 0.0, math.pi - q2 - q4, q1 - yaw])
