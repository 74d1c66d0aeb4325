"""Heads: the small trainable part between a frozen base policy and the robot."""
