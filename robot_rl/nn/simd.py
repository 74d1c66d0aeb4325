"""A few words to write vector code in, compiled by LLVM when a process first needs it (a few tenths of a second).

Python here runs once, to emit instructions: a :class:`Int` is a 64-bit integer of the compiled program, ``with e.range(n) as i:``
one of its loops, ``e.load(address)`` one of its vectors. Compilers' own vectorisers give up on most of the loops of
:mod:`robot_rl.nn.kernels` (too many pointers that might overlap), and none keeps a tile of a matrix product in registers; so what the registers hold is
said explicitly. The order of additions is part of the program: equal input gives equal bits on equal processors.
"""

from __future__ import annotations

import ctypes
import math
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir

VECTOR_BYTES = 32
UNROLL = 4  # independent sums of a reduction: an addition takes four cycles
I64 = ir.IntType(64)
LANE = ir.IntType(32)
Body = Callable[["Int", list[Any]], list[Any]]


class Int:
    """An integer (or a truth) of the program that is being emitted."""

    def __init__(self, e: Emitter, value: Any) -> None:
        self.e, self.value = e, value

    def _both(self, other: Int | int, operation: str) -> Int:
        return Int(self.e, getattr(self.e.b, operation)(self.value, self.e.integer(other).value))

    def __add__(self, other: Int | int) -> Int:
        return self._both(other, "add")

    def __sub__(self, other: Int | int) -> Int:
        return self._both(other, "sub")

    def __mul__(self, other: Int | int) -> Int:
        return self._both(other, "mul")

    def __floordiv__(self, other: Int | int) -> Int:
        return self._both(other, "udiv")  # nothing here is negative

    def __and__(self, other: Int) -> Int:
        return self._both(other, "and_")

    def __invert__(self) -> Int:
        return Int(self.e, self.e.b.not_(self.value))

    def _compare(self, sign: str, other: Int | int) -> Int:
        return Int(self.e, self.e.b.icmp_signed(sign, self.value, self.e.integer(other).value))

    def __lt__(self, other: Int | int) -> Int:
        return self._compare("<", other)

    def __le__(self, other: Int | int) -> Int:
        return self._compare("<=", other)

    def __gt__(self, other: Int | int) -> Int:
        return self._compare(">", other)

    def is_(self, other: Int | int) -> Int:
        return self._compare("==", other)

    def min(self, other: Int | int) -> Int:
        return (self < other).choose(self, other)

    def max(self, other: Int | int) -> Int:
        return (self > other).choose(self, other)

    def choose(self, yes: Int | int, no: Int | int) -> Int:
        return Int(self.e, self.e.b.select(self.value, self.e.integer(yes).value, self.e.integer(no).value))


