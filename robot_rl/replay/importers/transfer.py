"""What ``robot-rl import`` runs: from a recording into an episode store, with a report of what came and what did not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from robot_rl.replay.importers.base import detect, open_dataset
from robot_rl.types import Episode


class EpisodeSink(Protocol):
    """The part of an episode store that an import needs."""

    def add(self, episode: Episode) -> Any: ...


@dataclass(frozen=True)
class ImportReport:
    """What an import did. ``missing`` maps episode numbers that the recording lists to why they could not be imported;
    ``skipped`` are episodes that the store had already."""

    path: str
    format: str
    episode_ids: tuple[str, ...]
    steps: int
    successes: int
    unknown_outcomes: int
    missing: dict[str, str]
    left_out: tuple[str, ...]
    skipped: tuple[str, ...] = ()
    described: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{len(self.episode_ids)} episodes, {self.steps} steps from {self.path} ({self.format}); "
            f"{self.successes} successes, {self.unknown_outcomes} with unknown outcome"
        ]
        if self.missing:
            lines.append(f"{len(self.missing)} episodes are listed and not there (first: {next(iter(self.missing.items()))})")
        if self.skipped:
            lines.append(f"{len(self.skipped)} episodes were in the store already and were left as they are")
        if self.left_out:
            lines.append(f"left out: {', '.join(self.left_out)}")
        return "\n".join(lines)


def import_into(
    store: EpisodeSink,
    path: str | Path,
    format: str = "auto",
    *,
    skip_existing: bool = False,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> ImportReport:
    """Read every wanted episode of a recording and add it to ``store``; one episode is in memory at a time.

    Args:
        store: anything with ``add(episode)``.
        path: file or folder of the recording.
        format: a name of :func:`robot_rl.replay.importers.base.formats`, or ``auto``.
        skip_existing: leave episodes alone whose id is in the store, so that an interrupted import can go on (the store then
            needs ``in``). ``False`` lets the store refuse them; another ``id_prefix`` gives them ids of their own.
        progress: called with (episodes done, episodes in all).
        options: see the ``Options`` of the format.

    Raises:
        FileNotFoundError, FormatError, ValueError: as :func:`open_dataset`; episodes added before a damaged one stay.
    """
    name = detect(path) if format == "auto" else format
    importer = open_dataset(path, name, **options)
    source = importer.describe()
    ids: list[str] = []
    skipped: list[str] = []
    steps = successes = unknown = 0
    for episode in importer.episodes():
        if skip_existing and episode.meta.episode_id in store:  # type: ignore[operator]
            skipped.append(episode.meta.episode_id)
            continue
        store.add(episode)
        ids.append(episode.meta.episode_id)
        steps += len(episode)
        successes += episode.meta.success is True
        unknown += episode.meta.success is None
        if progress is not None:
            progress(len(ids) + len(skipped), source.n_episodes)
    extra = source.extra
    left_out = [f"{k} ({v})" for k, v in extra.get("features_left_out", {}).items()]
    left_out += [*extra.get("observations_left_out", ()), *extra.get("arrays_left_out", ())]
    described = {
        "observation_features": {k: v.to_json() for k, v in source.observation_features.items()},
        "action": source.action.to_json(),
        "task": source.task,
        "extra": extra,
    }
    return ImportReport(
        path=str(path),
        format=source.format,
        episode_ids=tuple(ids),
        steps=steps,
        successes=successes,
        unknown_outcomes=unknown,
        missing=extra.get("episodes_missing", {}),
        left_out=tuple(left_out),
        skipped=tuple(skipped),
        described=described,
    )
