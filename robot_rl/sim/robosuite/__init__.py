"""robosuite tasks: ``robosuite/Lift``, ``robosuite/Can``, ``robosuite/Square``, ``robosuite/Door`` and any other by name.

robosuite itself is imported when an environment is made.
"""

from robot_rl.sim.adapters import checked_factory
from robot_rl.sim.env import ExpertFactory, register_env
from robot_rl.sim.robosuite.env import SHIPPED, RobosuiteEnv, RobosuiteState
from robot_rl.sim.robosuite.experts import CanOperator, LiftOperator, SquareOperator

__all__ = ["RobosuiteEnv", "RobosuiteState"]

_factory = checked_factory(RobosuiteEnv)
_EXPERTS: dict[str, ExpertFactory] = {"Lift": LiftOperator, "Can": CanOperator, "Square": SquareOperator}
for _name in SHIPPED:
    register_env(f"robosuite/{_name}", _factory, _EXPERTS.get(_name))
register_env("robosuite/*", _factory)
