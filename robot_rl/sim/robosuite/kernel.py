"""One robosuite control step as one compiled call: physics sub-steps and operational-space control without Python.

robosuite runs its OSC_POSE controller in Python once per physics sub-step, which is most of its time. This module is
the same control law (Khatib 1987, as robosuite 1.5 applies it: fixed impedance, uncoupled position and orientation,
base frame, delta goals from the achieved pose, null-space pull to the initial joints, bias compensation) written for
numba and calling MuJoCo's C functions ``mj_step1``, ``mj_jacSite`` and ``mj_step2`` by address. Two versions:

* :func:`control_step_exact` adds and multiplies in robosuite's order with robosuite's compiled helpers: the same bits.
  It has to be so to give the same states: MuJoCo's contact detection stops iterating at a tolerance, so a difference in
  the last bit of a torque becomes 1e-7 at a contact and, after a few contacts in a bad place, a different episode.
* :func:`control_step` solves the small symmetric systems by Cholesky instead of by pseudo-inverses (which take over
  where one is near singular). Cheaper; equal to rounding in every step, not over an episode.

Compiled once and kept in numba's cache on disk; runs without the GIL, so threads scale.
"""

from __future__ import annotations

import ctypes
import math
import os
from pathlib import Path

import llvmlite.binding as llvm
import mujoco
import numpy as np
from numba import njit, types
from robosuite.utils.control_utils import nullspace_torques, opspace_matrices, orientation_error

ARM = 7  # joints of the arm
MAX_CONDITION = 1e7  # pivots further apart than this: use the pseudo-inverse


def _load_mujoco() -> None:
    """Make MuJoCo's C functions known to compiled code by name, so that the compiled code can be cached on disk."""
    folder = Path(mujoco.__file__).parent
    names = ["mj_step1", "mj_step2", "mj_jacSite"]
    for path in [
        *sorted(folder.glob("libmujoco*.so*")),
        *sorted(folder.glob("libmujoco*.dylib")),
        *sorted(folder.glob("mujoco.dll")),
    ]:
        library = ctypes.CDLL(os.fspath(path))  # already mapped by the package: this is the same copy
        for name in names:
            llvm.add_symbol(name, ctypes.cast(getattr(library, name), ctypes.c_void_p).value)
        return
    raise ImportError(f"no MuJoCo library in {folder}")


_load_mujoco()
_step1 = types.ExternalFunction("mj_step1", types.void(types.uintp, types.uintp))
_step2 = types.ExternalFunction("mj_step2", types.void(types.uintp, types.uintp))
_jac_site = types.ExternalFunction(
    "mj_jacSite",
    types.void(types.uintp, types.uintp, types.CPointer(types.float64), types.CPointer(types.float64), types.int32),
)


@njit(cache=True, nogil=True)
def _cholesky(a, low):  # type: ignore[no-untyped-def]
    """Lower factor of ``a`` into ``low``; False when the pivots say that ``a`` is near singular."""
    n = a.shape[0]
    smallest, largest = math.inf, 0.0
    for j in range(n):
        pivot = a[j, j]
        for k in range(j):
            pivot -= low[j, k] * low[j, k]
        if not pivot > 0.0:
            return False
        smallest = min(smallest, pivot)
        largest = max(largest, pivot)
        root = math.sqrt(pivot)
        low[j, j] = root
        for i in range(j + 1, n):
            value = a[i, j]
            for k in range(j):
                value -= low[i, k] * low[j, k]
            low[i, j] = value / root
    return largest < MAX_CONDITION * smallest


