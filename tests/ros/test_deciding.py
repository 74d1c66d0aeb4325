"""When the policy is asked, and how its chunks are joined: by measured latency, with real-time chunking giving way where it is too slow."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from spine_kit import ARM, STATE

from robot_rl.ros import deciding as module
from robot_rl.ros.deciding import Deciding, refusal
from robot_rl.ros.inference import HostGone
from robot_rl.runtime.chunk_scheduler import ChunkScheduler
from robot_rl.runtime.control_loop import ControlLoop
from robot_rl.runtime.safety import SafetyConfig, SafetyFilter
from robot_rl.types import Decision

VALUES = {"n_action_steps": 0, "blend": "auto", "blend_steps": 4, "replan_margin": 1, "swap_at": "episode"}


class Host:
    """Answers at once, with chunks of eight rows that tell their decision; remembers what it was asked."""

    def __init__(self) -> None:
        self.spec = SimpleNamespace(n_action_steps=6, horizon=8)
        self.cannot_continue, self.ready, self.asked, self.swaps, self.gone = "", True, [], 0, False

    def decide(self, request) -> Decision:
        self.asked.append(request)
        if self.gone:
            raise HostGone("the policy server is away")
        chunk = np.full((8, 3), len(self.asked) / 10, np.float32)
        return Decision(request.step, None, chunk, chunk, continues=request.running is not None)

    def take(self) -> bool:
        self.swaps += 1
        return True

    def check_pin(self, version: int) -> None:
        if version > 3:
            raise ValueError("it is not here")


@pytest.fixture
def made():
    values, host, warnings = dict(VALUES), Host(), []
    loop = ControlLoop(ARM, ChunkScheduler(ARM, 1), SafetyFilter(SafetyConfig(), ARM, 20.0))
    deciding = Deciding(host, loop, values, control_s=0.05, grace_s=0.02, warn=lambda key, text: warnings.append(text))
    loop.begin({STATE: np.zeros(4, np.float32)}, key=("test", 0), stamp_ns=1)
    yield SimpleNamespace(values=values, host=host, loop=loop, deciding=deciding, warnings=warnings)
    deciding.close()


def step(made, **more) -> tuple[list[Decision], bool]:
    found = made.deciding.step(**{"asks": True, "swaps": True, "time_left": lambda: 5.0, **more})
    if made.deciding.worker.busy:
        made.deciding.worker._done.wait(5.0)  # the fake host is quick: its answer is there at the next step
    loop = made.loop
    loop.tick(1 + loop.step * 50_000_000)
    loop.observe({STATE: np.zeros(4, np.float32)}, 0.0, False, False, 1 + (loop.step + 1) * 50_000_000)
    return found


def until_asked(made, times: int) -> None:
    while len(made.host.asked) < times:
        step(made)


def test_a_chunk_is_asked_for_as_early_as_answers_take_and_continues_what_runs(made) -> None:
    made.deciding._grace_s = 5.0
    step(made)  # an episode's first chunk is waited for, and has nothing to go on from
    assert made.host.asked[0].running is None
    made.deciding._grace_s = 0.02
    made.deciding.worker.latencies[:] = made.deciding.worker.continuing[:] = [0.10] * 50  # 80 ms beyond the grace: two steps
    until_asked(made, 2)
    second = made.host.asked[1]
    assert second.step == 3, "two rows for the latency, one in reserve, of the six that may run"
    assert second.running.frozen == 2
    np.testing.assert_allclose(second.running.rows, np.full((5, 3), 0.1))  # to the chunk's end, beyond what may run
    (came,), _ = step(made)
    assert came.continues


@pytest.mark.parametrize(
    ("blend", "cannot", "joining"),
    [("auto", "", "rtc"), ("auto", "no sampler", "linear"), ("rtc", "", "rtc"), ("linear", "", "linear"), ("none", "", "none")],
)
def test_how_chunks_are_joined(made, blend: str, cannot: str, joining: str) -> None:
    made.values["blend"], made.host.cannot_continue = blend, cannot
    assert made.deciding.joining == joining
    made.deciding._grace_s = 5.0
    until_asked(made, 2)
    assert (made.host.asked[1].running is not None) == (joining == "rtc")
    assert made.loop.scheduler.blend_steps == (0 if joining == "none" else 4)


def test_where_continuing_takes_longer_than_a_chunk_lasts_chunks_are_joined_linearly_for_a_while(made, monkeypatch) -> None:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    worker = made.deciding.worker
    made.deciding._grace_s = 5.0
    step(made)
    made.deciding._grace_s = 0.02
    worker.latencies[:], worker.continuing[:] = [0.05] * 50, [0.40] * 50  # eight steps, and six rows may run
    until_asked(made, 2)
    assert made.host.asked[1].running is None
    assert made.host.asked[1].step == 4, "asked for by what decisions take that continue nothing"
    assert "take 8 control steps (95 %), and chunks have 6 rows" in made.warnings[0]
    clock.now += module.RTC_AGAIN_S + 1.0
    until_asked(made, 3)
    assert made.host.asked[2].running is not None, "tried again"


def test_a_host_that_is_away_is_named_until_it_decides_again(made) -> None:
    made.host.gone = True
    step(made)
    step(made)
    assert made.deciding.undecided == "the policy server is away"
    assert set(made.warnings) == {"no decision: the policy server is away"}
    made.host.gone = False
    made.deciding._grace_s = 5.0
    step(made)
    step(made)
    assert made.deciding.undecided == ""


def test_parameters_take_effect_with_the_next_chunk_and_nothing_is_asked_while_held(made) -> None:
    made.deciding._grace_s = 5.0
    assert step(made, asks=False) == ([], False)
    assert not made.host.asked
    made.values |= {"n_action_steps": 3, "swap_at": "chunk"}
    decisions, swapped = step(made)
    assert (len(decisions), swapped, made.host.swaps) == (1, True, 1)
    assert made.loop.scheduler.rows_left(made.loop.step) == 2
    assert step(made, swaps=False)[1] is False


def test_values_that_this_policy_cannot_take_are_refused_with_a_reason() -> None:
    host = Host()
    assert refusal(host, {"n_action_steps": 8, "blend": "rtc", "pin_version": 3}) == ""
    assert refusal(host, {"n_action_steps": 9}) == "n_action_steps=9: the policy's chunks have 8 rows"
    assert refusal(host, {"pin_version": 4}) == "pin_version=4: it is not here"
    host.cannot_continue = "no sampler"
    assert refusal(host, {"blend": "rtc"}) == "blend='rtc': no sampler; accepted are auto, linear, none"
    assert refusal(None, {"blend": "rtc"}) == "blend='rtc': policy is none; accepted are auto, linear, none"
    assert refusal(None, {"blend": "auto", "pin_version": 7}) == ""