class Emitter:
    """Emits one function: integers and control flow, elements of one floating-point type, vectors of them."""

    def __init__(self, builder: ir.IRBuilder, element: str) -> None:
        self.b = builder
        self.scalar = ir.FloatType() if element == "float32" else ir.DoubleType()
        self.size = 4 if element == "float32" else 8
        self.width = VECTOR_BYTES // self.size
        self.vector = ir.VectorType(self.scalar, self.width)
        self.zeros = ir.Constant(self.vector, [0.0] * self.width)
        self.zero = ir.Constant(self.scalar, 0.0)

    # ---- integers and control flow

    def integer(self, value: Int | int) -> Int:
        return value if isinstance(value, Int) else Int(self, ir.Constant(I64, value))

    def table(self, address: Int, index: Int | int) -> Int:
        """The integer at ``address[index]``."""
        where = address + self.integer(index) * 8
        return Int(self, self.b.load(self.b.inttoptr(where.value, I64.as_pointer())))

    @contextmanager
    def range(self, start: Int | int, stop: Int | int, step: Int | int = 1) -> Iterator[Int]:
        b, start, stop, step = self.b, self.integer(start), self.integer(stop), self.integer(step)
        before, head, inside, after = b.block, *(b.append_basic_block(x) for x in ("head", "inside", "after"))
        b.branch(head)
        b.position_at_end(head)
        i = b.phi(I64)
        i.add_incoming(start.value, before)
        b.cbranch(b.icmp_signed("<", i, stop.value), inside, after)
        b.position_at_end(inside)
        yield Int(self, i)
        i.add_incoming((Int(self, i) + step).value, b.block)
        b.branch(head)
        b.position_at_end(after)

    @contextmanager
    def when(self, condition: Int) -> Iterator[None]:
        with self.b.if_then(condition.value):
            yield

    def call(self, kernel: Kernel, *arguments: Any) -> None:
        """Another kernel of the program, with integers and elements (which travel as doubles)."""

        def passed(x: Any) -> Any:
            if isinstance(x, Int | int):
                return self.integer(x).value
            return self.b.fpext(x, ir.DoubleType()) if self.size == 4 else x

        self.b.call(self.b.module.globals[kernel.name], [passed(x) for x in arguments])

    # ---- elements and vectors

    def pointer(self, address: Int, kind: Any) -> Any:
        return self.b.inttoptr(address.value, kind.as_pointer())

    def get(self, address: Int) -> Any:
        return self.b.load(self.pointer(address, self.scalar))

    def put(self, value: Any, address: Int) -> None:
        self.b.store(value, self.pointer(address, self.scalar))

    def get_if(self, condition: Int, address: Int, otherwise: Int) -> Any:
        """The element at ``address``, or where the condition does not hold at an address that can always be read."""
        return self.get(condition.choose(address, otherwise))

    def load(self, address: Int) -> Any:
        value = self.b.load(self.pointer(address, self.vector))
        value.align = self.size
        return value

    def store(self, value: Any, address: Int) -> None:
        self.b.store(value, self.pointer(address, self.vector)).align = self.size

    def spread(self, scalar: Any) -> Any:
        undefined = ir.Constant(self.vector, ir.Undefined)
        first = self.b.insert_element(undefined, scalar, ir.Constant(LANE, 0))
        return self.b.shuffle_vector(first, undefined, self.lanes([0] * self.width))

    def lanes(self, indices: Sequence[int]) -> ir.Constant:
        return ir.Constant(ir.VectorType(LANE, len(indices)), list(indices))

    def first(self, vector: Any) -> Any:
        return self.b.extract_element(vector, ir.Constant(LANE, 0))

    def fma(self, x: Any, y: Any, z: Any) -> Any:
        return self.b.fadd(self.b.fmul(x, y, flags=("contract",)), z, flags=("contract",))

    def positive(self, h: Any, x: Any) -> Any:
        """``x`` where ``h`` > 0 (or is NaN), else 0."""
        zero = self.zero if h.type == self.scalar else self.zeros
        return self.b.select(self.b.fcmp_ordered("<=", h, zero), zero, x)

    def intrinsic(self, name: str, result: Any, *arguments: Any) -> Any:
        """One of LLVM's own functions, by name."""
        kind = ir.FunctionType(result, [x.type for x in arguments])
        return self.b.call(self.b.module.globals.get(name) or ir.Function(self.b.module, kind, name), arguments)

    def root(self, x: Any) -> Any:
        """Of a vector or an element."""
        lanes = "" if x.type == self.scalar else f"v{self.width}"
        return self.intrinsic(f"llvm.sqrt.{lanes}f{8 * self.size}", x.type, x)

    # ---- functions of an element

    def least(self, x: Any, y: Any) -> Any:
        """min(x, y); ``x`` if it is a NaN."""
        return self.b.select(self.b.fcmp_ordered(">", x, y), y, x)

    def greatest(self, x: Any, y: Any) -> Any:
        """max(x, y); ``x`` if it is a NaN."""
        return self.b.select(self.b.fcmp_ordered("<", x, y), y, x)

    def series(self, coefficients: Sequence[float], x: Any) -> Any:
        """c0 + c1 x + c2 x² + ..."""
        value = ir.Constant(self.scalar, coefficients[-1])
        for c in reversed(coefficients[:-1]):
            value = self.fma(value, x, ir.Constant(self.scalar, c))
        return value

    def exp(self, x: Any) -> Any:
        """To about an ulp: x = n log 2 + r, and a Taylor series in r, which is at most 0.35; saturates where the result would."""
        b, double = self.b, self.size == 8
        whole, bias, shift, limit = (I64, 1023, 52, 708.0) if double else (LANE, 127, 23, 87.0)
        x = self.least(self.greatest(x, ir.Constant(self.scalar, -limit)), ir.Constant(self.scalar, limit))
        n = self.intrinsic(f"llvm.rint.f{8 * self.size}", self.scalar, b.fmul(x, ir.Constant(self.scalar, 1 / math.log(2))))
        high = 0.693145751953125  # log 2 in so few digits that n times it is exact
        r = self.fma(n, ir.Constant(self.scalar, -high), x)
        r = self.fma(n, ir.Constant(self.scalar, high - math.log(2)), r)
        power = b.shl(b.add(b.fptosi(n, whole), whole(bias)), whole(shift))
        taylor = self.series([1 / math.factorial(k) for k in range(14 if double else 8)], r)
        return b.fmul(taylor, b.bitcast(power, self.scalar))

    def log1p(self, x: Any) -> Any:
        """log(1 + x) for x in [0, 1], to about an ulp: 2 artanh(x / (2 + x)), whose series needs few terms there."""
        s = self.b.fdiv(x, self.b.fadd(x, ir.Constant(self.scalar, 2.0)))
        artanh = self.series([2 / (2 * k + 1) for k in range(18 if self.size == 8 else 9)], self.b.fmul(s, s))
        return self.b.fmul(s, artanh)

    def total(self, vectors: Sequence[Any]) -> Any:
        """Sum of all elements of the vectors, as a scalar; pairwise."""
        parts = list(vectors)
        while len(parts) > 1:
            parts = [self.b.fadd(x, y) for x, y in zip(parts[::2], parts[1::2], strict=True)]
        value, span = parts[0], 1
        while span < self.width:  # then every lane has its own sum and that of the lane ``span`` away
            value = self.b.fadd(value, self.b.shuffle_vector(value, value, self.lanes([i ^ span for i in range(self.width)])))
            span *= 2
        return self.first(value)

    def loop(self, start: Int, stop: Int, step: int, initial: list[Any], body: Body) -> list[Any]:
        """``initial = body(offset, initial)`` for every offset; the values stay in registers."""
        b = self.b
        before, head, inside, after = b.block, *(b.append_basic_block(x) for x in ("head", "inside", "after"))
        b.branch(head)
        b.position_at_end(head)
        offset = b.phi(I64)
        offset.add_incoming(start.value, before)
        values = [b.phi(x.type) for x in initial]
        for phi, x in zip(values, initial, strict=True):
            phi.add_incoming(x, before)
        b.cbranch(b.icmp_signed("<", offset, stop.value), inside, after)
        b.position_at_end(inside)
        new = body(Int(self, offset), values)
        offset.add_incoming((Int(self, offset) + step).value, b.block)
        for phi, x in zip(values, new, strict=True):
            phi.add_incoming(x, b.block)
        b.branch(head)
        b.position_at_end(after)
        return values

    def over(self, n: Int, body: Body, sums: int = 0) -> list[Any]:
        """``body(offset in bytes, sums)`` for every vector of a row of ``n`` elements; returns the totals of the sums.

        ``UNROLL`` independent sets of sums take turns; what is left over goes to the first set.
        """
        end, step = n * self.size, VECTOR_BYTES * UNROLL
        middle = end // step * step

        def unrolled(offset: Int, flat: list[Any]) -> list[Any]:
            out: list[Any] = []
            for u in range(UNROLL):
                out += body(offset + u * VECTOR_BYTES, flat[u * sums : (u + 1) * sums])
            return out

        flat = self.loop(self.integer(0), middle, step, [self.zeros] * (sums * UNROLL), unrolled)
        flat[:sums] = self.loop(middle, end, VECTOR_BYTES, flat[:sums], body)
        return [self.total(flat[i::sums]) for i in range(sums)]

    def write(self, n: Int, out: Int, value: Callable[[Int], Any]) -> None:
        """Store ``value(offset in bytes)`` for every vector of a row of ``n`` elements."""

        def body(offset: Int, _: list[Any]) -> list[Any]:
            self.store(value(offset), out + offset)
            return []

        self.over(n, body)


