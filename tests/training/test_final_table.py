"""The final table of an interrupted run: the half that was played is kept, and the whole is that of a run never interrupted."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_kit import same_run, tiny

from robot_rl.training import final, posttrain
from robot_rl.training.interrupt import Interrupted

QUICK = {"schedule": {"env_steps": 60}, "evaluation": {"reference_episodes": 4, "curve_episodes": 2, "final_episodes": 6}}


def test_an_interrupted_final_table_goes_on_with_its_second_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    posttrain.run(tiny(tmp_path / "straight", **QUICK))
    measure, played = final.measure, []

    def second_half_is_cut(rollout, policy, seeds, **options):
        played.append((policy.mode, policy.version))
        if len(played) == 2:
            raise Interrupted
        return measure(rollout, policy, seeds, **options)

    monkeypatch.setattr(final, "measure", second_half_is_cut)
    with pytest.raises(Interrupted):
        posttrain.run(tiny(tmp_path / "resumed", **QUICK))
    assert not (tmp_path / "resumed" / "result.json").exists()
    posttrain.run(tiny(tmp_path / "resumed", **QUICK))
    assert len(played) == 3, "base, the half that was cut, and that half again"
    assert played[1] == played[2]
    same_run(tmp_path / "straight", tmp_path / "resumed")
    assert not list((tmp_path / "resumed").glob("final_*"))


def test_what_is_kept_belongs_to_one_policy_and_its_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that goes on after its table was cut short has another policy at its end: that one is played."""
    measure, played = final.measure, []

    def counted(rollout, policy, seeds, **options):
        played.append(len(seeds))
        return measure(rollout, policy, seeds, **options)

    def filmed(*_: object) -> None:
        raise Interrupted

    monkeypatch.setattr(final, "measure", counted)
    with monkeypatch.context() as patch:
        patch.setattr(final, "film", filmed)
        with pytest.raises(Interrupted):
            posttrain.run(tiny(tmp_path / "run", **QUICK))
    assert played == [6, 6]
    assert len(list((tmp_path / "run").glob("final_*"))) == 2
    more = QUICK | {"evaluation": {"reference_episodes": 4, "curve_episodes": 2, "final_episodes": 8}}
    posttrain.run(tiny(tmp_path / "run", **more))
    assert played == [6, 6, 8, 8]
