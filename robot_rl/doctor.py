"""``robot-rl doctor``: what this machine has, what stands in the way, and the command that mends it.

Every check runs even when another one fails; a check that itself breaks is reported as an error rather than raised.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ACCEPTED_PYTHON = ((3, 10), (3, 11), (3, 12))
CV2_PROVIDERS = ("opencv-python", "opencv-python-headless", "opencv-contrib-python", "opencv-contrib-python-headless")
CV2_WANTED = "opencv-python-headless==4.11.0.86"
GL_PACKAGES = {"egl": "libegl1 libgl1 libgles2", "osmesa": "libosmesa6 libgl1", "glfw": "libgl1 libglfw3"}
RENDER = """
import time
import mujoco
model = mujoco.MjModel.from_xml_string(
    "<mujoco><visual><quality offsamples='0' shadowsize='0'/></visual><worldbody><light pos='0 0 3'/>"
    "<geom type='sphere' size='.3' rgba='1 0 0 1'/></worldbody></mujoco>")
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
with mujoco.Renderer(model, 64, 64) as renderer:
    renderer.update_scene(data)
    image = renderer.render()
    start = time.perf_counter()
    for _ in range(10):
        renderer.update_scene(data)
        renderer.render()
    assert image.min() != image.max(), "the picture is blank"
    print((time.perf_counter() - start) * 100)
