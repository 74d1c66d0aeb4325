"""Our own contact-rich table-top tasks: a 7-axis position-controlled arm with a gripper, 20 Hz Cartesian commands."""

from __future__ import annotations

from typing import Any

from robot_rl.sim.env import Environment, Expert, register_env

TASK_IDS = ("tabletop/Lift", "tabletop/PegInsertion", "tabletop/Drawer", "tabletop/PlaceInBin")
OPTIONS = ("cameras", "image_size", "max_episode_steps", "object_state")


def _make(env_id: str, **options: Any) -> Environment:
    from robot_rl.sim.tabletop.tasks import TASKS  # here, because it imports mujoco

    task = TASKS[env_id]
    for name in options:
        if name not in OPTIONS:
            raise ValueError(f"option {name!r} of {env_id} is unknown; accepted are {', '.join(OPTIONS)}")
    return task(env_id=env_id, **options)


def _make_expert(env: Environment, *, skill: float = 1.0, noise: float = 0.0) -> Expert:
    from robot_rl.sim.tabletop.experts import EXPERTS

    return EXPERTS[env.spec.env_id](env, skill=skill, noise=noise)


for _env_id in TASK_IDS:
    register_env(_env_id, _make, _make_expert)
