"""The twelve faults of section 10.3 of the ROS specification: where each is injected, and by what.

Each function injects its fault once, at a random instant of an episode in motion, waits for what must happen, and waits until the
session goes on by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fault_data import bad_weights, broken_transfer, clocks, full_disk, garbage, other_schema, partition
from fault_kit import Bench, Run
from fault_motion import frozen_camera, hang, hang_vlm, kill_guard, kill_others, kill_policy, kill_vlm, sensors


@dataclass(frozen=True)
class Fault:
    """``parts``: kinds of session and what is injected there; runs are dealt out among them in turn."""

    number: int
    what: str
    parts: tuple[tuple[str, Callable[[Bench, int], Run]], ...]


FAULTS: dict[int, Fault] = {
    f.number: f
    for f in (
        Fault(1, "policy_node killed", (("main", kill_policy),)),
        Fault(2, "guard_node killed", (("main", kill_guard),)),
        Fault(
            3, "learner, reward, intervention, monitor, sim, vlm killed in turn", (("main", kill_others), ("camera", kill_vlm))
        ),
        Fault(4, "each node hangs for 3 s", (("main", hang), ("camera", hang_vlm))),
        Fault(5, "frozen camera", (("camera", frozen_camera),)),
        Fault(6, "stale or stopped measured state", (("main", sensors),)),
        Fault(7, "bad weights with a right hash", (("main", bad_weights),)),
        Fault(8, "broken weights file, cut transfers", (("two", broken_transfer),)),
        Fault(9, "full disk", (("main", full_disk),)),
        Fault(10, "partition of 1 to 30 s", (("two", partition),)),
        Fault(11, "peer of another schema", (("main", other_schema),)),
        Fault(12, "clock jumps, garbage", (("main", garbage), ("wall", clocks), ("simtime", clocks))),
    )
}
NEEDS = {9: "disk", 10: "partition"}
