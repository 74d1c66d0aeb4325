"""A whole session outlives faults without a person: a few of the twelve, once each, in slow motion (``benchmarks/ros_faults.py`` runs all)."""

from __future__ import annotations

import pytest

pytest.importorskip("rclpy", reason="pip install 'robot_rl[ros]'")


@pytest.mark.slow
def test_a_session_goes_on_by_itself_and_loses_nothing(tmp_path):
    from fault_data import bad_weights, garbage
    from fault_kit import Bench
    from fault_motion import kill_guard, kill_policy, sensors

    bench = Bench(tmp_path, "main", seed=1, rate=0.2)
    try:
        bench.start()
        for inject in (kill_policy, kill_guard, sensors, bad_weights, garbage):
            run = inject(bench, 0)
            assert not run.person, (run, bench.lines[-60:])
            assert not [p for p in run.problems if "accepted are" not in p], (run, bench.lines[-60:])  # no timing here
        assert bench.lost_episodes() == []
        assert bench.watch.check_limits().wrong == []
    finally:
        bench.close()
