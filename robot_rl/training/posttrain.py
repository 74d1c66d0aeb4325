"""``robot-rl train``: from demonstrations to a post-trained policy, a table and a report."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from robot_rl import seeding
from robot_rl.config import to_yaml
from robot_rl.nn.compiled import set_threads
from robot_rl.policies.base import BasePolicy
from robot_rl.policies.behaviour_cloning import clone
from robot_rl.policies.checkpoint import save_policy
from robot_rl.policies.compact import CompactPolicy
from robot_rl.policies.lerobot.loading import is_checkpoint
from robot_rl.policies.lerobot.options import read_options
from robot_rl.policies.loading import VISION, load_policy, write_reference
from robot_rl.policies.openvla.network import read_config
from robot_rl.policies.openvla.options import read_options as read_openvla_options
from robot_rl.progress import Progress, Silent
from robot_rl.runtime.acting import ActingMode, ActingPolicy
from robot_rl.sim.env import EnvSpec, make_env
from robot_rl.sim.rollout import Rollout
from robot_rl.sim.vector import make_vector
from robot_rl.training.acting_session import ActingSession
from robot_rl.training.async_session import AsyncSession
from robot_rl.training.build import pick_device
from robot_rl.training.config import PostTrainConfig
from robot_rl.training.demonstrations import gather
from robot_rl.training.final import finish
from robot_rl.training.interrupt import InterruptFlag
from robot_rl.training.measuring import measure, success_interval
from robot_rl.training.run_folder import UNFINISHED, RunFolder
from robot_rl.training.session import Session
from robot_rl.types import Episode


def run(config: PostTrainConfig, *, progress: Progress | None = None) -> dict[str, Any]:
    """Do the whole job in ``config.run_dir``, or the rest of it if it was interrupted; returns the content of ``result.json``.

    Raises:
        ValueError: a configuration that does not fit the task, or a run folder of another configuration.
        RuntimeError: another process trains in the run folder.
        Interrupted: Ctrl-C; everything is saved and the same call resumes.
    """
    progress = progress or Silent()
    device = pick_device(config.device)
    if config.threads:
        set_threads(config.threads)
    spec = _env_spec(config)
    folder = RunFolder(Path(config.run_dir))
    with folder.alone(), InterruptFlag() as flag:
        _claim(folder, config)
        base = prepare_base(config, spec, folder, progress, flag, device)
        vector = make_vector(config.env.id, config.env.num_envs, config.env.workers, **config.env.options)
        with vector:
            rollout = Rollout(vector, spec)
            session = _session(config, folder, base, _demos(config, spec, folder, progress), rollout, progress, flag, device)
            try:
                if not session.resume():
                    _baselines(config, session, rollout, progress, flag)
                    session.checkpoint()
                session.run()
                return finish(config, folder, session, rollout, progress, flag)
            finally:
                session.close()


def _session(
    config: PostTrainConfig,
    folder: RunFolder,
    base: BasePolicy,
    demos: list[Episode],
    rollout: Rollout,
    progress: Progress,
    flag: InterruptFlag,
    device: str,
) -> ActingSession:
    if config.schedule.learner == "process":  # which reads the demonstrations from the run folder
        return AsyncSession(config, folder, base, rollout, progress, flag, device)
    return Session(config, folder, base, demos, rollout, progress, flag, device)


def _env_spec(config: PostTrainConfig) -> EnvSpec:
    env = make_env(config.env.id, **config.env.options)
    spec = env.spec
    env.close()
    return spec


def _claim(folder: RunFolder, config: PostTrainConfig) -> None:
    """Write the resolved configuration; where there is one, check that it is the same run (its end may have been moved)."""
    from robot_rl.config import config_hash, load

    if folder.config.exists():
        before = load(PostTrainConfig, folder.config)
        if config_hash(before) != config_hash(config):
            raise ValueError(
                f"run_dir={str(folder.path)!r} holds a run of another configuration ({config_hash(before)}, this one is "
                f"{config_hash(config)}); accepted are the same configuration, which resumes it, or another run_dir"
            )
    folder.write_text("config.yaml", to_yaml(config))


def _demos(config: PostTrainConfig, spec: EnvSpec, folder: RunFolder, progress: Progress) -> list[Episode]:
    if config.base.path is not None and not config.demos.prefill:
        return []
    return gather(config.demos, config.env, spec, config.seed, folder, progress, _workers(config))


def _workers(config: PostTrainConfig) -> int:
    import os

    return min(os.cpu_count() or 1, 8) if config.env.workers != "serial" or config.demos.episodes >= 50 else 1


def prepare_base(
    config: PostTrainConfig, spec: EnvSpec, folder: RunFolder, progress: Progress, flag: InterruptFlag, device: str
) -> BasePolicy:
    """The frozen base: loaded, left by an earlier attempt, or cloned now (an interrupted cloning goes on)."""
    path, options, rows = config.base.path, _base_options(config, spec), config.base.replan_every
    made = (folder.base / "policy.json").exists()
    if path is not None and rows and not made:
        changed = replanned(load_policy(path, device, options), rows)
        save_policy(changed.cpu(), folder.base, extra={"task": spec.env_id, "replanned_from": path.name})
    elif path is None and not made:
        episodes = _demos(config, spec, folder, progress)
        bc = config.base.bc
        progress.start("behaviour cloning", bc.steps)
        done = 0

        def report(step: int, loss: float) -> None:
            nonlocal done
            flag.raise_if_set()
            progress.advance(step - done)
            progress.status(loss=loss)
            done = step

        unfinished = folder.base / UNFINISHED
        features = dict(spec.observation_features)
        cloned = clone(episodes, features, spec.action, bc, device=device, progress=report, unfinished=unfinished)
        cloned = replanned(cloned, rows)
        save_policy(cloned.cpu(), folder.base, extra={"task": spec.env_id, "episodes": len(episodes)})
    # What the run cloned or changed itself lies in its own folder, and has no options.
    policy = load_policy(folder.base, device) if path is None or rows else load_policy(path, device, options)
    for name, feature in policy.spec.observation_features.items():
        if name not in spec.observation_features or spec.observation_features[name].shape != feature.shape:
            raise ValueError(
                f"base.path={str(path)!r}: the policy reads {name} {feature.shape}; {spec.env_id} has {dict(spec.observation_features)}"
            )
    if policy.spec.action.dim != spec.action.dim:
        raise ValueError(
            f"base.path={str(path)!r}: {policy.spec.action.dim} action dimensions; {spec.env_id} has {spec.action.dim}"
        )
    if path is not None and not rows:  # so that learner, evaluation and robots find the same one
        write_reference(policy, folder.base, path, options)
    return policy


def _base_options(config: PostTrainConfig, spec: EnvSpec) -> dict[str, Any]:
    """A LeRobot or OpenVLA checkpoint knows neither which of its actions grip nor which count as differences: unless told, the task says it."""
    source, options = config.base.path, dict(config.base.options)
    if source is None or "action" in options:
        return options
    told = {k: v for k, v in options.items() if k != VISION}  # which every kind of base has
    lerobot = is_checkpoint(source) and read_options(source).action is None
    if lerobot or (read_config(source) is not None and read_openvla_options(source, told).action is None):
        options["action"] = spec.action.to_json()
    return options


def replanned(policy: BasePolicy, rows: int) -> CompactPolicy:
    """The policy, asked again after ``rows`` of every chunk; that makes it another base, with another identity.

    Raises:
        ValueError: more rows than a chunk has, or a policy that is not ours to change.
    """
    if not isinstance(policy, CompactPolicy):
        raise ValueError(
            f"base.replan_every={rows}: the base is a {type(policy).__name__}, which is asked as often as it was made for; accepted is 0, "
            "or a compact diffusion or flow policy"
        )
    if rows > policy.config.horizon:
        raise ValueError(f"base.replan_every={rows}: accepted are 0 to {policy.config.horizon}, the rows of a chunk")
    if rows and rows != policy.config.n_action_steps:
        policy.config = replace(policy.config, n_action_steps=rows)
        policy.freeze()
    return policy


STARTS_AS_BASE = ("residual", "fine_tuned", "advantage_conditioned")
"""Heads whose untrained selves are the base, so that measuring them would measure it twice."""


def _baselines(
    config: PostTrainConfig, session: ActingSession, rollout: Rollout, progress: Progress, flag: InterruptFlag
) -> None:
    """The gate's reference on gate seeds, and the curve's baselines on evaluation seeds."""
    e = config.evaluation
    began = time.monotonic()
    modes: list[tuple[str, ActingMode]] = [("base", "base")]
    if (
        config.head.kind not in STARTS_AS_BASE or config.head.adapter.kind == "modulation"
    ):  # a pool may have been trained before
        modes += [("untrained_head", "explore")]
    if config.head.kind == "latent_noise":
        modes += [("zero_noise", "zero_noise")]
    progress.start("baselines", e.reference_episodes + len(modes) * e.curve_episodes)
    base = ActingPolicy(session.base, device=session.device)
    outcomes = measure(rollout, base, seeding.GATE.take(e.reference_episodes), progress=progress, should_stop=flag)
    successes, n, _ = success_interval(outcomes)
    session.gate.set_reference(successes, n)
    session.counters.gate_steps += sum(o.length for o in outcomes)
    progress.log(f"base policy: {successes} of {n} gate starts")
    for who, mode in modes:
        policy = ActingPolicy(session.base, session.head, mode, device=session.device)
        outcomes = measure(rollout, policy, seeding.EVALUATION.take(e.curve_episodes), progress=progress, should_stop=flag)
        successes, n, interval = success_interval(outcomes)
        session.counters.evaluation_steps += sum(o.length for o in outcomes)
        session.record_evaluation(who, successes, n, mode=mode)
        progress.log(f"{who.replace('_', ' ')}: {successes} of {n} evaluation starts [{interval.low:.0%}, {interval.high:.0%}]")
        if who == "base":
            session.set_base_curve(successes, n)
    session.counters.wall_seconds += time.monotonic() - began
