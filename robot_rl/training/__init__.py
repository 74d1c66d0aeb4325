"""Headless sessions: demonstrations, base policy, reinforcement learning, gate, report: the main job end to end."""
