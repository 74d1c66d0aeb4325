"""What goes wrong between a robot and the computer its policy runs on."""

from __future__ import annotations

MOST = 1000
"""Characters of a message."""


class PolicyUnavailable(ConnectionError):
    """No decision now: the policy's computer is gone, silent, or answers nonsense. The robot holds; the next call tries again.

    Whatever that computer said is one line here, and not a long one: it goes into logs, and a stranger may have written it.
    """

    def __init__(self, why: str) -> None:
        line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in why[:MOST])
        super().__init__(line + ("..." if len(why) > MOST else ""))


class MessageError(ValueError):
    """Bytes that are no message of this protocol."""
