"""LeRobot checkpoints as base policies: one adapter for each kind of policy, everything of a LeRobot version in ``versions.py``."""
