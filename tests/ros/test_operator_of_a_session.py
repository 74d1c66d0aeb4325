"""What the policy's session makes of devices that say nothing."""

from __future__ import annotations

import pytest

pytest.importorskip("rclpy", reason="pip install 'robot_rl[ros]'")

from robot_rl.ros.operator_input import OperatorInput
from robot_rl.wire import OperatorState


def test_a_device_that_nothing_was_heard_of_has_not_let_go():
    """An intervention node that has just been started again says "not engaged" before its gamepad is heard: no news, or a button that is still
    held down since before would count as a new press a moment later."""
    heard_of, offered = OperatorInput(None, None, None, None), []
    heard_of._offer = lambda state, stamp_ns, running: offered.append(state)
    unheard, heard = (OperatorState("joy", "ann", 1, False, False, False, age_ms=age) for age in (-1.0, 20.0))
    heard_of.on_states([unheard], 1, running=False)
    assert offered == []
    heard_of.on_states([unheard, heard], 2, running=False)
    assert offered == [heard]
