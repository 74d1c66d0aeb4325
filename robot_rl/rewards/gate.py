"""Nobody trains on a reward that nobody has looked at: channels with weight need a report that speaks for them."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

from robot_rl.rewards.composition_config import CompositionConfig

logger = logging.getLogger(__name__)


class UncalibratedReward(ValueError):
    """A source has no report, or its report speaks against it."""


def admit(config: CompositionConfig) -> CompositionConfig:
    """The composition with each channel bound to the model its report is about.

    Raises:
        UncalibratedReward: a channel of weight is no ground truth and has no report, a report of another source, or findings;
            not with ``accept_uncalibrated``, which is logged instead.
    """
    channels, problems = [], []
    for channel in config.channels:
        problem, model_id = "", channel.model_id
        if channel.weight and channel.source not in config.ground_truth:
            problem, found = _read(channel.source, channel.report)
            if found and model_id and found != model_id:
                problem = f"its report is about {found}, the channel names {model_id}"
            model_id = model_id or found
        if problem:
            problems.append(f"{channel.source}: {problem}")
        channels.append(dataclasses.replace(channel, model_id=model_id))
    if problems and not config.accept_uncalibrated:
        raise UncalibratedReward(
            "reward.channels: "
            + "; ".join(problems)
            + ". Accepted are sources with a report that speaks for them (robot-rl reward "
            "report), weight 0, or reward.accept_uncalibrated=true"
        )
    for problem in problems:
        logger.warning("uncalibrated reward accepted: %s", problem)
    return dataclasses.replace(config, channels=tuple(channels))


def _read(source: str, report: str) -> tuple[str, str]:
    """(what is wrong, the model the report is about)."""
    if not report:
        return "it has no report", ""
    path = Path(report).expanduser()
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        findings, about, model_id = list(data["findings"]), data["source"], str(data["model_id"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"report={report!r} cannot be read ({type(error).__name__})", ""
    if about != source:
        return f"report={report!r} is about {about!r}", ""
    return "; ".join(findings), model_id
