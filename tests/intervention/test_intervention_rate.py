"""How much a person drove lately."""

from robot_rl.intervention.metrics import Driven, intervention_rate, newest


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
