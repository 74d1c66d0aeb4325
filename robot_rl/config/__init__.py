"""Typed configuration: dataclasses, YAML files, dotted overrides; every mistake is reported at once, before anything starts.

``load(PostTrainConfig, "quickstart.yaml", ["--train.utd=4"])`` reads the file (and what it ``extends``), puts the overrides
on top, and builds the dataclass. Override syntax is LeRobot's (draccus): ``--key.path=value`` or ``--key.path value``; a
bare ``--flag`` sets a boolean. Values are YAML 1.2 scalars, lists or mappings (``on`` and ``no`` are text, ``1e-3`` is a
number). Decoding is done here rather than by draccus because draccus stops at the first mistake.

This module imports the standard library and PyYAML only.
"""

from robot_rl.config.loading import decode, load, parse_overrides, read_yaml
from robot_rl.config.output import KeyInfo, config_hash, describe, help_text, to_dict, to_yaml
from robot_rl.config.schema import ConfigError, Finding, option

__all__ = [
    "ConfigError",
    "Finding",
    "KeyInfo",
    "config_hash",
    "decode",
    "describe",
    "help_text",
    "load",
    "option",
    "parse_overrides",
    "read_yaml",
    "to_dict",
    "to_yaml",
]
