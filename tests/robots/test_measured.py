import math

import numpy as np

from robot_rl.robots.measured import MeasuredJoints


def test_a_joint_belongs_to_the_first_topic_that_says_it():
    joints = MeasuredJoints({"a", "b"})
    joints.update({"a": 1.0, "b": 1.0}, 10, rank=1)
    assert np.array_equal(joints.vector(("b", "a"), 10), [1.0, 1.0])
    joints.update({"a": 2.0}, 20, rank=0)
    joints.update({"a": 3.0, "b": 3.0}, 30, rank=1)
    assert joints.position("a") == 2.0
    assert joints.position("b") == 3.0
    assert joints.vector(("a", "b"), 25) is None, "a was measured before"
    assert np.array_equal(joints.vector(("a", "b"), 20), [2.0, 3.0])


def test_what_is_no_measurement_or_no_joint_of_ours_is_not_kept():
    joints = MeasuredJoints({"a"})
    joints.update({"a": math.nan, "stranger": 1.0}, 10)
    assert joints.vector(("a",), 0) is None
    joints.update({"a": 0.5}, 20)
    joints.update({"a": math.inf}, 30)
    assert joints.position("a") == 0.5
    joints.forget()
    assert joints.vector(("a",), 0) is None
    joints.update({"a": 0.7}, 40, rank=1)
    assert joints.vector(("a",), 0) is None, "who owns a joint is not forgotten"
