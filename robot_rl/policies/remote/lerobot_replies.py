"""What LeRobot's asynchronous server answers, read as data.

The server answers with a pickle, and a pickle is a program. Here it is only ever read: opcode after opcode, of a short list, by an
interpreter that builds lists, tuples, dicts, numbers and strings, and writes down calls without making them. Nothing is imported and
nothing is called. Of what comes out exactly one thing is accepted: a list of ``lerobot.async_inference.helpers.TimedAction`` whose
actions are rows of numbers, as ``pickle.dumps`` writes them with torch (``torch._utils._rebuild_tensor_v2`` of a storage that
``torch.save`` wrote in its first format: four small pickles, a length, the numbers). Everything else is a ValueError that says what
was found; an opcode's argument is not even decoded before the opcode is known.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

MAX_BYTES = 64 << 20
MAX_ROWS = 1024
MAX_WIDTH = 4096
MAX_OPCODES = 80 * MAX_ROWS  # a row takes about 45
MAX_INNER_OPCODES = 64
MAX_DEPTH = 32  # open marks


class Name(NamedTuple):
    """A name that the pickle would import."""

    module: str
    name: str

    def __str__(self) -> str:
        return ascii(f"{self.module}.{self.name}"[:120])


@dataclass(eq=False)
class Call:
    """A call that the pickle would make, and the state that it would set on the result."""

    name: Name
    args: tuple[Any, ...]
    state: Any = None


@dataclass(eq=False)
class Persistent:
    """An object that the pickle would ask its loader for."""

    key: Any


TIMED_ACTION = Name("lerobot.async_inference.helpers", "TimedAction")
TENSOR = Name("torch._utils", "_rebuild_tensor_v2")
STORAGE = Name("torch.storage", "_load_from_bytes")
NO_HOOKS = Name("collections", "OrderedDict")
_OPCODES = {o.code.encode("latin-1"): o for o in pickletools.opcodes}
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of torch.save's first format
_NUMBERS = {"FloatStorage": "<f4", "DoubleStorage": "<f8", "HalfStorage": "<f2", "BFloat16Storage": "<u2"}


def read_chunk(data: bytes) -> tuple[int, np.ndarray]:
    """The first action's timestep, and the actions (N, A) float32.

    Raises:
        ValueError: it is anything but LeRobot's timed actions with successive timesteps.
    """
    if len(data) > MAX_BYTES:
        raise ValueError(f"{len(data)} bytes; accepted are at most {MAX_BYTES}")
    stream = io.BytesIO(data)
    found = read_inert(stream, MAX_OPCODES)
    _need(stream.tell() == len(data), "bytes behind the pickle's end")
    _need(type(found) is list and 1 <= len(found) <= MAX_ROWS, f"{_what(found)} for 1 to {MAX_ROWS} timed actions")
    storages: dict[bytes, np.ndarray] = {}  # every row of a chunk comes with the storage of the whole chunk
    first, rows = 0, []
    for i, action in enumerate(found):
        state = _call(action, TIMED_ACTION, 0, stateful=True).state
        keys = {"timestamp", "timestep", "action"}
        _need(type(state) is dict and state.keys() == keys, f"{_what(state)} for the fields of a timed action")
        _need(type(state["timestamp"]) in (int, float), f"timestamp is {_what(state['timestamp'])}")
        _need(type(state["timestep"]) is int, f"timestep is {_what(state['timestep'])}")
        first = first if i else state["timestep"]
        _need(state["timestep"] == first + i, "the timesteps do not follow one another")
        rows.append(_row(state["action"], storages))
        _need(len(rows[-1]) == len(rows[0]), f"action {i} has {len(rows[-1])} numbers, the first has {len(rows[0])}")
    with np.errstate(over="ignore"):  # beyond float32 is infinite, and refused as that by whoever asked
        return first, np.stack([row.astype(np.float32) for row in rows])


def _row(tensor: Any, storages: dict[bytes, np.ndarray]) -> np.ndarray:
    """A view of (A,) numbers."""
    storage, offset, size, stride, gradient, hooks = _call(tensor, TENSOR, 6).args
    (data,) = _call(storage, STORAGE, 1).args
    _call(hooks, NO_HOOKS, 0)
    _need(type(data) is bytes, f"a storage of {_what(data)}")
    _need(gradient is False, "an action with a gradient")
    for name, value in (("size", size), ("stride", stride)):
        _need(type(value) is tuple and len(value) == 1, f"an action's {name} is {_what(value)}; accepted is one row of numbers")
    numbers = (offset, size[0], stride[0])
    _need(all(type(n) is int and 0 <= n < MAX_BYTES for n in numbers), "an action's offset, size or stride is no small number")
    _need(1 <= size[0] <= MAX_WIDTH, f"an action of {size[0]} numbers; accepted are 1 to {MAX_WIDTH}")
    if data not in storages:
        storages[data] = _storage(data)
    whole = storages[data]
    last = offset + (size[0] - 1) * stride[0]
    _need(last < len(whole), f"an action ends at {last} of a storage of {len(whole)}")
    return whole[offset + stride[0] * np.arange(size[0])]


def _storage(data: bytes) -> np.ndarray:
    stream = io.BytesIO(data)
    _need(data[:2] == b"\x80\x02", "a storage that is not of torch.save's first format, which is what tensors are pickled with")
    _need(read_inert(stream, 4) == _MAGIC and read_inert(stream, 4) == _PROTOCOL, "a storage of an unknown format")
    machine = read_inert(stream, MAX_INNER_OPCODES)
    _need(type(machine) is dict and machine.get("little_endian") is True, "a storage that is not little endian")
    described, keys = read_inert(stream, MAX_INNER_OPCODES), read_inert(stream, MAX_INNER_OPCODES)
    about = described.key if type(described) is Persistent else None
    _need(type(about) is tuple and len(about) == 6, f"{_what(described)} for a storage")
    tag, kind, key, device, count, view = about  # type: ignore[misc]
    _need(tag == "storage" and view is None and type(key) is str, "a storage that is part of another")
    _need(type(kind) is Name and kind.module == "torch" and kind.name in _NUMBERS, f"numbers of {_what(kind)}")
    _need(device == "cpu", f"a storage on {_what(device)}; accepted is cpu")
    _need(type(keys) is list and len(keys) == 1 and type(keys[0]) is str and keys[0] == key, "more than one storage")
    dtype = np.dtype(_NUMBERS[kind.name])
    length = int.from_bytes(stream.read(8), "little", signed=True)
    left = len(data) - stream.tell()
    _need(type(count) is int and count == length and length * dtype.itemsize == left, f"{left} bytes for a storage of {length}")
    found = np.frombuffer(data, dtype, length, len(data) - left)
    if kind.name == "BFloat16Storage":  # the upper half of a float32
        return (found.astype("<u4") << 16).view("<f4")
    return found


def _call(value: Any, name: Name, args: int, *, stateful: bool = False) -> Call:
    """``value`` where it is that call with so many arguments."""
    _need(type(value) is Call and value.name == name, f"{_what(value)} for {name}")
    _need(len(value.args) == args and (stateful or value.state is None), f"{name} with {len(value.args)} arguments or a state")
    return value


def _need(good: bool, otherwise: str) -> None:
    if not good:
        raise ValueError(otherwise)


def _what(value: Any) -> str:
    """Never longer than a line, whatever it is: containers may hold themselves."""
    if isinstance(value, Call):
        return f"a call of {value.name}"
    if isinstance(value, Name):
        return f"the name {value}"
    if isinstance(value, Persistent):
        return "a persistent object"
    if isinstance(value, str):
        return f"the text {value[:60]!a}"
    if isinstance(value, (list, tuple, dict, bytes)):
        return f"{type(value).__name__} of {len(value)}"
    return type(value).__name__


# ---- the interpreter


def read_inert(stream: io.BytesIO, most: int) -> Any:
    """One pickle of at most ``most`` opcodes from ``stream``, as inert values; the stream is left behind its end.

    Raises:
        ValueError: an opcode that is not on the list, or one that does not fit what came before.
    """
    machine = _Machine()
    for count in range(most):
        code = stream.read(1)
        known = _OPCODES.get(code)
        if known is None:
            raise ValueError(f"opcode {code!r} at byte {stream.tell() - len(code)}" if code else "a pickle without an end")
        if count == 0 and known.name != "PROTO":
            raise ValueError("no pickle of protocol 2 or later")
        if known.name == "STOP":
            return machine.result()
        act = _ACTS.get(known.name)
        if act is None:
            raise ValueError(f"opcode {known.name} at byte {stream.tell() - 1}, which timed actions have no need of")
        if known.name == "GLOBAL":
            act(machine, (_line(stream), _line(stream)))
        else:
            act(machine, None if known.arg is None else known.arg.reader(stream))
    raise ValueError(f"more than {most} opcodes")


def _line(stream: io.BytesIO) -> str:
    """Half a name, as it stands there; pickletools would warn of backslashes in it."""
    line = stream.readline()
    if not line.endswith(b"\n"):
        raise ValueError("a name without an end")
    return line[:-1].decode("ascii")


class _Machine:
    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def result(self) -> Any:
        if len(self.stack) != 1 or self.below:
            raise ValueError(f"a pickle that ends with {len(self.stack)} values")
        return self.stack[0]

    def pop(self) -> Any:
        if not self.stack:
            raise ValueError("a pickle that takes from an empty stack")
        return self.stack.pop()

    def top(self, kind: type) -> Any:
        if not self.stack or type(self.stack[-1]) is not kind:
            raise ValueError(f"a pickle that adds to {_what(self.stack[-1]) if self.stack else 'nothing'}")
        return self.stack[-1]

    def since_mark(self) -> list[Any]:
        if not self.below:
            raise ValueError("a pickle that misses a mark")
        items, self.stack = self.stack, self.below.pop()
        return items

    def protocol(self, number: int) -> None:
        if not 2 <= number <= 5:
            raise ValueError(f"a pickle of protocol {number}; accepted are 2 to 5")

    def mark(self, _: Any) -> None:
        if len(self.below) >= MAX_DEPTH:
            raise ValueError(f"a pickle that nests deeper than {MAX_DEPTH}")
        self.below.append(self.stack)
        self.stack = []

    def put(self, index: int) -> None:
        value = self.pop()
        self.memo[index] = value
        self.stack.append(value)

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise ValueError(f"a pickle that recalls {index}, which it never kept")
        self.stack.append(self.memo[index])

    def tuple_of(self, count: int) -> None:
        items = [self.pop() for _ in range(count)]
        self.stack.append(tuple(reversed(items)))

    def extend(self, items: list[Any]) -> None:
        self.top(list).extend(items)

    def update(self, items: list[Any]) -> None:
        keys, values = items[::2], items[1::2]
        if len(keys) != len(values) or any(type(k) is not str for k in keys):
            raise ValueError("a dict whose keys are not all text")
        self.top(dict).update(zip(keys, values, strict=True))

    def name(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise ValueError(f"a name made of {_what(module)} and {_what(name)}")
        self.stack.append(Name(module, name))

    def call(self, _: Any) -> None:
        args, name = self.pop(), self.pop()
        if type(name) is not Name or type(args) is not tuple:
            raise ValueError(f"a call of {_what(name)} with {_what(args)}")
        self.stack.append(Call(name, args))

    def build(self, _: Any) -> None:
        state = self.pop()
        made = self.top(Call)
        if made.state is not None:
            raise ValueError(f"{made.name} is given its state twice")
        made.state = state


def _value(machine: _Machine, value: Any) -> None:
    machine.stack.append(value)


_Act = Callable[[_Machine, Any], None]
_ACTS: dict[str, _Act] = {
    "PROTO": _Machine.protocol,
    "FRAME": lambda m, _: None,
    "MARK": _Machine.mark,
    "MEMOIZE": lambda m, _: m.put(len(m.memo)),
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    **dict.fromkeys(
        ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "SHORT_BINUNICODE", "BINUNICODE", "SHORT_BINBYTES", "BINBYTES"),
        _value,
    ),
    "BINBYTES8": _value,
    "NONE": lambda m, _: m.stack.append(None),
    "NEWTRUE": lambda m, _: m.stack.append(True),
    "NEWFALSE": lambda m, _: m.stack.append(False),
    "EMPTY_LIST": lambda m, _: m.stack.append([]),
    "EMPTY_TUPLE": lambda m, _: m.stack.append(()),
    "EMPTY_DICT": lambda m, _: m.stack.append({}),
    "TUPLE1": lambda m, _: m.tuple_of(1),
    "TUPLE2": lambda m, _: m.tuple_of(2),
    "TUPLE3": lambda m, _: m.tuple_of(3),
    "TUPLE": lambda m, _: _value(m, tuple(m.since_mark())),
    "APPEND": lambda m, _: m.extend([m.pop()]),
    "APPENDS": lambda m, _: m.extend(m.since_mark()),
    "SETITEM": lambda m, _: m.update([m.pop(), m.pop()][::-1]),
    "SETITEMS": lambda m, _: m.update(m.since_mark()),
    "GLOBAL": lambda m, lines: m.name(*lines),
    "STACK_GLOBAL": lambda m, _: m.name(*[m.pop(), m.pop()][::-1]),
    "REDUCE": _Machine.call,
    "NEWOBJ": _Machine.call,
    "BUILD": _Machine.build,
    "BINPERSID": lambda m, _: m.stack.append(Persistent(m.pop())),
}
