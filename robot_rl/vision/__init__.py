"""Frozen image encoders: what reward sources and heads see with."""
