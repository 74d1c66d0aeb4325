"""robot_rl: reinforcement-learning post-training for pretrained robot policies.

Importing this package is cheap on purpose: no torch, no simulator, no ROS. Import the room you need
(``robot_rl.replay``, ``robot_rl.policies``, ...); the floors they stand on are drawn in ``docs/architecture.md``.
"""

__version__ = "0.1.0"
