"""The arbiter's states and the only transitions there are between them."""

from __future__ import annotations

from enum import Enum


class State(str, Enum):
    AUTONOMOUS = "autonomous"
    REQUESTED = "requested"
    HUMAN = "human"
    HANDBACK = "handback"
    ESTOP = "estop"


class Event(str, Enum):
    """What can happen. Whether a condition holds (aligned, held, neutral) is settled before an event is raised."""

    ENGAGE = "engage"  # a rate device, or an absolute one that is aligned
    ENGAGE_ABSOLUTE = "engage_absolute"  # an absolute device whose alignment still has to be checked
    ALIGNED = "aligned"  # ... was checked
    HELP = "help"  # the policy or a monitor asks for a person
    CANCEL = "cancel"  # of a request during which the policy went on; also its time-out
    CANCEL_HELD = "cancel_held"  # of a request during which the robot was held
    RELEASED = "released"  # and the latch is over
    BLENDED = "blended"  # the blend is over and a fresh chunk runs
    ESTOP = "estop"
    RESET = "reset"  # explicit, device neutral, more than a second after the stop


TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.AUTONOMOUS, Event.ENGAGE): State.HUMAN,
    (State.AUTONOMOUS, Event.ENGAGE_ABSOLUTE): State.REQUESTED,
    (State.AUTONOMOUS, Event.HELP): State.REQUESTED,
    (State.REQUESTED, Event.ENGAGE): State.HUMAN,
    (State.REQUESTED, Event.ALIGNED): State.HUMAN,
    (State.REQUESTED, Event.CANCEL): State.AUTONOMOUS,
    (State.REQUESTED, Event.CANCEL_HELD): State.HANDBACK,
    (State.HUMAN, Event.RELEASED): State.HANDBACK,
    (State.HANDBACK, Event.ENGAGE): State.HUMAN,
    (State.HANDBACK, Event.BLENDED): State.AUTONOMOUS,
    (State.ESTOP, Event.RESET): State.REQUESTED,
    **{(state, Event.ESTOP): State.ESTOP for state in State},
}
"""Everything else is ignored, and counted."""


def next_state(state: State, event: Event) -> State | None:
    """The state after ``event``, or None where it is ignored."""
    return TRANSITIONS.get((state, event))
