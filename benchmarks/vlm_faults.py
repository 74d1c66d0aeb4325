"""The VLM client under fire: 10,000 questions, a fifth of all requests go wrong, in every way a server can.

Counts wrong labels (the right ones are known), requests over the budget, memory, and what a control loop in another process and
one in the same process notice. A first part runs without a budget in the way, a second one with a budget of half the requests.
Prints one JSON object.

    python benchmarks/vlm_faults.py            # about two minutes
    python benchmarks/vlm_faults.py --questions 1000
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from robot_rl.rewards.vlm import Question, VlmClient, VlmConfig
from robot_rl.rewards.vlm.fake_server import FakeVlmServer, Knobs
from robot_rl.rewards.vlm.questions import pair

FAULTS = 0.2
HZ = 50.0


def serve(pipe: Connection) -> None:
    knobs = Knobs(**{f"p_{name}": FAULTS / len(Knobs.FAULTS) for name in Knobs.FAULTS})
    with FakeVlmServer(knobs=knobs) as server:
        pipe.send(server.url)
        while pipe.recv() == "stats":
            pipe.send(dict(server.stats))


def control(pipe: Connection, stop: Any) -> None:
    """A loop of ``HZ`` that does a little arithmetic; sends how late each tick was."""
    pipe.send(ticks(stop))


def ticks(stop: Any) -> list[float]:
    late, period = [], 1.0 / HZ
    state = np.zeros(64)
    due = time.perf_counter() + period
    while not stop.is_set():
        time.sleep(max(0.0, due - time.perf_counter()))
        late.append(time.perf_counter() - due)
        state = np.tanh(state + 0.01)
        due += period
    return late


def questions(count: int, seed: int) -> tuple[list[tuple[int, int]], Iterator[Question]]:
    rng = np.random.default_rng(seed)
    levels = [(int(a), int(b)) for a, b in rng.integers(0, 256, (count, 2))]
    pictures = [np.full((16, 16, 3), level, np.uint8) for level in range(256)]
    return levels, (pair("to light the lamp", [pictures[a]], [pictures[b]]) for a, b in levels)


def ask(url: str, count: int, budget: int, seed: int) -> dict[str, Any]:
    config = VlmConfig(
        url, "fake", budget, 10**12, 0.0, cache="off", rate_per_s=0.0, in_flight=32, queue=64, deadline_s=0.3, backoff_s=0.005,
        backoff_most_s=0.05, open_s=0.1, open_share=0.9, max_age_s=1e5,
    )  # fmt: skip
    levels, asked = questions(count, seed)
    wrong = valid = 0
    with VlmClient(config) as client:
        began = time.perf_counter()
        for (a, b), answer in zip(levels, client.ask_all(asked), strict=True):
            if answer.valid:
                valid += 1
                wrong += answer.value["label"] != (-1 if a == b else int(b > a))
        seconds = time.perf_counter() - began
        spent, figures = client.budget.spent()[0], client.state()
    return {
        "questions": count, "valid": valid, "wrong": wrong, "seconds": seconds, "budget": budget, "spent": spent,
        "requests": figures["requests"], "invalid": figures["invalid"], "http": figures["http"], "rungs": figures["rungs"],
        "latency_p50_ms": figures["latency_p50_ms"], "latency_p99_ms": figures["latency_p99_ms"],
    }  # fmt: skip


def lateness(late: list[float]) -> dict[str, float]:
    ms = np.array(late) * 1e3
    over = int((ms > 1e3 / HZ).sum())
    return {"ticks": len(ms), "late_by_a_period": over, "p50_ms": float(np.median(ms)), "p99_ms": float(np.percentile(ms, 99))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=10_000)
    count = parser.parse_args().questions
    context = multiprocessing.get_context("spawn")
    near, far = context.Pipe()
    server = context.Process(target=serve, args=(far,), daemon=True)
    server.start()
    url = near.recv()
    quiet_stop = threading.Event()
    threading.Timer(3.0, quiet_stop.set).start()
    quiet = ticks(quiet_stop)
    stop, mine = context.Event(), threading.Event()
    loop_near, loop_far = context.Pipe()
    loop = context.Process(target=control, args=(loop_far, stop), daemon=True)
    loop.start()
    here: list[float] = []
    beside = threading.Thread(target=lambda: here.extend(ticks(mine)))
    beside.start()
    ask(url, min(200, count), 10**6, 99)  # what is loaded once is no growth
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    free = ask(url, count, 10**9, 0)
    near.send("stats")
    before = near.recv()["requests"]
    bound = ask(url, count, count // 2, 1)
    near.send("stats")
    seen = near.recv()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    stop.set()
    mine.set()
    beside.join()
    elsewhere = loop_near.recv()
    near.send("end")
    print(json.dumps({
        "fault_share": FAULTS, "without_budget": free, "with_budget": bound, "server": seen,
        "server_requests_under_budget": seen["requests"] - before, "memory_growth_mb": grown / 1024,
        "control_loop": {"alone": lateness(quiet), "own_process": lateness(elsewhere), "same_process": lateness(here)},
        "holds": {
            "no_wrong_labels": free["wrong"] == bound["wrong"] == 0,
            "budget": bound["spent"] <= bound["budget"] and seen["requests"] - before <= bound["budget"],
            "memory": grown / 1024 < 50,
        },
    }))  # fmt: skip


if __name__ == "__main__":
    main()
