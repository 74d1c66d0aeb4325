"""Inference in a process of its own: the same bits as in this one, and a robot that holds and goes on when that process dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from robot_rl.ros.frames import pack, unpack
from robot_rl.ros.hosting import HostConfig, PolicyHost
from robot_rl.ros.inference import HostGone, InferenceWorker
from robot_rl.ros.process_host import ProcessHost
from robot_rl.runtime.chunk_scheduler import RunningChunk

PATIENCE_S = 120.0


def until(condition, look=lambda: None):
    end = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert time.monotonic() < end
        look()
        time.sleep(0.01)
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    from policy_kit import publish, write_run

    folder = write_run(tmp_path_factory.mktemp("run"))
    publish(folder, seed=1)
    return folder


def config(run: Path, **more) -> HostConfig:
    return HostConfig(
        **{"policy": str(run), "head": str(run), "run_dir": str(run), "device": "cpu", "warmup_forwards": 1, **more}
    )


def request(host, index: int):
    from robot_rl.runtime.acting import DecisionRequest

    draw = np.random.default_rng(index)
    n = host.spec.n_obs_steps
    observation = {k: draw.normal(size=(n, *f.shape)).astype(f.dtype) for k, f in host.features.items()}
    return DecisionRequest(observation, ("robot", 3, "episode"), index, 7 * index)


def gone(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_messages_arrive_to_the_last_bit():
    arrays = {"a": np.array([[np.nan, -0.0], [1e-310, np.inf]]), "b": np.zeros((0, 3), np.float32), "c": np.uint8(7) * np.ones((2, 2, 3), np.uint8)}  # fmt: skip
    arrays["view"] = np.arange(12, dtype=np.int64).reshape(3, 4)[:, ::2]
    head, read = unpack(pack({"x": 0.1 + 0.2, "nan": float("nan"), "text": "ä"}, arrays))
    assert head["x"] == 0.1 + 0.2
    assert np.isnan(head["nan"])
    assert head["text"] == "ä"
    for name, value in arrays.items():
        assert read[name].dtype == value.dtype
        assert read[name].shape == value.shape
        assert read[name].tobytes() == value.tobytes()


def test_decisions_are_those_of_a_thread_and_a_killed_process_comes_back(run):
    from policy_kit import publish

    here, said = PolicyHost(config(run), print), []
    here.load()
    there = ProcessHost(config(run), said.append, timeout_s=PATIENCE_S)
    try:
        there.load()
        assert there.spec == here.spec
        assert there.cannot_continue == here.cannot_continue == ""
        assert (there.acting.version, there.acting.mode) == (here.acting.version, here.acting.mode) == (1, "explore")

        def same(index: int) -> None:
            rows = np.full((3, here.action.dim), 0.1 * index, np.float32)
            running = RunningChunk(rows, rows, 1) if index % 2 else None
            mine, theirs = (h.decide(replace(request(h, index), running=running)) for h in (here, there))
            for name in ("noise", "chunk_base", "chunk"):
                assert getattr(mine, name).tobytes() == getattr(theirs, name).tobytes(), name
                assert getattr(mine, name).dtype == getattr(theirs, name).dtype
            for name in ("step", "candidate_index", "weights_version", "explored", "continues"):
                assert getattr(mine, name) == getattr(theirs, name), name
            np.testing.assert_equal(mine.log_prob, theirs.log_prob)

        same(0)
        for explore, base in ((True, True), (False, False), (True, False)):  # as services and parameters change it
            for host in (here, there):
                host.set_explore(explore)
                host.use_base = base
            same(1)

        # A new version: verified there, taken when the control side says so, and then it acts.
        here.start_watching()
        publish(run, seed=2)
        for host in (here, there):
            until(lambda host=host: host.has(2) and host.offered is not None)
        publish(run, seed=3, torn=True)
        for host in (here, there):
            until(lambda host=host: host.refused == 1)
            assert "version 3" in host.last_error
            assert host.take()
            assert not host.take()
            assert (host.acting.version, host.swaps) == (2, 1)
        same(2)
        assert there.decide(request(there, 2)).weights_version == 2

        # Pinned: that one alone acts, also one that was dropped from memory or has never been there, and a newer one waits.
        for host in (here, there):
            host.pin(1)
            assert host.take()
        same(4)
        publish(run, seed=4)
        for host in (here, there):
            until(lambda host=host: host.has(4) and host.offered is not None)
            assert not host.take()
            assert host.acting.version == 1
            with pytest.raises(ValueError, match="version 9 is not ready here"):
                host.pin(9)
            host.pin(2)
            assert host.take()
        same(5)

        # kill -9 while a decision is asked for, and while none is: said so, and the next child acts with the same version.
        worker = InferenceWorker(there.decide)
        for busy in (True, False):
            victim, before = there.pid, there.restarts
            if busy:
                os.kill(victim, signal.SIGSTOP)  # so that it is in the middle of one for sure
                worker.submit(request(there, 3))
            os.kill(victim, signal.SIGKILL)
            if busy:
                with pytest.raises(HostGone):
                    until(lambda: worker.poll(0.01) or False)
                assert not worker.busy
            until(lambda before=before: there.ready and there.restarts == before + 1, there.look)
            assert there.acting.version == 2
            assert there.pid != victim
            same(4)

        # One that hangs is noticed, killed and followed by another one.
        os.kill(there.pid, signal.SIGSTOP)
        worker.latencies[:] = [0.01] * 20
        worker.submit(request(there, 5))
        assert until(worker.hung) > 1.0
        there.kill("it hangs")
        with pytest.raises(HostGone):
            until(lambda: worker.poll(0.01) or False)
        assert not worker.latencies, "the next one starts cold: its first decision is given the time of a first one"
        until(lambda: there.ready, there.look)
        same(6)
        worker.close()
    finally:
        last = there.pid
        there.close()
        here.close()
    assert until(lambda: gone(last))
    with pytest.raises(HostGone):
        there.decide(request(here, 0))


def test_what_cannot_be_loaded_is_refused_with_the_reason(tmp_path):
    host = ProcessHost(config(tmp_path), print, timeout_s=PATIENCE_S)
    with pytest.raises(ValueError, match=r"holds no policy: policy.json is missing"):
        host.load()
    assert host.pid is None


def test_the_child_dies_with_its_parent(run):
    """kill -9 of the parent leaves nobody behind, though nothing of the parent's code runs any more."""
    code = f"""
import sys, time
from robot_rl.ros.hosting import HostConfig
from robot_rl.ros.process_host import ProcessHost
host = ProcessHost(HostConfig(policy={str(run)!r}, device="cpu", warmup_forwards=1), print, timeout_s={PATIENCE_S})
host.load()
print("child", host.pid, flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline().split()[1])
        assert not gone(child)
        parent.kill()
    until(lambda: gone(child))
