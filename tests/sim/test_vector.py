"""Vectors of environments: the same numbers whatever does the work, no finished environment stepped, clear faults."""

from __future__ import annotations

import functools
import os
import signal
from typing import Any

import numpy as np
import pytest
from faulty_env_kit import make_faulty

from robot_rl.sim.env import Environment, make_env
from robot_rl.sim.vector import ProcessVectorEnv, VectorEnv, make_vector

ENV_ID = "tabletop/Lift"
OPTIONS = {"max_episode_steps": 9}


def trace(vector: Any, rounds: int = 14) -> list[Any]:
    """Everything a vector answers while environments end at different times and are reset one by one."""
    rng = np.random.default_rng(0)
    out: list[Any] = []
    spec = vector.spec.action
    seeds = iter(range(100, 200))
    started = vector.reset_many({i: next(seeds) for i in range(vector.num_envs)})
    out.append([(i, o["observation.state"].tobytes(), info) for i, (o, info) in started.items()])
    vector.step({0: np.zeros(5)})  # put environment 0 one step ahead
    for _ in range(rounds):
        for index in np.flatnonzero(~vector.running):
            observation, info = vector.reset(int(index), next(seeds))
            out.append((int(index), observation["observation.state"].tobytes(), info))
        actions = rng.uniform(spec.low, spec.high, (vector.num_envs, spec.dim))
        results = vector.step(actions)
        out.append([(o["observation.state"].tobytes(), r, te, tr, i) for o, r, te, tr, i in results])
    return out


def test_threads_and_processes_give_the_same_as_serial() -> None:
    with make_vector(ENV_ID, 3, "serial", **OPTIONS) as serial:
        expected = trace(serial)
        assert isinstance(serial, VectorEnv)
        assert serial.threads == 1
    with make_vector(ENV_ID, 3, "threads", num_workers=2, **OPTIONS) as threads:
        assert threads.threads == 2
        assert trace(threads) == expected
    with make_vector(ENV_ID, 3, "processes", num_workers=2, **OPTIONS) as processes:
        assert processes.workers == 2
        assert trace(processes) == expected
        state = processes.get_state(1)
        processes.set_state(2, state)
        one, two = processes.step({1: np.zeros(5), 2: np.zeros(5)})
        assert np.array_equal(one[0]["observation.state"], two[0]["observation.state"])


def test_results_come_in_the_order_of_the_indices() -> None:
    with make_vector(ENV_ID, 3, **OPTIONS) as vector:
        vector.reset_many({0: 1, 1: 2, 2: 3})
        states = {i: vector.get_state(i) for i in range(3)}
        a = vector.step({2: np.zeros(5), 0: np.full(5, 0.01)})
        for i in range(3):
            vector.set_state(i, states[i])
        b = vector.step(np.stack([np.full(5, 0.01), np.zeros(5)]), [0, 2])
        assert np.array_equal(a[0][0]["observation.state"], b[1][0]["observation.state"])
        assert np.array_equal(a[1][0]["observation.state"], b[0][0]["observation.state"])


@pytest.mark.parametrize("workers", ["serial", "threads"])
def test_a_finished_environment_is_never_stepped(workers: str) -> None:
    with make_vector(ENV_ID, 2, workers, num_workers=2, max_episode_steps=2) as vector:
        vector.reset_many({0: 0, 1: 1})
        vector.step({0: np.zeros(5)})
        vector.step({0: np.zeros(5)})
        assert vector.running.tolist() == [False, True]
        before = vector.get_state(1).physics.copy()
        with pytest.raises(RuntimeError, match="environment 0 has ended"):
            vector.step(np.zeros((2, 5)))
        assert np.array_equal(before, vector.get_state(1).physics)  # nobody moved
        vector.reset(0, 5)
        vector.step(np.zeros((2, 5)))


def test_wrong_requests_are_refused() -> None:
    with make_vector(ENV_ID, 2) as vector:
        with pytest.raises(RuntimeError, match="never began"):
            vector.step(np.zeros((2, 5)))
        vector.reset_many({0: 0, 1: 1})
        with pytest.raises(ValueError, match="environment 2 does not exist"):
            vector.step({2: np.zeros(5)})
        with pytest.raises(ValueError, match="1 actions for 2"):
            vector.step(np.zeros((1, 5)))
        with pytest.raises(ValueError, match="listed twice"):
            vector.step(np.zeros((2, 5)), [1, 1])
    with pytest.raises(ValueError, match="serial, threads, processes"):
        make_vector(ENV_ID, 2, "ray")


def test_an_error_in_a_thread_is_raised_here() -> None:
    envs: list[Environment] = [make_env(ENV_ID), make_faulty()]  # type: ignore[list-item]
    with VectorEnv(envs, threads=2) as vector:
        vector.reset_many({0: 0, 1: 1})
        vector.step(np.zeros((2, 5)))
        with pytest.raises(ValueError, match="gripper came off"):
            vector.step(np.zeros((2, 5)))


def test_an_error_in_a_worker_is_raised_here_and_the_rest_goes_on() -> None:
    with ProcessVectorEnv(make_faulty, 1) as vector:  # type: ignore[arg-type]
        vector.reset(0, 0)
        vector.step(np.zeros((1, 5)))
        with pytest.raises(ValueError, match="gripper came off") as caught:
            vector.step(np.zeros((1, 5)))
        assert "in an environment worker" in str(caught.value.__cause__)
        vector.reset(0, 1)
        vector.step(np.zeros((1, 5)))


def test_a_dead_worker_is_named_and_nothing_hangs() -> None:
    vector = ProcessVectorEnv(functools.partial(make_env, ENV_ID), 3, processes=2)
    vector.reset_many({i: i for i in range(3)})
    os.kill(vector._processes[1].pid or 0, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"worker 1 \(pid \d+, environments \[1\]\) has died \(exit code -9\)"):
        [vector.step(np.zeros((3, 5))) for _ in range(3)]
    with pytest.raises(RuntimeError, match=r"closed|ended"):
        vector.reset(0, 0)
    vector.close()


def test_a_factory_that_fails_says_why() -> None:
    with pytest.raises(ValueError, match="nothing/here"):
        make_vector("nothing/here", 1, "processes")