@njit(cache=True, nogil=True)
def _solve(a, b, x, low):  # type: ignore[no-untyped-def]
    """``x`` = ``a``^-1 ``b`` for symmetric positive ``a``, its pseudo-inverse times ``b`` where ``a`` is near singular."""
    n = a.shape[0]
    if not _cholesky(a, low):
        x[:] = np.linalg.pinv(a) @ b
        return
    for i in range(n):
        value = b[i]
        for k in range(i):
            value -= low[i, k] * x[k]
        x[i] = value / low[i, i]
    for i in range(n - 1, -1, -1):
        value = x[i]
        for k in range(i + 1, n):
            value -= low[k, i] * x[k]
        x[i] = value / low[i, i]


@njit(cache=True, nogil=True)
def _arm_inertia(inertia, madr, parent, arm_dof, mass):  # type: ignore[no-untyped-def]
    """The arm's rows and columns of MuJoCo's sparse joint-space inertia."""
    mass[:] = 0.0
    for i in range(ARM):
        address = madr[arm_dof[i]]
        dof = arm_dof[i]
        while dof >= 0:
            for j in range(i + 1):
                if arm_dof[j] == dof:
                    mass[i, j] = inertia[address]
                    mass[j, i] = inertia[address]
            address += 1
            dof = parent[dof]


