"""What every importer has in common: the description of a recording, its options, and the table of known formats.

An importer is a description (:class:`ImportSource`) and an iterator of :class:`robot_rl.types.Episode`. It never touches a
store; :mod:`robot_rl.replay.importers.transfer` moves episodes from one to the other.

Options are dataclasses, one per format, derived from :class:`CommonOptions`; an unknown name or a wrong value is refused
before a single file is read.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from robot_rl.types import ActionSpec, FeatureSpec, Source, Stratum

SOURCES = tuple(s.name.lower() for s in Source)
STRATA = tuple(s.value for s in Stratum)


@dataclass(frozen=True)
class ImportSource:
    """What a recording says about itself before any episode is read.

    Attributes:
        observation_features: feature name to its spec, exactly what every imported episode will hold.
        action: every dimension of the recorded action. ``extra["action_limits"]`` says where the limits come from, because
            most formats do not store the limits of the robot.
        n_episodes: how many episodes :meth:`Importer.episodes` will yield.
        task: the instruction when all episodes share one, else empty (each episode has its own in ``meta.task``).
        format: the name in the table of formats.
        extra: JSON values: control rate, missing episodes, features left out, and whatever else the format knows.
    """

    observation_features: Mapping[str, FeatureSpec]
    action: ActionSpec
    n_episodes: int
    task: str
    format: str
    extra: dict[str, Any] = field(default_factory=dict)


@runtime_checkable
class Importer(Protocol):
    """One opened recording."""

    def describe(self) -> ImportSource:
        """Cheap: reads metadata, never a video."""
        ...

    def episodes(self) -> Iterator[Any]:
        """Yields :class:`robot_rl.types.Episode`, in the recording's order, one in memory at a time."""
        ...


class FormatError(ValueError):
    """A recording is not what its format says it should be. The message names the file and what was expected."""


@dataclass(frozen=True)
class CommonOptions:
    """Options of every format.

    Attributes:
        episodes: import only these episode numbers of the recording; ``None`` is all that are present.
        task: instruction to store; ``None`` keeps what the recording says.
        stratum: where the data belongs in the replay buffer.
        source: who was in control when the recording does not say.
        assume_success: an episode whose recording knows neither reward nor success is taken as a success at its last step
            (reward 0 and then 1, ``terminated``). ``False`` leaves its reward unknown (NaN) and ends it ``truncated``.
        action_low, action_high: limits that the robot accepts, one number for all dimensions or one per dimension; ``None``
            uses what the format knows (``describe().extra["action_limits"]`` says what that is).
        id_prefix: first part of every episode id; ``None`` takes the name of the file or folder.
    """

    episodes: Sequence[int] | None = None
    task: str | None = None
    stratum: str = Stratum.DEMONSTRATION.value
    source: str = "human"
    assume_success: bool = False
    action_low: float | Sequence[float] | None = None
    action_high: float | Sequence[float] | None = None
    id_prefix: str | None = None

    def __post_init__(self) -> None:
        check_choice("stratum", self.stratum, STRATA)
        check_choice("source", self.source, SOURCES)
        check_type("assume_success", self.assume_success, bool, "true or false")
        for name in ("task", "id_prefix"):
            if getattr(self, name) is not None:
                check_type(name, getattr(self, name), str, "a string")
        if self.episodes is not None:
            wanted = (self.episodes,) if isinstance(self.episodes, int) else self.episodes
            if (
                isinstance(wanted, str)
                or not all(isinstance(e, (int, np.integer)) and e >= 0 for e in wanted)
                or not len(wanted)
            ):
                raise ValueError(f"episodes={self.episodes!r}: accepted is a non-empty list of episode numbers >= 0")
            object.__setattr__(self, "episodes", tuple(int(e) for e in wanted))
        if (self.action_low is None) != (self.action_high is None):
            raise ValueError("action_low and action_high are given together or not at all")

    @property
    def source_code(self) -> int:
        return int(Source[self.source.upper()])

    def select(self, present: Sequence[int], path: Path) -> list[int]:
        """The wanted ones of the ``present`` episode numbers, in the recording's order.

        Raises:
            ValueError: an episode was asked for that is not there.
        """
        if self.episodes is None:
            return list(present)
        absent = sorted(set(self.episodes) - set(present))
        if absent:
            raise ValueError(f"episodes={list(self.episodes)}: {path} does not have {absent}; present are {shorten(present)}")
        wanted = set(self.episodes)
        return [e for e in present if e in wanted]