class Kernel:
    """A function of the program: integers and, named in ``numbers``, floating-point arguments; returns nothing."""

    def __init__(self, emit: Callable[..., None], numbers: Sequence[str] = ()) -> None:
        self.emit, self.name = emit, emit.__name__.lstrip("_")
        names = emit.__code__.co_varnames[1 : emit.__code__.co_argcount]
        self.floats = [name in numbers for name in names]

    def declare(self, module: ir.Module) -> None:
        kinds = [ir.DoubleType() if is_float else I64 for is_float in self.floats]
        ir.Function(module, ir.FunctionType(ir.VoidType(), kinds), self.name).attributes.add("noinline")

    def define(self, module: ir.Module, element: str) -> None:
        function = module.globals[self.name]
        builder = ir.IRBuilder(function.append_basic_block("entry"))
        e = Emitter(builder, element)
        arguments: list[Any] = []
        for value, is_float in zip(function.args, self.floats, strict=True):
            if is_float:
                arguments.append(builder.fptrunc(value, e.scalar) if element == "float32" else value)
            else:
                arguments.append(Int(e, value))
        self.emit(e, *arguments)
        builder.ret_void()

        entry = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64]), f"{self.name}.entry")
        builder = ir.IRBuilder(entry.append_basic_block("entry"))
        e, values = Emitter(builder, element), []
        for i, is_float in enumerate(self.floats):
            value = e.table(Int(e, entry.args[0]), i).value
            values.append(builder.bitcast(value, ir.DoubleType()) if is_float else value)
        builder.call(function, values)
        builder.ret_void()