@njit(cache=True, nogil=True)
def control_step(  # type: ignore[no-untyped-def]
    model, data, substeps, new_goal, shift, turn, grip, fresh,
    qpos, qvel, inertia, bias, ctrl, site_pos, site_mat,
    madr, parent, grip_site, base_site,
    arm_qpos, arm_dof, arm_ctrl, finger_ctrl, limits,
    gains, finger_sign, finger_speed, rest,
    goal_pos, goal_ori, finger_goal, mass, jacobian, pose_pos, pose_ori, velocity, joint_pos, joint_vel,
    jac,
):  # fmt: skip
    """Advance one control step of ``substeps`` physics steps.

    ``model`` and ``data`` are the addresses of ``mjModel`` and ``mjData``; the arrays after ``fresh`` are views of their
    fields (``qpos`` .. ``site_mat``, ``madr``, ``parent``) or belong to the controller. With ``new_goal`` the first
    sub-step sets the goal: ``shift`` (3,) m and ``turn`` (3, 3) are the commanded change of pose, ``grip`` the sign of
    the finger command. ``fresh`` (1,) int64 is 0 right after a reset: robosuite then runs the first sub-step on what the
    controller saw while it was being built. ``gains`` (2, 6): kp, kd. ``limits`` (2, nu) control range.
    Written in place: goals, ``finger_goal`` and the controller's view (``mass`` .. ``joint_vel``).
    """
    nv = qvel.shape[0]
    jac_pos, jac_rot = jac[:3], jac[3:]
    error, wrench, accel, torque = np.empty(6), np.empty(6), np.empty(ARM), np.empty(ARM)
    half, reach, null = np.empty((ARM, 6)), np.empty(6), np.empty(6)
    lam, low6, low3, low7 = np.empty((6, 6)), np.empty((6, 6)), np.empty((3, 3)), np.empty((ARM, ARM))
    lam_pos, lam_ori = np.empty((3, 3)), np.empty((3, 3))
    origin, frame, want = np.empty(3), np.empty((3, 3)), np.empty((3, 3))

    for substep in range(substeps):
        _step1(model, data)
        for i in range(3):
            origin[i] = site_pos[base_site, i]
            for j in range(3):
                frame[i, j] = site_mat[base_site, 3 * i + j]

        if fresh[0] != 0:
            # what the controller knows of the arm
            _jac_site(model, data, jac_pos.ctypes, jac_rot.ctypes, grip_site)
            for i in range(6):
                total = 0.0
                for k in range(nv):
                    total += jac[i, k] * qvel[k]
                velocity[i] = total
                for k in range(ARM):
                    jacobian[i, k] = jac[i, arm_dof[k]]
            for i in range(3):
                pose_pos[i] = site_pos[grip_site, i]
                for j in range(3):
                    pose_ori[i, j] = site_mat[grip_site, 3 * i + j]
            for i in range(ARM):
                joint_pos[i] = qpos[arm_qpos[i]]
                joint_vel[i] = qvel[arm_dof[i]]
            _arm_inertia(inertia, madr, parent, arm_dof, mass)
        fresh[0] = 1

        if substep == 0 and new_goal:
            # a new goal: the delta is added to the pose reached so far, in the frame of the robot's base
            for i in range(3):
                goal_pos[i] = shift[i]
                for k in range(3):
                    goal_pos[i] += frame[k, i] * (pose_pos[k] - origin[k])
            for i in range(3):
                for j in range(3):
                    want[i, j] = 0.0
                    for k in range(3):
                        want[i, j] += frame[k, i] * pose_ori[k, j]
            for i in range(3):
                for j in range(3):
                    goal_ori[i, j] = 0.0
                    for k in range(3):
                        goal_ori[i, j] += turn[i, k] * want[k, j]
            for i in range(finger_goal.shape[0]):
                step = finger_sign[i] * finger_speed * grip
                finger_goal[i] = min(max(finger_goal[i] + step, -1.0), 1.0)

        # pose error in the world, with the goal carried along by the base
        for i in range(3):
            error[i] = origin[i] - pose_pos[i]
            for k in range(3):
                error[i] += frame[i, k] * goal_pos[k]
            for j in range(3):
                want[i, j] = 0.0
                for k in range(3):
                    want[i, j] += frame[i, k] * goal_ori[k, j]
        for i in range(3):
            a, b = (i + 1) % 3, (i + 2) % 3
            total = 0.0
            for j in range(3):
                total += pose_ori[a, j] * want[b, j] - pose_ori[b, j] * want[a, j]
            error[3 + i] = 0.5 * total
        for i in range(6):
            error[i] = error[i] * gains[0, i] - velocity[i] * gains[1, i]

        # inverse operational-space inertia J M^-1 J^T through the factor of M
        if _cholesky(mass, low7):
            for c in range(6):
                for i in range(ARM):
                    value = jacobian[c, i]
                    for k in range(i):
                        value -= low7[i, k] * half[k, c]
                    half[i, c] = value / low7[i, i]
            for i in range(6):
                for j in range(i + 1):
                    total = 0.0
                    for k in range(ARM):
                        total += half[k, i] * half[k, j]
                    lam[i, j] = total
                    lam[j, i] = total
        else:
            lam[:] = jacobian @ np.linalg.inv(mass) @ jacobian.T
        for i in range(3):
            for j in range(3):
                lam_pos[i, j] = lam[i, j]
                lam_ori[i, j] = lam[3 + i, 3 + j]
        _solve(lam_pos, error[:3], wrench[:3], low3)
        _solve(lam_ori, error[3:], wrench[3:], low3)

        # null space: M a - J^T Lambda J a is (I - Jbar J)^T M a without the products that cancel
        for i in range(ARM):
            accel[i] = 10.0 * (rest[i] - joint_pos[i]) - 2.0 * math.sqrt(10.0) * joint_vel[i]
        for i in range(6):
            reach[i] = 0.0
            for k in range(ARM):
                reach[i] += jacobian[i, k] * accel[k]
        _solve(lam, reach, null, low6)
        for i in range(ARM):
            total = bias[arm_dof[i]]
            for k in range(ARM):
                total += mass[i, k] * accel[k]
            for k in range(6):
                total += jacobian[k, i] * (wrench[k] - null[k])
            torque[i] = total
        for i in range(ARM):
            ctrl[arm_ctrl[i]] = min(max(torque[i], limits[0, arm_ctrl[i]]), limits[1, arm_ctrl[i]])
        for i in range(finger_ctrl.shape[0]):
            lo, hi = limits[0, finger_ctrl[i]], limits[1, finger_ctrl[i]]
            value = 0.5 * (hi + lo) + 0.5 * (hi - lo) * finger_goal[i]
            ctrl[finger_ctrl[i]] = min(max(value, lo), hi)
        _step2(model, data)


