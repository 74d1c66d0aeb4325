"""What people said, one JSON object a line, appended while they say it: read back whole."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def read_lines(path: str | os.PathLike[str], parse: Callable[[Any], T], what: str) -> list[T]:
    """Every line of a file as ``parse`` makes it, oldest first; a last line that a crash cut is left out.

    Args:
        what: what a line should be, for the error.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is none of ours; the message names it.
    """
    out = []
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            out.append(parse(json.loads(line)))
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}:{number}: no {what} ({error})") from None
    return out
