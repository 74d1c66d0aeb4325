"""Finding the format, checking options, and moving episodes between recordings and stores."""

from __future__ import annotations

import json

import pytest

from robot_rl.replay import exporters, importers
from robot_rl.replay.exporters import export, export_from
from robot_rl.replay.importers import FormatError, detect, import_into, open_dataset, parse_option_strings
from robot_rl.types import Episode


class Shelf:
    """The part of an episode store that imports and exports use."""

    def __init__(self) -> None:
        self.episodes: dict[str, Episode] = {}

    def add(self, episode: Episode) -> str:
        self.episodes[episode.meta.episode_id] = episode
        return episode.meta.episode_id

    def __contains__(self, episode_id: object) -> bool:
        return episode_id in self.episodes

    def episode_ids(self) -> list[str]:
        return list(self.episodes)

    def read(self, episode_id: str) -> Episode:
        return self.episodes[episode_id]


def test_store_to_dataset_to_store(tmp_path, make_episode, assert_same):
    shelf, back = Shelf(), Shelf()
    for i in range(3):
        shelf.add(make_episode(i, success=i != 2))
    seen = []
    report = export_from(
        shelf, tmp_path / "out", episode_ids=["made-2", "made-0"], progress=lambda done, n: seen.append((done, n))
    )
    assert report.episode_ids == ("made-2", "made-0")
    assert seen == [(1, 2), (2, 2)]
    imported = import_into(back, tmp_path / "out", progress=lambda done, n: seen.append((done, n)))
    assert imported.format == "lerobot_v3"
    assert imported.episode_ids == ("made-2", "made-0")
    assert (imported.steps, imported.successes, imported.unknown_outcomes) == (24, 1, 0)
    assert seen[2:] == [(1, 2), (2, 2)]
    assert json.loads(json.dumps(imported.to_json()))["described"]["action"]["names"] == ["a0", "a1", "a2"]
    for name in ("made-2", "made-0"):
        assert_same(shelf.read(name), back.read(name))
    with pytest.raises(ValueError, match="does not have made-7"):
        export_from(shelf, tmp_path / "again", episode_ids=["made-7"])


def test_an_interrupted_import_goes_on(tmp_path, make_episode):
    export([make_episode(i) for i in range(3)], tmp_path / "out")
    shelf = Shelf()
    with pytest.raises(KeyboardInterrupt):
        import_into(shelf, tmp_path / "out", progress=lambda done, n: (_ for _ in ()).throw(KeyboardInterrupt))
    assert shelf.episode_ids() == ["made-0"]
    report = import_into(shelf, tmp_path / "out", skip_existing=True)
    assert (report.episode_ids, report.skipped) == (("made-1", "made-2"), ("made-0",))
    # a second way out and in keeps the memory of the first
    export_from(shelf, tmp_path / "again", "lerobot_v21")
    *_, last = open_dataset(tmp_path / "again").episodes()
    assert last.meta.extra["imported"]["before"] == {"format": "lerobot_v3", "dataset": "out", "episode_index": 2}


def test_a_folder_of_no_known_format_is_described(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        detect(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(FormatError, match=r"a folder with \[notes\.txt\].*Accepted are lerobot_v3: .*robomimic"):
        detect(tmp_path)
    with pytest.raises(FormatError, match=r"a file of 5 bytes ending in '\.txt'"):
        detect(tmp_path / "notes.txt")
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "info.json").write_text('{"codebase_version": "v1.6"}')
    with pytest.raises(FormatError, match=r"codebase_version 'v1\.6'"):
        detect(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"video": True}, "unknown option video=True; accepted are episodes, task"),
        ({"stratum": "offline"}, "stratum='offline': accepted are online, demonstration, intervention, prior"),
        ({"source": "robot"}, "source='robot': accepted are policy, human"),
        ({"episodes": []}, "non-empty list"),
        ({"episodes": [-1]}, "episode numbers >= 0"),
        ({"image_size": [96]}, "two integers"),
        ({"videos": "no"}, "videos='no': accepted is true or false"),
        ({"action_low": 0.0}, "given together"),
        ({"action_low": [0, 0], "action_high": 1}, "3 of them, one per action dimension"),
    ],
)
def test_wrong_options_are_refused_with_what_is_accepted(tmp_path, make_episode, options, message):
    export([make_episode(0)], tmp_path / "out")
    with pytest.raises(ValueError, match=message):
        open_dataset(tmp_path / "out", **options).describe()


def test_options_apply_to_every_format(tmp_path, make_episode):
    export([make_episode(0), make_episode(1)], tmp_path / "a b", "lerobot_v21")
    (tmp_path / "a b" / "meta" / "robot_rl" / "episodes.jsonl").unlink()
    options = parse_option_strings(["episodes=1", "task=do it", "stratum=prior", "action_low=[-9,-9,-9]", "action_high=9"])
    importer = open_dataset(tmp_path / "a b", format="lerobot", **options)
    assert importer.describe().action.low == (-9.0,) * 3
    assert importer.describe().extra["action_limits"] == "given"
    (episode,) = importer.episodes()
    assert (episode.meta.episode_id, episode.meta.task, episode.meta.stratum.value) == ("a-b-000001", "do it", "prior")
    with pytest.raises(ValueError, match="accepted is name=value"):
        parse_option_strings(["videos"])


def test_format_tables():
    assert set(exporters.formats()) < set(importers.formats())
    with pytest.raises(ValueError, match="format='csv': accepted are auto, lerobot_v3"):
        open_dataset("anything", format="csv")
    with pytest.raises(ValueError, match="format='csv': accepted are lerobot_v3, lerobot_v21, robomimic"):
        export([], "anything", format="csv")