@njit(cache=True, nogil=True)
def control_step_exact(  # type: ignore[no-untyped-def]
    model, data, substeps, new_goal, shift, turn, grip, fresh,
    qpos, qvel, inertia, bias, ctrl, site_pos, site_mat,
    madr, parent, grip_site, base_site,
    arm_qpos, arm_dof, arm_ctrl, finger_ctrl, limits,
    gains, finger_sign, finger_speed, rest,
    goal_pos, goal_ori, finger_goal, mass, jacobian, pose_pos, pose_ori, velocity, joint_pos, joint_vel,
    jac,
):  # fmt: skip
    """:func:`control_step` with robosuite's own functions and operations in robosuite's order: the same bits.

    Only for a base that stands square in the world: its rotation is left out, which is exact then.
    """
    jac_pos, jac_rot = jac[:3], jac[3:]
    jac_p, jac_r = np.empty((3, ARM)), np.empty((3, ARM))
    # robosuite's mass matrix comes out of its indexing in Fortran order, and the order decides how BLAS adds up
    mass_f = np.empty((ARM, ARM)).T
    origin, wrench = np.empty(3), np.empty(6)

    for substep in range(substeps):
        _step1(model, data)
        for i in range(3):
            origin[i] = site_pos[base_site, i]
        if fresh[0] != 0:
            _jac_site(model, data, jac_pos.ctypes, jac_rot.ctypes, grip_site)
            velocity[:3] = np.dot(jac_pos, qvel)
            velocity[3:] = np.dot(jac_rot, qvel)
            for i in range(6):
                for k in range(ARM):
                    jacobian[i, k] = jac[i, arm_dof[k]]
            for i in range(3):
                pose_pos[i] = site_pos[grip_site, i]
                for j in range(3):
                    pose_ori[i, j] = site_mat[grip_site, 3 * i + j]
            for i in range(ARM):
                joint_pos[i] = qpos[arm_qpos[i]]
                joint_vel[i] = qvel[arm_dof[i]]
            _arm_inertia(inertia, madr, parent, arm_dof, mass)
        fresh[0] = 1
        jac_p[:], jac_r[:] = jacobian[:3], jacobian[3:]
        mass_f[:] = mass

        if substep == 0 and new_goal:
            goal_pos[:] = (pose_pos - origin) + shift
            goal_ori[:] = np.dot(turn, pose_ori)
            for i in range(finger_goal.shape[0]):
                step = finger_sign[i] * finger_speed * grip
                finger_goal[i] = min(max(finger_goal[i] + step, -1.0), 1.0)

        force = ((origin + goal_pos) - pose_pos) * gains[0, :3] + (-velocity[:3]) * gains[1, :3]
        turning = orientation_error(goal_ori, pose_ori) * gains[0, 3:] + (-velocity[3:]) * gains[1, 3:]
        _, lambda_pos, lambda_ori, null = opspace_matrices(mass_f, jacobian, jac_p, jac_r)
        wrench[:3] = np.dot(lambda_pos, force)
        wrench[3:] = np.dot(lambda_ori, turning)
        torque = np.dot(jacobian.T, wrench)
        for i in range(ARM):
            torque[i] += bias[arm_dof[i]]
        torque += nullspace_torques(mass_f, null, rest, joint_pos, joint_vel)
        for i in range(ARM):
            ctrl[arm_ctrl[i]] = min(max(torque[i], limits[0, arm_ctrl[i]]), limits[1, arm_ctrl[i]])
        for i in range(finger_ctrl.shape[0]):
            lo, hi = limits[0, finger_ctrl[i]], limits[1, finger_ctrl[i]]
            value = 0.5 * (hi + lo) + 0.5 * (hi - lo) * finger_goal[i]
            ctrl[finger_ctrl[i]] = min(max(value, lo), hi)
        _step2(model, data)
