"""robosuite's inner loop replaced: :class:`FastControl` drives one robosuite environment through the compiled kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


def why_not_fast(env: Any) -> str:
    """Empty when the compiled loop computes exactly what ``env.step`` does; else the reason why it cannot."""
    from robosuite.utils import control_utils

    if not hasattr(control_utils.opspace_matrices, "py_func"):
        return "robosuite's ENABLE_NUMBA is off (accepted is on)"
    if len(env.robots) != 1:
        return f"it has {len(env.robots)} robots (accepted is 1)"
    robot = env.robots[0]
    if robot.composite_controller.name != "BASIC":
        return f"its composite controller is {robot.composite_controller.name} (accepted is BASIC)"
    parts = robot.part_controllers
    if list(parts) != ["right", "right_gripper"]:
        return f"its controlled parts are {', '.join(parts)} (accepted are right, right_gripper)"
    arm, fingers = parts["right"], parts["right_gripper"]
    if not env.lite_physics or not arm.lite_physics:
        return "lite_physics is off"
    wanted = {
        "name": "OSC_POSE", "input_type": "delta", "input_ref_frame": "base", "impedance_mode": "fixed", "uncoupling": True,
        "interpolator_pos": None, "interpolator_ori": None, "position_limits": None, "orientation_limits": None,
        "joint_dim": 7, "num_ref_sites": 1, "_goal_update_mode": "achieved",
    }  # fmt: skip
    for key, value in wanted.items():
        if getattr(arm, key) != value:
            return f"its arm controller has {key.strip('_')}={getattr(arm, key)!r} (accepted is {value!r})"
    gripper = robot.gripper["right"]
    if type(fingers).__name__ != "SimpleGripController" or type(gripper).__name__ != "PandaGripper":
        return f"its gripper is {type(gripper).__name__} with {type(fingers).__name__} (accepted is PandaGripper)"
    if fingers.interpolator is not None or not fingers.use_action_scaling:
        return "its gripper controller interpolates or does not scale"
    model = env.sim.model._model
    site = model.site(f"{arm.naming_prefix}{arm.part_name}_center")
    if model.body_weldid[site.bodyid[0]] != 0:
        return "its base moves"
    if not np.array_equal(env.sim.data._data.site_xmat[site.id], np.eye(3).ravel()):
        return "its base is turned in the world"
    return ""


@dataclass(frozen=True)
class ControlState:
    """What the controller remembers between control steps (float64 arrays in the order of :attr:`FastControl.MEMORY`)."""

    arrays: tuple[np.ndarray, ...]


class FastControl:
    """The controller of one robosuite environment, its arrays bound to the environment's MuJoCo data.

    ``approximate`` chooses the cheaper kernel (see :mod:`robot_rl.sim.robosuite.kernel`). Call :meth:`bind` after every
    robosuite reset (robosuite then builds new controllers) and :meth:`step` in place of the loop inside ``env.step``. Not
    for environments that :func:`why_not_fast` refuses.
    """

    MEMORY = (
        "goal_pos", "goal_ori", "finger_goal", "mass", "jacobian", "pose_pos", "pose_ori", "velocity", "joint_pos", "joint_vel",
        "rest", "fresh",
    )  # fmt: skip

    def __init__(self, env: Any, *, approximate: bool = False) -> None:
        import mujoco
        from robosuite.utils import transform_utils

        from robot_rl.sim.robosuite import kernel

        reason = why_not_fast(env)
        if reason:
            raise ValueError(f"the compiled control loop cannot drive {type(env).__name__}: {reason}")
        self._kernel = kernel.control_step if approximate else kernel.control_step_exact
        robot = env.robots[0]
        arm, gripper = robot.part_controllers["right"], robot.gripper["right"]
        m, d = env.sim.model._model, env.sim.data._data
        self._keep = (m, d)  # the addresses below are theirs
        self.substeps = int(env.control_timestep / env.model_timestep)
        as_int = lambda values: np.array(values, np.int64)  # noqa: E731
        arm.scale_action(np.zeros(6))  # robosuite fills its scaling lazily
        full = np.ones(6)
        self._input = (full * arm.input_min, full * arm.input_max, full * arm.action_input_transform)
        self._output = (full * arm.action_scale, full * arm.action_output_transform)
        gains = np.array([full * arm.kp, full * arm.kd])
        indexes = robot._ref_actuators_indexes_dict
        self.goal_pos, self.goal_ori = np.zeros(3), np.zeros((3, 3))
        self.finger_goal = np.zeros(len(indexes["right_gripper"]))
        self.mass, self.jacobian = np.zeros((kernel.ARM, kernel.ARM)), np.zeros((6, kernel.ARM))
        self.pose_pos, self.pose_ori, self.velocity = np.zeros(3), np.zeros((3, 3)), np.zeros(6)
        self.joint_pos, self.joint_vel, self.rest = np.zeros(kernel.ARM), np.zeros(kernel.ARM), np.zeros(kernel.ARM)
        self.fresh = np.zeros(1, np.int64)
        self._transforms = transform_utils
        self._addresses = (m._address, d._address)
        self._options, self._no_sensors = m.opt, int(mujoco.mjtDisableBit.mjDSBL_SENSOR)
        self._arguments = (
            self.fresh,
            d.qpos, d.qvel, d.qM, d.qfrc_bias, d.ctrl, d.site_xpos, d.site_xmat,
            as_int(m.dof_Madr), as_int(m.dof_parentid), m.site(arm.ref_name).id,
            m.site(f"{arm.naming_prefix}{arm.part_name}_center").id,
            as_int(arm.qpos_index), as_int(arm.qvel_index), as_int(indexes["right"]), as_int(indexes["right_gripper"]),
            np.ascontiguousarray(m.actuator_ctrlrange.T),
            gains, np.array([-1.0, 1.0]), float(gripper.speed), self.rest,
            self.goal_pos, self.goal_ori, self.finger_goal, self.mass, self.jacobian, self.pose_pos, self.pose_ori,
            self.velocity, self.joint_pos, self.joint_vel, np.zeros((6, m.nv)),
        )  # fmt: skip
        self.bind(env)

    def bind(self, env: Any) -> None:
        """Take over what robosuite's freshly reset controllers hold."""
        robot = env.robots[0]
        arm = robot.part_controllers["right"]
        self.mass[:], self.jacobian[:] = arm.mass_matrix, arm.J_full
        self.pose_pos[:], self.pose_ori[:] = arm.ref_pos, arm.ref_ori_mat
        self.velocity[:3], self.velocity[3:] = arm.ref_pos_vel, arm.ref_ori_vel
        self.joint_pos[:], self.joint_vel[:], self.rest[:] = arm.joint_pos, arm.joint_vel, arm.initial_joint
        self.goal_pos[:], self.goal_ori[:] = arm.goal_pos, arm.goal_ori
        self.finger_goal[:] = robot.gripper["right"].current_action
        self.fresh[0] = int(arm.new_update)

    def step(self, action: np.ndarray) -> None:
        """Advance one control step with ``action`` (7,)."""
        low, high, centre = self._input
        scale, offset = self._output
        action = np.asarray(action, np.float64)
        delta = (np.minimum(np.maximum(action[:6], low), high) - centre) * scale + offset
        # robosuite's own functions: they round to single precision, and the states must come out the same
        turn = self._transforms.quat2mat(self._transforms.axisangle2quat(delta[3:]))
        command = (delta[:3], turn, float(np.sign(action[6])), *self._arguments)
        # nobody reads force sensors between control steps, and they move nothing: on for the last sub-step only
        flags = self._options.disableflags
        self._options.disableflags = flags | self._no_sensors
        self._kernel(*self._addresses, self.substeps - 1, True, *command)
        self._options.disableflags = flags
        self._kernel(*self._addresses, 1, self.substeps == 1, *command)

    def get_state(self) -> ControlState:
        return ControlState(tuple(getattr(self, name).copy() for name in self.MEMORY))

    def set_state(self, state: ControlState) -> None:
        for name, value in zip(self.MEMORY, state.arrays, strict=True):
            getattr(self, name)[:] = value
