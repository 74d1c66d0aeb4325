"""What goes wrong between a robot and the computer its policy runs on."""

from __future__ import annotations


class PolicyUnavailable(ConnectionError):
    """No decision now: the policy's computer is gone, silent, or answers nonsense. The robot holds; the next call tries again."""


class MessageError(ValueError):
    """Bytes that are no message of this protocol."""