"""


@dataclass(frozen=True)
class Finding:
    """``level`` ok: nothing to do; warn: it works, not well; error: it will not work. ``fix`` is a command or a sentence."""

    level: Literal["ok", "warn", "error"]
    check: str
    text: str
    fix: str = ""


def choose_gl() -> str:
    """Set ``MUJOCO_GL`` where nobody did and there is no display: ``egl`` when its library is there.

    Must run before ``mujoco`` is imported. Returns the value in force, empty for MuJoCo's own choice.
    """
    if "MUJOCO_GL" not in os.environ and sys.platform.startswith("linux") and not os.environ.get("DISPLAY"):
        for backend, library in (("egl", "libEGL.so.1"), ("osmesa", "libOSMesa.so.8")):
            if has_library(library):
                os.environ["MUJOCO_GL"] = backend
                break
    return os.environ.get("MUJOCO_GL", "")


def has_library(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def check_python() -> Iterator[Finding]:
    version = sys.version_info[:2]
    text = f"Python {sys.version.split()[0]} at {sys.executable}"
    if version in ACCEPTED_PYTHON:
        yield Finding("ok", "python", text)
    else:
        yield Finding("error", "python", f"{text}; robot_rl needs 3.10, 3.11 or 3.12", "python3 bootstrap setup")
    if sys.prefix == sys.base_prefix and not os.environ.get("CONDA_PREFIX") and not Path("/.dockerenv").exists():
        yield Finding("warn", "python", "no virtual environment is active", "python3 bootstrap setup")


def check_packages() -> Iterator[Finding]:
    try:
        required = importlib.metadata.requires("robot_rl") or []
        own = importlib.metadata.version("robot_rl")
    except importlib.metadata.PackageNotFoundError:
        yield Finding("error", "packages", "robot_rl is importable but not installed", "python3 bootstrap setup")
        return
    from packaging.requirements import Requirement

    wrong = 0
    for line in required:
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = _version(requirement.name)
        if version is None and requirement.name == "opencv-python" and _version("opencv-python-headless"):
            continue  # one provider of cv2 is enough
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            wrong += 1
            have = f"{requirement.name} {version}" if version else f"{requirement.name} is not installed"
            wanted = f"{requirement.name}{requirement.specifier}"
            yield Finding("error", "packages", f"{have}; {wanted} is needed", f"{sys.executable} -m pip install '{wanted}'")
    names = ("torch", "lerobot", "mujoco", "robosuite", "zarr", "numpy")
    versions = ", ".join(f"{n} {_version(n) or 'absent'}" for n in names)
    if not wrong:
        yield Finding("ok", "packages", f"robot_rl {own}; {versions}")


def check_cv2() -> Iterator[Finding]:
    found = {name: version for name in CV2_PROVIDERS if (version := _version(name))}
    listed = ", ".join(f"{n} {v}" for n, v in found.items())
    if len(set(found.values())) > 1:
        pip = f"{sys.executable} -m pip"
        fix = f"{pip} uninstall -y {' '.join(found)} && {pip} install {CV2_WANTED}"
        yield Finding("error", "cv2", f"several providers of cv2 wrote over one another: {listed}", fix)
    elif found:
        yield Finding("ok", "cv2", listed)
    else:
        yield Finding("error", "cv2", "no package provides cv2", f"{sys.executable} -m pip install {CV2_WANTED}")


def check_torch() -> Iterator[Finding]:
    if importlib.util.find_spec("torch") is None:
        yield Finding("error", "torch", "torch is not installed", "python3 bootstrap setup")
        return
    import torch

    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        yield Finding("ok", "torch", f"torch {torch.__version__}, CUDA {torch.version.cuda}: {names}")
    elif shutil.which("nvidia-smi") and subprocess.run(["nvidia-smi"], capture_output=True, timeout=30).returncode == 0:
        text = f"torch {torch.__version__} sees no GPU although nvidia-smi does (built for CUDA {torch.version.cuda})"
        fix = (
            "nvidia-smi  # the driver must be new enough for that CUDA version; update it, or install a torch for an older one"
        )
        yield Finding("warn", "torch", text, fix)
    else:
        yield Finding("ok", "torch", f"torch {torch.__version__} on CPU; no NVIDIA GPU")


def check_gl() -> Iterator[Finding]:
    if importlib.util.find_spec("mujoco") is None:
        yield Finding("error", "gl", "mujoco is not installed", "python3 bootstrap setup")
        return
    backends = ["egl", "osmesa"] if sys.platform.startswith("linux") else []
    if os.environ.get("DISPLAY") or sys.platform == "darwin":
        backends.append("glfw")
    results = {backend: render_once(backend) for backend in backends}
    works = {b: r for b, r in results.items() if isinstance(r, float)}
    for backend, milliseconds in works.items():
        yield Finding("ok", "gl", f"{backend} renders ({milliseconds:.1f} ms for 64x64)")
    chosen = os.environ.get("MUJOCO_GL", "").lower()
    if chosen and chosen not in works and chosen in results:
        fix = f"export MUJOCO_GL={next(iter(works))}" if works else f"sudo apt-get install {GL_PACKAGES[chosen]}"
        yield Finding("error", "gl", f"MUJOCO_GL={chosen} does not render: {results[chosen]}", fix)
    elif not works:
        reasons = "; ".join(f"{b}: {r}" for b, r in results.items())
        yield Finding(
            "error",
            "gl",
            f"nothing renders, so no cameras and no videos ({reasons})",
            f"sudo apt-get install {GL_PACKAGES['egl']}",
        )


def render_once(backend: str, timeout: float = 90.0) -> float | str:
    """Milliseconds for one picture in a process of its own (a broken driver may crash it), or what went wrong."""
    environment = {**os.environ, "MUJOCO_GL": backend, "PYOPENGL_PLATFORM": backend if backend != "glfw" else ""}
    if backend == "glfw":
        environment.pop("PYOPENGL_PLATFORM")
    try:
        done = subprocess.run([sys.executable, "-c", RENDER], env=environment, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return f"no picture within {timeout:.0f} s"
    if done.returncode == 0:
        return float(done.stdout.split()[-1])
    lines = [line for line in done.stderr.strip().splitlines() if line and not line.startswith((" ", "Exception ignored"))]
    return lines[-1] if lines else f"the process died with code {done.returncode}"


def check_ros() -> Iterator[Finding]:
    prefixes = [p for p in os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep) if p]
    try:
        spec = importlib.util.find_spec("rclpy")
    except (ImportError, ValueError):
        spec = None
    installed = (d.name or "" for d in importlib.metadata.distributions())
    wheels = sorted({name for name in installed if name.startswith("ros-") and name.endswith("rclpy")})
    if spec is None or spec.origin is None:
        if prefixes:
            version = ".".join(map(str, sys.version_info[:2]))
            text = f"a ROS workspace is sourced ({prefixes[0]}) but Python {version} does not see its rclpy"
            fix = "use the Python of that ROS release: python3.12 -m venv --system-site-packages .venv (Jazzy)"
            yield Finding("warn", "ros", text, fix)
        else:
            yield Finding(
                "ok", "ros", "no ROS; needed only for a robot (extra 'ros' for simulation, apt or RoboStack on a robot)"
            )
        return
    origin = Path(spec.origin).resolve()
    sourced = next((p for p in prefixes if _provides_rclpy(Path(p))), None)
    from_sourced = sourced is not None and origin.is_relative_to(Path(sourced).resolve())
    if wheels and sourced:
        text = f"two ROS that would mix: wheels ({', '.join(wheels)}) and the sourced {sourced}; rclpy is from {origin.parent}"
        fix = f"start a shell that sources no ROS setup file, or: {sys.executable} -m pip uninstall -y {' '.join(wheels)}"
        yield Finding("error", "ros", text, fix)
        return
    if sourced and not from_sourced:
        fix = "start a shell in which no ROS setup file is sourced, or remove that rclpy"
        yield Finding("error", "ros", f"rclpy comes from {origin.parent}, not from the sourced {sourced}", fix)
        return
    if os.environ.get("_ROS_WHEELS_BOOTSTRAP_COMPLETE") and not os.environ.get("LD_LIBRARY_PATH"):
        text = "_ROS_WHEELS_BOOTSTRAP_COMPLETE is set without LD_LIBRARY_PATH: inherited from another environment's Python"
        yield Finding("error", "ros", text, "unset _ROS_WHEELS_BOOTSTRAP_COMPLETE")
        return
    imported = subprocess.run([sys.executable, "-c", "import rclpy"], capture_output=True, text=True, timeout=60)
    if imported.returncode:
        reason = (imported.stderr.strip().splitlines() or ["no reason given"])[-1]
        yield Finding(
            "error", "ros", f"import rclpy fails: {reason}", "source /opt/ros/jazzy/setup.bash, with that release's Python"
        )
        return
    yield Finding("ok", "ros", f"rclpy from {origin.parent}" + (f" (wheels {', '.join(wheels)})" if wheels else ""))


def check_ros_scripts(fix: bool = False) -> Iterator[Finding]:
    """``ros2 run`` looks in ``lib/robot_rl``; a plain pip install puts scripts into ``bin``."""
    if importlib.util.find_spec("ament_index_python") is None and not os.environ.get("AMENT_PREFIX_PATH"):
        return
    try:
        entries = importlib.metadata.distribution("robot_rl").entry_points
    except importlib.metadata.PackageNotFoundError:
        return
    folder = Path(sys.prefix) / "lib" / "robot_rl"
    scripts = [e.name for e in entries if e.group == "console_scripts" and (Path(sys.prefix) / "bin" / e.name).exists()]
    absent = [name for name in scripts if not (folder / name).exists()]
    if absent and fix:
        folder.mkdir(parents=True, exist_ok=True)
        for name in absent:
            (folder / name).symlink_to(Path("..") / ".." / "bin" / name)
        yield Finding("ok", "ros2 run", f"linked {', '.join(absent)} into {folder}")
    elif absent:
        yield Finding(
            "warn", "ros2 run", f"`ros2 run robot_rl {absent[0]}` finds no executable in {folder}", "robot-rl doctor --fix"
        )
    elif scripts:
        yield Finding("ok", "ros2 run", f"{len(scripts)} executables in {folder}")


def check_disk(path: str | os.PathLike[str] = ".") -> Iterator[Finding]:
    folder = Path(path).resolve()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / 2**30
    text = f"{free:.1f} GiB free in {folder}"
    if free < 1:
        yield Finding("error", "disk", text, f"free some space in {folder}, or set ROBOT_RL_RUNS to another disk")
    elif free < 10:
        yield Finding("warn", "disk", f"{text}; image stores need more", "set ROBOT_RL_RUNS to a larger disk")
    else:
        yield Finding("ok", "disk", text)
    try:
        times = []
        with tempfile.TemporaryFile(dir=folder) as file:
            for _ in range(15):
                file.write(b"x" * 4096)
                file.flush()
                start = time.perf_counter()
                os.fsync(file.fileno())
                times.append(1e3 * (time.perf_counter() - start))
    except OSError as error:
        yield Finding("error", "disk", f"{folder} cannot be written: {error}", f"sudo chown -R $USER {folder}")
        return
    middle = statistics.median(times)
    if middle > 100:
        text = f"fsync takes {middle:.0f} ms (median); episodes will be slow to commit"
        yield Finding("warn", "disk", text, "set ROBOT_RL_RUNS to a local disk rather than a network or flash drive")
    else:
        yield Finding("ok", "disk", f"fsync takes {middle:.1f} ms (median of 15)")


def check_cpu() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_cores()
    usable = min(cores, quota) if quota else cores
    threads = os.environ.get("OMP_NUM_THREADS", "")
    text = f"{usable:g} of {os.cpu_count()} cores usable" + (f", OMP_NUM_THREADS={threads}" if threads else "")
    if threads.isdigit() and int(threads) > usable:
        yield Finding("warn", "cpu", f"{text}: more threads than cores", f"export OMP_NUM_THREADS={max(1, int(usable))}")
    elif quota and quota < cores and not threads:
        text = f"{text}: the container allows {quota:g}, but libraries will start {cores} threads"
        yield Finding("warn", "cpu", text, f"export OMP_NUM_THREADS={max(1, int(quota))}")
    else:
        yield Finding("ok", "cpu", text)
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (ValueError, OSError):
        return
    if memory < 4:
        yield Finding("warn", "memory", f"{memory:.1f} GiB; training wants 4", "lower the replay capacity and worker counts")
    else:
        yield Finding("ok", "memory", f"{memory:.1f} GiB of memory")


def examine(path: str | os.PathLike[str] = ".", *, fix: bool = False) -> list[Finding]:
    """Run every check. ``path`` is where runs will be written; ``fix`` mends what needs no rights."""
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("python", check_python),
        ("packages", check_packages),
        ("cv2", check_cv2),
        ("torch", check_torch),
        ("gl", check_gl),
        ("ros", check_ros),
        ("ros2 run", lambda: check_ros_scripts(fix)),
        ("disk", lambda: check_disk(path)),
        ("cpu", check_cpu),
    ]
    findings: list[Finding] = []
    for name, check in checks:
        try:
            findings.extend(check())
        except Exception as error:
            findings.append(
                Finding("error", name, f"the check itself failed: {type(error).__name__}: {error}", "report this, please")
            )
    return findings


def render(findings: list[Finding]) -> str:
    """One line a finding and its fix below it; a count at the end."""
    width = max((len(f.check) for f in findings), default=0)
    lines = []
    for f in findings:
        lines.append(f"{f.level:5}  {f.check.ljust(width)}  {f.text}")
        if f.fix:
            lines.append(f"{'':5}  {'':{width}}  fix: {f.fix}")
    errors, warnings = (sum(f.level == level for f in findings) for level in ("error", "warn"))
    return "\n".join([*lines, f"{errors} errors, {warnings} warnings"])


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _provides_rclpy(prefix: Path) -> bool:
    return any(prefix.glob("lib/python3*/site-packages/rclpy")) or any(prefix.glob("local/lib/python3*/dist-packages/rclpy"))


def _cgroup_cores() -> float | None:
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else int(quota) / int(period)
