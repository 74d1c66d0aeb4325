"""Builds from the ``[project]`` table, also where setuptools cannot see pyproject.toml.

A colcon symlink build links this file, the packages and the data files into its build folder, but not pyproject.toml; so
the table is read from the folder this file really lies in and handed to ``setup()``. There is one source of metadata.
"""

import os
import sys
from pathlib import Path

from setuptools import find_packages, setup

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NAME = PROJECT["name"]


def data_tree(folder: str) -> list[tuple[str, list[str]]]:
    """Every file under ``folder`` with the place it is installed to; source paths are relative, as setuptools wants them."""
    found = []
    for path, folders, files in os.walk(ROOT / folder):
        folders[:] = sorted(f for f in folders if f != "__pycache__" and not f.startswith("."))
        here = Path(path).relative_to(ROOT).as_posix()
        wanted = sorted(f"{here}/{f}" for f in files if not f.startswith(".") and not f.endswith((".pyc", "~")))
        if wanted:
            found.append((f"share/{NAME}/{here}", wanted))
    return found


setup(
    name=NAME,
    version=PROJECT["version"],
    description=PROJECT["description"],
    license=PROJECT["license"],
    python_requires=PROJECT["requires-python"],
    packages=find_packages(str(ROOT), include=[NAME, f"{NAME}.*"]),
    package_data={NAME: ["py.typed", "**/*.html", "**/*.css", "**/*.js", "**/*.svg"]},
    install_requires=PROJECT["dependencies"],
    extras_require=PROJECT["optional-dependencies"],
    entry_points={"console_scripts": [f"{name} = {target}" for name, target in PROJECT["scripts"].items()]},
    data_files=[
        ("share/ament_index/resource_index/packages", [f"resource/{NAME}"]),
        (f"share/{NAME}", ["package.xml"]),
        *data_tree("launch"),
        *data_tree("configs"),
        *data_tree("sim_assets"),
    ],
    zip_safe=False,
)
