"""robosuite tasks: ``robosuite/Lift``, ``robosuite/Can``, ``robosuite/Square``, ``robosuite/Door`` and any other by name.

robosuite itself is imported when an environment is made.
"""

from robot_rl.sim.adapters import checked_factory
from robot_rl.sim.env import register_env
from robot_rl.sim.robosuite.env import SHIPPED, RobosuiteEnv, RobosuiteState

__all__ = ["RobosuiteEnv", "RobosuiteState"]

_factory = checked_factory(RobosuiteEnv)
for _name in SHIPPED:
    register_env(f"robosuite/{_name}", _factory)
register_env("robosuite/*", _factory)
