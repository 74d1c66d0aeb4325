"""How much a person drove lately, and what they did in a whole store."""

from pathlib import Path

import numpy as np
import pytest

from robot_rl.intervention.metrics import Driven, intervention_rate, newest, of_store
from robot_rl.replay.store import EpisodeStore
from robot_rl.types import ActionSpec, Episode, EpisodeMeta, FeatureSpec, Source, Stratum


def test_the_newest_episodes_are_as_few_as_fill_the_window():
    played = [Driven(30, 30), Driven(40, 0), Driven(20, 5), Driven(50, 10)]
    assert newest(played, 50) == [Driven(50, 10)]
    assert newest(played, 51) == [Driven(20, 5), Driven(50, 10)]
    assert newest(played, 1000) == played
    assert newest([], 10) == []


def test_a_rate_needs_a_full_window():
    played = [Driven(30, 30), Driven(40, 0), Driven(20, 5)]
    assert intervention_rate(played, 60) == 5 / 60
    assert intervention_rate(played, 90) == 35 / 90
    assert intervention_rate(played, 91) is None
    assert intervention_rate([], 1) is None


def test_a_store_says_what_people_did(tmp_path: Path):
    """Two episodes that a person took over in (one twice, at once again), one without, and a demonstration, which is no help."""
    action = ActionSpec((-1.0,), (1.0,))
    driven = {
        "a": ([(2, 4, 0)], True, Stratum.ONLINE),
        "b": ([(5, 6, 0), (7, 10, 1)], False, Stratum.ONLINE),
        "c": ([], True, Stratum.ONLINE),
        "demo": ([(0, 10, 0)], True, Stratum.DEMONSTRATION),
    }
    with EpisodeStore.create(tmp_path, observation_features={"s": FeatureSpec((1,))}, action=action, sync=False) as store:
        for name, (spans, success, stratum) in driven.items():
            source, ids = np.full(10, int(Source.POLICY), np.uint8), np.full(10, -1, np.int32)
            for begin, end, number in spans:
                source[begin:end], ids[begin:end] = int(Source.HUMAN), number
            meta = EpisodeMeta(name, success=success, stratum=stratum, control_hz=10.0)
            arrays = {"s": np.zeros((11, 1), np.float32)}, np.zeros((10, 1), np.float32)
            store.add(Episode.from_arrays(meta, *arrays, source=source, intervention_id=ids))
    found = of_store(tmp_path, window=20)
    assert (found["episodes"], found["steps"]) == (3, 30)
    assert found["share"]["human"] == 6 / 30
    assert found["takeovers"] == {"count": 3, "mean_length": 2.0, "median_first_step": 3.5, "retaken": 1}
    assert found["success"] == {"helped": {"successes": 1, "n": 2}, "alone": {"successes": 1, "n": 1}}
    assert found["curve"] == [6 / 20, 0.0]
    with pytest.raises(ValueError, match="window=0"):
        of_store(tmp_path, window=0)
