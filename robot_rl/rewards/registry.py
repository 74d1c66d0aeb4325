"""Reward sources by configured name: ``configs/rewards/<name>.yaml`` says which kind it is and what it is told.

Kinds that ship register below; other packages register a factory under the entry point group ``robot_rl.rewards``.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import yaml

from robot_rl import paths
from robot_rl.rewards.source import RewardSource

GROUP = "robot_rl.rewards"
_NAME = re.compile(r"[a-z0-9_.]{1,48}")
Factory = Callable[..., RewardSource]

_KINDS: dict[str, str | Factory] = {
    "environment": "robot_rl.rewards.environment:EnvironmentSource",
    "human": "robot_rl.rewards.human:HumanSource",
    "rule": "robot_rl.rewards.rule:RuleSource",
    "classifier": "robot_rl.rewards.classifier:ClassifierSource",
    "progress": "robot_rl.rewards.progress:ProgressSource",
    "process": "robot_rl.rewards.process:ProcessSource",
    "goal_image": "robot_rl.rewards.goal:GoalImageSource",
    "clip_goal": "robot_rl.rewards.goal:ClipGoalSource",
    "preference": "robot_rl.rewards.preference:PreferenceSource",
    "vlm": "robot_rl.rewards.vlm_progress:VlmProgressSource",
    "video_similarity": "robot_rl.rewards.video_similarity:VideoSimilaritySource",
    "video_likelihood": "robot_rl.rewards.video_likelihood:VideoLikelihoodSource",
    "feedback_model": "robot_rl.rewards.feedback:FeedbackModelSource",
    "transport": "robot_rl.rewards.transport_source:TransportSource",
}


def register_source(kind: str, factory: Factory) -> None:
    """Make a kind known to this process."""
    _KINDS[kind] = factory


def source_kinds() -> list[str]:
    """Every kind that is installed."""
    return sorted({*_KINDS, *(e.name for e in entry_points(group=GROUP))})


def load_source(name: str) -> RewardSource:
    """The source a configuration names: ``configs/rewards/<name>.yaml``, a path, or the bare name of an installed kind.

    Raises:
        FileNotFoundError: no such configuration, and no kind of that name is installed; both lists are in the message.
        ValueError: the configuration is wrong, or its kind is not installed.
    """
    settings = _settings(name)
    kind = settings.pop("kind")
    factory = _factory(kind, name)
    own = settings.setdefault("name", kind)
    if not isinstance(own, str) or not _NAME.fullmatch(own):
        raise ValueError(f"reward source {name!r}: name={own!r}, accepted is [a-z0-9_.]{{1,48}}")
    if dataclasses.is_dataclass(factory):
        known = [f.name for f in dataclasses.fields(factory) if f.init]
        for key in settings:
            if key not in known:
                raise ValueError(f"reward source {name!r}: {key}={settings[key]!r} is unknown; accepted are {', '.join(known)}")
    try:
        source = factory(**settings)
    except TypeError as error:
        raise ValueError(f"reward source {name!r}: {error}") from error
    if not isinstance(source, RewardSource):
        raise ValueError(f"reward source {name!r}: {type(source).__name__} does not implement robot_rl.rewards.RewardSource")
    return source


def _settings(name: str) -> dict[str, Any]:
    path = Path(name).expanduser()
    if not path.is_file():
        folder = paths.share() / "configs" / "rewards"
        path = folder / f"{name}.yaml"
        if not path.is_file():
            if name in source_kinds():
                return {"kind": name}
            shipped = ", ".join(sorted(p.stem for p in folder.glob("*.yaml"))) or "none"
            raise FileNotFoundError(
                f"source={name!r}: no reward source of that name is installed. Configurations are {shipped}; installed kinds "
                f"are {', '.join(source_kinds())}; another package can add kinds under the entry point group {GROUP!r}"
            )
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(data, Mapping) or not isinstance(data.get("kind"), str):
        raise ValueError(f"{path}: accepted is a mapping with `kind`, one of {', '.join(source_kinds())}")
    return dict(data)


def _factory(kind: str, name: str) -> Factory:
    found = _KINDS.get(kind)
    if found is None:
        for point in entry_points(group=GROUP):
            if point.name == kind:
                return point.load()
        raise ValueError(
            f"reward source {name!r}: kind={kind!r} is not installed; installed are {', '.join(source_kinds())}. Another "
            f"package can add it under the entry point group {GROUP!r}"
        )
    if isinstance(found, str):
        module, attribute = found.split(":")
        return getattr(importlib.import_module(module), attribute)
    return found
