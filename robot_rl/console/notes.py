"""What people wrote down and did during a session: one line each, appended, never changed."""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

FILE = "notes.jsonl"


@dataclass(frozen=True)
class Note:
    """``note``: a person's words; ``event``: what they asked the session for."""

    stamp_ns: int
    who: str
    text: str
    kind: Literal["note", "event"] = "note"
    episode: str = ""


class Notes:
    """The last ones in memory, all of them in ``notes.jsonl``."""

    def __init__(self, folder: Path, keep: int = 200) -> None:
        self.path = folder / FILE
        self._guard = threading.Lock()
        self._last: deque[Note] = deque(maxlen=keep)
        self.number = 0
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines()[-keep:]:
                try:
                    self._last.append(Note(**json.loads(line)))
                except (ValueError, TypeError):
                    continue  # cut by a crash

    def add(self, who: str, text: str, kind: Literal["note", "event"] = "note", episode: str = "") -> Note:
        """Durable once the disk says so. Raises OSError when it does not."""
        note = Note(time.time_ns(), who, text, kind, episode)
        with self._guard:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(note), ensure_ascii=False) + "\n")
            self._last.append(note)
            self.number += 1
        return note

    def last(self, most: int = 100) -> list[Note]:
        """Newest first."""
        with self._guard:
            return list(self._last)[::-1][:most]