class Native:
    """A compiled kernel as Python calls it; the GIL is free meanwhile.

    Attributes:
        entry: address of the same function taking one argument, the address of a table of its arguments.
        layout: how such a table is packed.
    """

    def __init__(self, kernel: Kernel, address: int, entry: int, program: Program) -> None:
        self._program = program  # the code lives as long as it
        kinds = (ctypes.c_double if is_float else ctypes.c_int64 for is_float in kernel.floats)
        self._call = ctypes.CFUNCTYPE(None, *kinds)(address)
        self.entry = entry
        self.layout = struct.Struct("=" + "".join("d" if is_float else "q" for is_float in kernel.floats))

    def __call__(self, *arguments: float) -> None:
        self._call(*arguments)


class Program:
    """Kernels compiled for this processor and one element type; each is an attribute that ctypes calls."""

    def __init__(self, kernels: Sequence[Kernel], element: str) -> None:
        module = ir.Module(f"robot_rl_{element}")
        for kernel in kernels:
            kernel.declare(module)
        for kernel in kernels:
            kernel.define(module, element)
        if hasattr(llvm, "initialize") and not hasattr(llvm, "create_pass_builder"):
            llvm.initialize()  # newer releases do it by themselves and object
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        features = llvm.get_host_cpu_features().flatten()
        machine = llvm.Target.from_default_triple().create_target_machine(
            cpu=llvm.get_host_cpu_name(), features=features, opt=2, jit=True
        )
        module.triple, module.data_layout = machine.triple, str(machine.target_data)
        code = llvm.parse_assembly(str(module))
        _optimise(code, machine)
        self._engine = llvm.create_mcjit_compiler(code, machine)
        self._engine.finalize_object()
        for kernel in kernels:
            address, entry = (self._engine.get_function_address(kernel.name + suffix) for suffix in ("", ".entry"))
            setattr(self, kernel.name, Native(kernel, address, entry, self))

    def __getattr__(self, name: str) -> Native:
        raise AttributeError(f"no kernel {name!r}")


def _optimise(code: Any, machine: Any) -> None:
    if hasattr(llvm, "create_pass_builder"):
        options = llvm.create_pipeline_tuning_options(speed_level=2)
        # The loops are unrolled and vectorised as they should be.
        options.loop_vectorization = options.slp_vectorization = options.loop_unrolling = options.loop_interleaving = False
        builder = llvm.create_pass_builder(machine, options)
        builder.getModulePassManager().run(code, builder)
        return
    manager, builder = llvm.create_module_pass_manager(), llvm.create_pass_manager_builder()
    builder.opt_level, builder.disable_unroll_loops = 2, True
    builder.populate(manager)
    manager.run(code)
