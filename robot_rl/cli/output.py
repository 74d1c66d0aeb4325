"""What a verb prints at its end: a result or one clear error, for people or for machines."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import traceback
from typing import Any

from robot_rl.cli.progress import finite
from robot_rl.config import ConfigError
from robot_rl.training.interrupt import Interrupted

OK, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130
"""Exit codes: done; it went wrong while running; the command or configuration was refused; Ctrl-C."""


class UsageError(Exception):
    """The command line cannot be understood."""


def plain(value: Any) -> Any:
    """A result as JSON values: dataclasses, ``to_json()`` objects, paths and numpy scalars included."""
    if hasattr(value, "to_json"):
        return plain(value.to_json())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(v) for v in value]
    return finite(value)


def emit(result: Any, as_json: bool) -> None:
    """Print a verb's result: one JSON line ``{"event": "result", ...}``, or text (tables for lists of records)."""
    if as_json:
        data = plain(result)
        record = {"event": "result", **data} if isinstance(data, dict) else {"event": "result", "result": data}
        print(json.dumps(record, default=str), flush=True)
        return
    if result is None:
        return
    rows = [plain(r) for r in result] if isinstance(result, (list, tuple)) else None
    if rows is not None and (not rows or isinstance(rows[0], dict)):
        print(table(rows), flush=True)
    elif type(result).__str__ is not object.__str__ and not isinstance(result, dict):
        print(result, flush=True)
    else:
        data = plain(result)
        print("\n".join(f"{k}: {_cell(v)}" for k, v in data.items()) if isinstance(data, dict) else data, flush=True)


def table(rows: list[dict[str, Any]]) -> str:
    """Records as aligned columns, the first record's keys in their order."""
    if not rows:
        return "nothing"
    names = list(rows[0])
    cells = [names] + [[_cell(r.get(n)) for n in names] for r in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(names))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return json.dumps(value, default=str) if isinstance(value, (dict, list)) else str(value)


def report_error(error: BaseException, as_json: bool) -> int:
    """Say what went wrong in one message and return the exit code. ``ROBOT_RL_TRACEBACK=1`` adds the traceback."""
    refused = isinstance(error, (ConfigError, UsageError))
    interrupted = isinstance(error, (KeyboardInterrupt, Interrupted))
    code = INTERRUPTED if interrupted else REFUSED if refused else FAILED
    message = str(error) or type(error).__name__
    if isinstance(error, KeyError):  # its text is the bare key
        message = f"KeyError: {message}"
    if isinstance(error, ModuleNotFoundError):
        message += f" (python -m pip install 'robot_rl[{extra_for(error.name or '')}]')" if extra_for(error.name or "") else ""
    if interrupted:
        message = "interrupted; the same command goes on from the last checkpoint"
    if as_json:
        record: dict[str, Any] = {"event": "error", "type": type(error).__name__, "message": message, "exit_code": code}
        if isinstance(error, ConfigError):
            record["findings"] = [{"key": f.key, "accepted": f.accepted} for f in error.findings]
        print(json.dumps(record, default=str), flush=True)
    else:
        known = refused or interrupted or isinstance(error, (ValueError, OSError, RuntimeError, LookupError, ImportError))
        kind = "" if known else f"{type(error).__name__}: "
        hint = "" if known else "\n(ROBOT_RL_TRACEBACK=1 shows where)"
        print(f"robot-rl: {kind}{message}{hint}", file=sys.stderr, flush=True)
    if os.environ.get("ROBOT_RL_TRACEBACK") == "1" and not interrupted:
        traceback.print_exception(error)
    return code


EXTRAS = {
    "rclpy": "ros", "transformers": "vla", "peft": "vla", "ray": "scale", "accelerate": "scale", "starlette": "console",
    "uvicorn": "console", "websockets": "console",
}  # fmt: skip


def extra_for(module: str) -> str:
    """The extra that brings a module, or an empty string."""
    return EXTRAS.get(module.partition(".")[0], "")
