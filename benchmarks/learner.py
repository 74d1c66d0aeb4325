"""How many gradient updates of the critics a second? Ours and other SAC learners, in turns, in one run.

    python benchmarks/learner.py --settings A,B --seconds 4 --rounds 5

Settings (observation 32, batch 256; an update includes drawing its batch from a filled replay buffer in memory):

    A     2 critics 3x256, action 7; critics, actor and temperature at every update
    A56   the same with an action chunk of 8 x 7 = 56
    B     10 LayerNorm critics 3x256, action 7, update-to-data ratio 20
    C     10 LayerNorm critics 3x1024, action 7, update-to-data ratio 20 (slow)

At B and C, learners that can delay the actor move it once per 20 critic updates, as RLPD does: ``robot_rl``, ``sbx`` and
``lerobot``. Stable-Baselines3 moves it at every update and takes targets from all heads; ``robot_rl_same_schedule`` does
exactly that too. LeRobot's networks always have LayerNorm, SiLU and one linear state encoder, at A as well.

Every learner lives in a process of its own with ``--threads`` threads and waits while another is timed. Prints one JSON
object: updates per second (median over rounds, and every round), and our median over each peer's. Updates per second of
CPU time say what a learner takes from its neighbours; on a busy machine, trust those with ``--threads 1``. On a machine that
runs other things too, set OMP_WAIT_POLICY=PASSIVE: threads that spin at barriers while others want the core cost more
than they compute (for every learner here). A learner that is not installed is "absent", one that does not start is "failed".
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this checkout's robot_rl, installed or not
OBSERVATION, BATCH, FILLED = 32, 256, 20_000


@dataclass(frozen=True)
class Setting:
    action: int
    critics: int
    width: int
    layer_norm: bool
    utd: int

    @property
    def hidden(self) -> tuple[int, int, int]:
        return (self.width,) * 3


SETTINGS = {
    "A": Setting(action=7, critics=2, width=256, layer_norm=False, utd=1),
    "A56": Setting(action=56, critics=2, width=256, layer_norm=False, utd=1),
    "B": Setting(action=7, critics=10, width=256, layer_norm=True, utd=20),
    "C": Setting(action=7, critics=10, width=1024, layer_norm=True, utd=20),
}


def transitions(s: Setting) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "observation": rng.standard_normal((FILLED, OBSERVATION), np.float32),
        "action": rng.uniform(-1, 1, (FILLED, s.action)).astype(np.float32),
        "reward": rng.standard_normal(FILLED, np.float32),
        "next_observation": rng.standard_normal((FILLED, OBSERVATION), np.float32),
        "terminated": rng.uniform(size=FILLED) < 0.05,
    }


# ---- the learners: each returns a function that makes `utd` critic updates


def robot_rl(s: Setting, same_schedule: bool = False, precision: str = "highest") -> Callable[[], Any]:
    import torch

    from robot_rl.learners.sac import SACConfig, SACLearner, Transitions
    from robot_rl.nn.compiled import set_threads

    set_threads(torch.get_num_threads())
    plain = same_schedule or s.utd == 1
    reductions = {"target_reduce": "min", "actor_reduce": "min"} if plain else {}  # else the defaults: min_pair, mean
    config = SACConfig(
        OBSERVATION, s.action, n_critics=s.critics, hidden=s.hidden, critic_layer_norm=s.layer_norm, utd=s.utd,
        actor_every=1 if plain else s.utd,
        **reductions,  # type: ignore[arg-type]
        matmul_precision=precision,  # type: ignore[arg-type]
    )  # fmt: skip
    learner = SACLearner(config)
    data = {k: torch.as_tensor(v) for k, v in transitions(s).items()}
    columns = (
        data["observation"], data["action"], data["reward"], 0.99 * (~data["terminated"]).float(), data["next_observation"],
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)

    def call() -> None:
        rows = torch.randint(FILLED, (s.utd * BATCH,), generator=generator)
        parts = [column.index_select(0, rows).split(BATCH) for column in columns]
        # Like a session, that reads the metrics once in a while: at every 20th critic update.
        report = learner.critic_updates % 20 in (0, 20 - s.utd)
        learner.update([Transitions(*batch) for batch in zip(*parts, strict=True)], report=report)

    return call


def _environment(s: Setting) -> Any:
    import gymnasium

    class Empty(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (OBSERVATION,), np.float32)
        action_space = gymnasium.spaces.Box(-1, 1, (s.action,), np.float32)

        def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
            return np.zeros(OBSERVATION, np.float32), {}

        def step(self, action: np.ndarray) -> Any:
            return np.zeros(OBSERVATION, np.float32), 0.0, False, False, {}

    return Empty()


def _fill(buffer: Any, s: Setting) -> None:
    d = transitions(s)
    for o, n, a, r, t in zip(d["observation"], d["next_observation"], d["action"], d["reward"], d["terminated"], strict=True):
        buffer.add(o[None], n[None], a[None], np.array([r]), np.array([t]), [{}])


def stable_baselines3(s: Setting) -> Callable[[], Any]:
    import torch
    from stable_baselines3 import SAC
    from stable_baselines3.common.logger import configure
    from stable_baselines3.common.policies import ContinuousCritic
    from stable_baselines3.common.torch_layers import create_mlp
    from stable_baselines3.sac.policies import SACPolicy

    class LayerNormCritic(ContinuousCritic):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            for i in range(len(self.q_networks)):
                net = torch.nn.Sequential(
                    *create_mlp(OBSERVATION + s.action, 1, list(s.hidden), post_linear_modules=[torch.nn.LayerNorm])
                )
                setattr(self, f"qf{i}", net)  # replaces the registered network of that name
                self.q_networks[i] = net

    class Policy(SACPolicy):
        def make_critic(self, features_extractor: Any = None) -> ContinuousCritic:
            kwargs = self._update_features_extractor(self.critic_kwargs, features_extractor)
            return (LayerNormCritic if s.layer_norm else ContinuousCritic)(**kwargs).to(self.device)

    model = SAC(
        Policy, _environment(s), batch_size=BATCH, buffer_size=FILLED, device="cpu",
        policy_kwargs={"net_arch": list(s.hidden), "n_critics": s.critics},
    )  # fmt: skip
    assert any(isinstance(m, torch.nn.LayerNorm) for m in model.critic.modules()) == s.layer_norm
    model.set_logger(configure(None, []))
    _fill(model.replay_buffer, s)
    return lambda: model.train(s.utd, BATCH)


def sbx(s: Setting) -> Callable[[], Any]:
    import jax
    from sbx import SAC
    from stable_baselines3.common.logger import configure

    model = SAC(
        "MlpPolicy", _environment(s), batch_size=BATCH, buffer_size=FILLED, gradient_steps=s.utd, policy_delay=s.utd,
        policy_kwargs={"net_arch": list(s.hidden), "n_critics": s.critics, "layer_norm": s.layer_norm},
    )  # fmt: skip
    model.set_logger(configure(None, []))
    _fill(model.replay_buffer, s)

    def call() -> None:
        model.train(s.utd, BATCH)
        jax.block_until_ready(model.policy.qf_state.params)

    return call


def lerobot(s: Setting) -> Callable[[], Any]:
    import torch
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.policies.sac.configuration_sac import ActorNetworkConfig, CriticNetworkConfig, SACConfig
    from lerobot.policies.sac.modeling_sac import SACPolicy

    config = SACConfig(
        input_features={"observation.state": PolicyFeature(FeatureType.STATE, (OBSERVATION,))},
        output_features={"action": PolicyFeature(FeatureType.ACTION, (s.action,))},
        dataset_stats=None, device="cpu", num_critics=s.critics, num_subsample_critics=2 if s.utd > 1 else None,
        utd_ratio=s.utd, use_torch_compile=False,
        critic_network_kwargs=CriticNetworkConfig(hidden_dims=list(s.hidden)),
        actor_network_kwargs=ActorNetworkConfig(hidden_dims=list(s.hidden)),
    )  # fmt: skip
    policy = SACPolicy(config)
    parameters = policy.get_optim_params()
    adams = {name: torch.optim.Adam([p] if isinstance(p, torch.Tensor) else p, 3e-4) for name, p in parameters.items()}
    d = {k: torch.as_tensor(v) for k, v in transitions(s).items()}

    def step(part: str, module_parameters: list[Any], batch: dict[str, Any]) -> None:
        loss = policy.forward(batch, model=part)[f"loss_{part}"]
        adams[part].zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module_parameters, config.grad_clip_norm)
        adams[part].step()

    def call() -> None:
        # What lerobot.rl.learner does for one optimisation step, without its logging.
        batch: dict[str, Any] = {}
        for i in range(s.utd):
            rows = torch.randint(FILLED, (BATCH,))
            batch = {
                "action": d["action"][rows], "reward": d["reward"][rows], "done": d["terminated"][rows].float(),
                "state": {"observation.state": d["observation"][rows]},
                "next_state": {"observation.state": d["next_observation"][rows]},
            }  # fmt: skip
            step("critic", list(policy.critic_ensemble.parameters()), batch)
            if i < s.utd - 1:
                policy.update_target_networks()
        step("actor", list(policy.actor.parameters()), batch)
        step("temperature", [policy.log_alpha], batch)
        policy.update_target_networks()

    return call


LEARNERS: dict[str, tuple[str, Callable[[Setting], Callable[[], Any]]]] = {
    "robot_rl": ("robot_rl", robot_rl),
    "robot_rl_same_schedule": ("robot_rl", lambda s: robot_rl(s, same_schedule=True)),
    "robot_rl_medium": ("robot_rl", lambda s: robot_rl(s, precision="medium")),
    "stable_baselines3": ("stable_baselines3", stable_baselines3),
    "sbx": ("sbx", sbx),
    "lerobot": ("lerobot", lerobot),
}


# ---- one process per learner


def work(name: str, setting: str, threads: int) -> None:
    """Build the learner, say so, then time it for as many seconds as each line of standard input says."""
    import torch

    torch.set_num_threads(threads)
    s = SETTINGS[setting]
    module = importlib.import_module(LEARNERS[name][0])
    call = LEARNERS[name][1](s)
    for _ in range(1 if s.utd > 1 else 5):
        call()
    print(json.dumps({"version": getattr(module, "__version__", "")}), flush=True)
    for line in sys.stdin:
        seconds, updates = float(line), 0
        start, cpu = time.perf_counter(), time.process_time()
        while (elapsed := time.perf_counter() - start) < seconds:
            call()
            updates += s.utd
        print(json.dumps({"rate": updates / elapsed, "cpu_rate": updates / (time.process_time() - cpu)}), flush=True)


def measure(setting: str, names: list[str], seconds: float, rounds: int, threads: int) -> dict[str, Any]:
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "",
        "XLA_FLAGS": f"--xla_cpu_multi_thread_eigen={'true' if threads > 1 else 'false'}",
    }  # fmt: skip
    result: dict[str, Any] = {}
    workers: dict[str, subprocess.Popen[str]] = {}
    try:
        for name in names:
            if importlib.util.find_spec(LEARNERS[name][0]) is None:
                result[name] = "absent"
                continue
            command = [sys.executable, __file__, "--worker", name, "--settings", setting, "--threads", str(threads)]
            worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
            workers[name] = worker
            try:
                result[name] = _answer(worker, name) | {
                    "rounds": [],
                    "cpu_rounds": [],
                }  # wait: warm-ups must not disturb each other
            except RuntimeError as error:  # a peer of another version; its traceback is on standard error
                del workers[name]
                result[name] = f"failed: {error}"
        for _ in range(rounds):
            for name, worker in workers.items():
                assert worker.stdin is not None
                worker.stdin.write(f"{seconds}\n")
                worker.stdin.flush()
                answer = _answer(worker, name)
                result[name]["rounds"].append(round(answer["rate"], 2))
                result[name]["cpu_rounds"].append(round(answer["cpu_rate"], 2))
                print(f"{setting} {name}: {answer['rate']:.2f} updates/s", file=sys.stderr)
    finally:
        for worker in workers.values():
            if worker.stdin is not None:
                worker.stdin.close()
            worker.wait()
    timed = {name: entry for name, entry in result.items() if isinstance(entry, dict)}
    for entry in timed.values():
        entry["updates_per_second"] = statistics.median(entry["rounds"])
        entry["updates_per_cpu_second"] = statistics.median(entry["cpu_rounds"])
    if ours := timed.pop("robot_rl", None):
        for ratio, rate in (("ratio", "updates_per_second"), ("cpu_ratio", "updates_per_cpu_second")):
            result[ratio] = {name: round(ours[rate] / entry[rate], 2) for name, entry in timed.items()}
    return result


def _answer(worker: subprocess.Popen[str], name: str) -> dict[str, Any]:
    assert worker.stdout is not None
    for line in worker.stdout:
        if line.startswith("{"):  # some libraries greet on standard output
            return json.loads(line)
    raise RuntimeError(f"the process of {name!r} ended (code {worker.wait()}) before it answered")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", default="A,A56,B", help=f"comma-separated, of {', '.join(SETTINGS)}")
    parser.add_argument("--learners", default=",".join(LEARNERS), help="comma-separated; all by default")
    parser.add_argument("--seconds", type=float, default=4.0, help="timed per learner and round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="per learner; all cores by default")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    a = parser.parse_args()
    settings, names = a.settings.split(","), a.learners.split(",")
    for value, known, option in [(s, SETTINGS, "--settings") for s in settings] + [(n, LEARNERS, "--learners") for n in names]:
        if value not in known:
            parser.error(f"{option} {value!r}: accepted are {', '.join(known)}")
    if a.worker:
        work(a.worker, settings[0], a.threads)
        return
    report = {
        "benchmark": "learner", "unit": "critic updates per second", "batch": BATCH, "threads": a.threads,
        "seconds": a.seconds, "rounds": a.rounds, "machine": platform.machine(), "python": platform.python_version(),
        "settings": {s: measure(s, names, a.seconds, a.rounds, a.threads) for s in settings},
    }  # fmt: skip
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