def check_choice(name: str, value: Any, accepted: Sequence[Any]) -> None:
    if value not in accepted:
        raise ValueError(f"{name}={value!r}: accepted are {', '.join(map(str, accepted))}")


def check_type(name: str, value: Any, kind: type, accepted: str) -> None:
    if not isinstance(value, kind):
        raise ValueError(f"{name}={value!r}: accepted is {accepted}")


def check_string_list(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        value = (value,)
    if not isinstance(value, Sequence) or not value or not all(isinstance(v, str) and v for v in value):
        raise ValueError(f"{name}={value!r}: accepted is a non-empty list of names")
    return tuple(value)


def shorten(values: Sequence[Any], limit: int = 12) -> str:
    """A list for a message: all of it when short, else its first entries and how many more there are."""
    head = ", ".join(map(str, values[:limit]))
    return f"[{head}]" if len(values) <= limit else f"[{head}, ... {len(values) - limit} more]"


def action_spec(
    recorded_low: np.ndarray,
    recorded_high: np.ndarray,
    options: CommonOptions,
    names: Sequence[str] = (),
    known: tuple[float, float] | None = None,
) -> tuple[ActionSpec, str]:
    """Limits of the action and where they come from: the options, what the format knows, or the recorded range.

    A dimension that never moved gets a margin of 1e-3 to each side, because a spec needs ``low < high``.
    """
    low, high = np.asarray(recorded_low, np.float64).ravel(), np.asarray(recorded_high, np.float64).ravel()
    origin = "recorded range"
    if options.action_low is not None and options.action_high is not None:
        try:
            low = np.broadcast_to(np.asarray(options.action_low, np.float64), low.shape)
            high = np.broadcast_to(np.asarray(options.action_high, np.float64), high.shape)
        except ValueError:
            raise ValueError(
                f"action_low={options.action_low!r}, action_high={options.action_high!r}: accepted are one number or "
                f"{len(low)} of them, one per action dimension"
            ) from None
        origin = "given"
    elif known is not None:
        low, high = np.full(low.shape, known[0]), np.full(high.shape, known[1])
        origin = "format"
    else:
        still = ~(low < high)
        low, high = np.where(still, low - 1e-3, low), np.where(still, high + 1e-3, high)
    return ActionSpec(low=tuple(low), high=tuple(high), names=tuple(names)), origin


def unknown_outcome(length: int, options: CommonOptions) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool | None]:
    """(reward, terminated, truncated, success) of an episode whose recording knows nothing about its outcome."""
    terminated, truncated = np.zeros(length, bool), np.zeros(length, bool)
    if options.assume_success:
        reward = np.zeros(length, np.float32)
        reward[-1], terminated[-1] = 1.0, True
        return reward, terminated, truncated, True
    truncated[-1] = True
    return np.full(length, np.nan, np.float32), terminated, truncated, None


def episode_id(prefix: str, index: int) -> str:
    """``<prefix>-000012``, with what cannot be part of a file name on every system replaced by ``-``."""
    safe = re.sub(r"[^A-Za-z0-9_.\-]+", "-", prefix).lstrip("-.") or "episode"
    return f"{safe[:100]}-{index:06d}"


def provenance(format: str, dataset: str, index: int, before: Any = None) -> dict[str, Any]:
    """``meta.extra["imported"]``: which episode of which recording this is; ``before`` is what it was before it got there."""
    here = {"format": format, "dataset": dataset, "episode_index": index}
    return here if before is None else {**here, "before": before}


@dataclass(frozen=True)
class FormatEntry:
    """One row of the table of formats: where its code lies (imported when needed) and how to say what it is."""

    name: str
    module: str
    summary: str


_FORMATS: dict[str, FormatEntry] = {}


def register_format(name: str, module: str, summary: str) -> None:
    """Make a format known. ``module`` has ``Options`` (a :class:`CommonOptions`), ``sniff(path)`` and
    ``open_source(path, options)``.

    ``sniff`` returns true when ``path`` looks like this format, from names and headers only.
    """
    _FORMATS[name] = FormatEntry(name, module, summary)


