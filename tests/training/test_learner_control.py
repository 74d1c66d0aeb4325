"""What the owner of a learner may tell it while it runs, and stores of robots that come and go."""

from __future__ import annotations

from robot_rl.training.learner_control import CONTROL, LearnerControl, read_control


def test_a_word_that_cannot_be_read_changes_nothing(tmp_path):
    assert read_control(tmp_path) == LearnerControl()
    LearnerControl(paused=True, publish_every_s=2.0).write(tmp_path)
    assert read_control(tmp_path) == LearnerControl(paused=True, publish_every_s=2.0)
    (tmp_path / CONTROL).write_text("{")
    assert read_control(tmp_path) == LearnerControl()
