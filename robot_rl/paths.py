"""Where ``configs/``, ``sim_assets/`` and ``launch/`` lie, in every way this package can be installed.

The order: the environment variable ``ROBOT_RL_SHARE``; the source tree (a checkout, an editable install, a colcon
symlink build); the ament share folder, when this very package was installed into an ament prefix; the ``share`` folder of
the prefix the package lies in; ``sys.prefix``. Only a folder that really holds our files is taken.
"""

from __future__ import annotations

import contextlib
import os
import site
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "robot_rl"
FOLDERS = ("configs", "sim_assets", "launch")


def _candidates() -> Iterator[Path]:
    if given := os.environ.get("ROBOT_RL_SHARE"):
        yield Path(given)
    package = Path(__file__).resolve().parent
    yield package.parent
    # The data this very copy was installed with comes first: it lies in <prefix>/lib/python3.x/site-packages/robot_rl.
    prefixes = [p for p in package.parents if (p / "share" / PACKAGE).is_dir()]
    yield from (p / "share" / PACKAGE for p in prefixes)
    try:
        from ament_index_python.packages import PackageNotFoundError, get_package_share_directory
    except ImportError:
        pass
    else:
        with contextlib.suppress(PackageNotFoundError, OSError):
            yield Path(get_package_share_directory(PACKAGE))
    yield Path(sys.prefix) / "share" / PACKAGE
    yield Path(site.getuserbase()) / "share" / PACKAGE


def share() -> Path:
    """The folder that holds ``configs/``, ``sim_assets/`` and ``launch/``.

    Raises:
        FileNotFoundError: none of the places has them; the message lists the places.
    """
    tried = []
    for candidate in _candidates():
        # `package.xml` tells our share folder from any other folder that happens to have a `configs/`.
        if (candidate / "package.xml").is_file() and (candidate / "configs").is_dir():
            return candidate
        tried.append(str(candidate))
    raise FileNotFoundError(
        "robot_rl's configs/ and sim_assets/ were not found; looked in: "
        + ", ".join(dict.fromkeys(tried))
        + ". Reinstall the package, or set ROBOT_RL_SHARE to a checkout."
    )


def find(folder: str, *parts: str) -> Path:
    """An existing file or folder that ships with the package, e.g. ``find("sim_assets", "arm", "arm.xml")``.

    Raises:
        ValueError: ``folder`` is not one of ``FOLDERS``.
        FileNotFoundError: no such file; the message lists what is there.
    """
    if folder not in FOLDERS:
        raise ValueError(f"folder={folder!r}: accepted are {', '.join(FOLDERS)}")
    path = share() / folder / Path(*parts) if parts else share() / folder
    if not path.exists():
        near = path.parent if path.parent.is_dir() else share() / folder
        there = sorted(p.name for p in near.iterdir()) if near.is_dir() else []
        raise FileNotFoundError(f"{path} does not exist; {near} holds {', '.join(there) or 'nothing'}")
    return path


def find_config(name: str | os.PathLike[str]) -> Path:
    """A configuration file by path, or by its name among the shipped ones (``quickstart``, ``configs/quickstart.yaml``).

    Raises:
        FileNotFoundError: neither a file nor a shipped configuration; the message lists the shipped ones.
    """
    given = Path(name).expanduser()
    if given.is_file():
        return given
    if not given.is_absolute():
        root = share()
        for candidate in (root / given, root / "configs" / given, root / "configs" / f"{given}.yaml"):
            if candidate.is_file():
                return candidate
        shipped = sorted(str(p.relative_to(root / "configs")) for p in (root / "configs").rglob("*.yaml"))
        raise FileNotFoundError(f"configuration {str(name)!r} not found; shipped ones are {', '.join(shipped) or 'none'}")
    raise FileNotFoundError(f"configuration {str(name)!r} not found")


def runs() -> Path:
    """Where runs go when nobody says otherwise: ``$ROBOT_RL_RUNS`` or ``./runs``."""
    return Path(os.environ.get("ROBOT_RL_RUNS", "runs"))


def recordings() -> Path:
    """Where recordings lie that are no part of the project: ``$ROBOT_RL_DATA``, else ``../shared/data`` beside a checkout."""
    given = os.environ.get("ROBOT_RL_DATA")
    return Path(given) if given else Path(__file__).resolve().parents[2] / "shared" / "data"


def find_recording(path: Path) -> Path:
    """``path`` as it stands, or else below :func:`recordings`.

    Raises:
        FileNotFoundError: it is in neither place.
    """
    for candidate in (path, recordings() / path):
        if candidate.exists():
            return candidate
    raise FileNotFoundError(
        f"recording {str(path)!r} is neither there nor in {recordings()}; set ROBOT_RL_DATA to the folder that holds it"
    )
