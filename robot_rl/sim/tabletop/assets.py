"""Where the MJCF scenes lie: in a checkout, in an installed package, or where ``ROBOT_RL_ASSETS`` points."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

ASSETS_VARIABLE = "ROBOT_RL_ASSETS"


def scene_path(relative: str) -> Path:
    """Path of ``sim_assets/<relative>``.

    Raises:
        FileNotFoundError: in none of the places that are searched (the message lists them).
    """
    package = Path(__file__).resolve().parents[2]
    roots = [
        package.parent / "sim_assets",
        package / "sim_assets",
        Path(sysconfig.get_path("data")) / "share/robot_rl/sim_assets",
    ]
    if os.environ.get(ASSETS_VARIABLE):
        roots.insert(0, Path(os.environ[ASSETS_VARIABLE]))
    for root in roots:
        if (root / relative).is_file():
            return root / relative
    searched = ", ".join(str(r) for r in roots)
    raise FileNotFoundError(f"scene {relative!r} not found in {searched}; set {ASSETS_VARIABLE} to the folder sim_assets")