register_format("lerobot_v3", "robot_rl.replay.importers.lerobot_v3", "LeRobot dataset v3 (meta/info.json, v3.x)")
register_format("lerobot_v21", "robot_rl.replay.importers.lerobot_v21", "LeRobot dataset v2.0 or v2.1 (meta/info.json, v2.x)")
register_format("lerobot", "robot_rl.replay.importers.lerobot", "LeRobot dataset of either version")
register_format("robomimic", "robot_rl.replay.importers.robomimic", "robomimic HDF5 (.hdf5 with data/demo_*)")
register_format(
    "diffusion_policy",
    "robot_rl.replay.importers.diffusion_policy",
    "diffusion_policy ReplayBuffer zarr (folder or .zip with data/ and meta/episode_ends)",
)
register_format(
    "adroit_door",
    "robot_rl.replay.importers.adroit",
    "Adroit door demonstrations (demos.npz with observations, actions, episode_ends, init_*)",
)
register_format("rlds", "robot_rl.replay.importers.rlds", "RLDS dataset (features.json and *.tfrecord-*)")
register_format("minari", "robot_rl.replay.importers.minari", "Minari dataset (data/main_data.hdf5 and data/metadata.json)")
register_format(
    "mcap",
    "robot_rl.replay.importers.mcap",
    "MCAP or rosbag2 folder with one (ROS 2 messages; needs robot=, unless exported here)",
)


def formats() -> dict[str, str]:
    """Name to one-line summary of every format that can be imported."""
    return {e.name: e.summary for e in _FORMATS.values()}


def _format_module(name: str) -> Any:
    if name not in _FORMATS:
        raise ValueError(f"format={name!r}: accepted are auto, {', '.join(_FORMATS)}")
    return importlib.import_module(_FORMATS[name].module)


def detect(path: str | Path) -> str:
    """Name of the format of what lies at ``path``.

    Raises:
        FileNotFoundError: nothing is there.
        FormatError: something is there and no format claims it; says what was found and what would be accepted.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    for name in _FORMATS:
        if _format_module(name).sniff(path):
            return name
    if path.is_dir():
        entries = sorted(p.name + ("/" if p.is_dir() else "") for p in path.iterdir())
        found = f"a folder with {shorten(entries)}" if entries else "an empty folder"
    else:
        found = f"a file of {path.stat().st_size} bytes ending in {path.suffix or 'nothing'!r}"
    info = path / "meta" / "info.json"
    if info.is_file():
        try:
            found += f", codebase_version {json.loads(info.read_text()).get('codebase_version')!r}"
        except (ValueError, AttributeError):
            found += ", whose meta/info.json is not readable JSON"
    accepted = "; ".join(f"{e.name}: {e.summary}" for e in _FORMATS.values())
    raise FormatError(f"{path} is {found}; no known format. Accepted are {accepted}")


def make_options(format: str, options: Mapping[str, Any]) -> CommonOptions:
    """The typed options of ``format``.

    Raises:
        ValueError: an unknown option (the accepted ones are named) or a wrong value.
    """
    cls = _format_module(format).Options
    accepted = [f.name for f in dataclasses.fields(cls)]
    unknown = sorted(set(options) - set(accepted))
    if unknown:
        given = ", ".join(f"{k}={options[k]!r}" for k in unknown)
        raise ValueError(f"{format} importer: unknown option {given}; accepted are {', '.join(accepted)}")
    return cls(**options)


def parse_option_strings(pairs: Sequence[str]) -> dict[str, Any]:
    """``["videos=false", "episodes=[1,2]", "task=open it"]`` to values: JSON where it parses, else the text itself.

    Raises:
        ValueError: an entry has no ``=``.
    """
    values: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise ValueError(f"option {pair!r}: accepted is name=value")
        try:
            values[name] = json.loads(text)
        except ValueError:
            values[name] = text
    return values


def open_dataset(path: str | Path, format: str = "auto", **options: Any) -> Importer:
    """Open a recording of any known format.

    Raises:
        FileNotFoundError: nothing at ``path``.
        FormatError: the recording is damaged or of no known format.
        ValueError: unknown format or option, or a wrong value; says what would be accepted.
    """
    path = Path(path)
    name = detect(path) if format == "auto" else format
    module = _format_module(name)
    checked = make_options(name, options)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    return module.open_source(path, checked)
