"""Costs as text: arithmetic over a chunk and the observation, read from the syntax tree and never executed as code.

    mean(relu(0.05 - (ee_z + cumsum(delta_z)))**2)

Names are action dimensions (one number a row), elements of the observation (one number), ``row`` (0, 1, ...), ``pi``, and
``path_x``, ``path_y``, ``path_z`` where a path is configured. An element of an observation without names is
``<feature>_<index>``, e.g. ``state_3``.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def _tensor(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *a: function(*(x if isinstance(x, Tensor) else torch.tensor(float(x)) for x in a))


def _norm(*parts: Tensor) -> Tensor:
    # The square root has no slope at zero; a distance below a nanometre is none.
    return sum((p * p for p in parts), torch.zeros(())).clamp_min(1e-18).sqrt()


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "abs": _tensor(torch.abs), "sqrt": _tensor(torch.sqrt), "exp": _tensor(torch.exp), "log": _tensor(torch.log),
    "sin": _tensor(torch.sin), "cos": _tensor(torch.cos), "tanh": _tensor(torch.tanh), "sigmoid": _tensor(torch.sigmoid),
    "relu": _tensor(F.relu), "softplus": _tensor(F.softplus), "minimum": _tensor(torch.minimum), "maximum": _tensor(torch.maximum),
    "norm": _tensor(_norm),
    "sum": _tensor(lambda x: x.sum(-1, keepdim=True)), "mean": _tensor(lambda x: x.mean(-1, keepdim=True)),
    "min": _tensor(lambda x: x.amin(-1, keepdim=True)), "max": _tensor(lambda x: x.amax(-1, keepdim=True)),
    "cumsum": _tensor(lambda x: x.cumsum(-1)), "diff": _tensor(lambda x: x.diff(dim=-1)),
    "first": _tensor(lambda x: x[..., :1]), "last": _tensor(lambda x: x[..., -1:]),
}  # fmt: skip
"""``sum`` to ``max`` run over the rows, ``cumsum`` and ``diff`` along them, ``norm`` over its arguments."""
OPERATORS: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: lambda a, b: a + b, ast.Sub: lambda a, b: a - b, ast.Mult: lambda a, b: a * b, ast.Div: lambda a, b: a / b,
    ast.Pow: lambda a, b: a**b,
}  # fmt: skip
MAX_LENGTH = 2000


class Expression:
    """A parsed expression; :meth:`__call__` evaluates it on values by name, each (B, n) or (B, 1).

    Raises:
        ValueError: not arithmetic, or a name or function that is not known; the message names it and what is accepted.
    """

    def __init__(self, text: str, names: set[str]) -> None:
        self.text = text
        if len(text) > MAX_LENGTH:
            raise ValueError(f"expression of {len(text)} characters: accepted are at most {MAX_LENGTH}")
        try:
            self.tree = ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError) as error:
            raise ValueError(f"expression {text!r} is no arithmetic: {error}") from None
        self._check(self.tree, names | {"pi"})

    def _check(self, node: ast.AST, names: set[str]) -> None:
        if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and not isinstance(node.value, bool):
            return
        if isinstance(node, ast.Name):
            if node.id not in names:
                raise ValueError(f"expression {self.text!r}: unknown name {node.id!r}; accepted are {', '.join(sorted(names))}")
            return
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            if isinstance(node.op, ast.Pow) and not isinstance(node.right, ast.Constant):
                raise ValueError(f"expression {self.text!r}: the exponent of ** must be a number")
            self._check(node.left, names)
            self._check(node.right, names)
            return
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
            self._check(node.operand, names)
            return
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
            if node.func.id not in FUNCTIONS:
                raise ValueError(
                    f"expression {self.text!r}: unknown function {node.func.id!r}; accepted are {', '.join(sorted(FUNCTIONS))}"
                )
            for argument in node.args:
                self._check(argument, names)
            return
        raise ValueError(
            f"expression {self.text!r}: {type(node).__name__} is not accepted; accepted are numbers, names, + - * / **, and functions"
        )

    def __call__(self, values: Mapping[str, Tensor]) -> Tensor | float:
        return self._value(self.tree, values)

    def _value(self, node: ast.AST, values: Mapping[str, Tensor]) -> Any:
        if isinstance(node, ast.Constant):
            return float(node.value)  # type: ignore[arg-type]
        if isinstance(node, ast.Name):
            return math.pi if node.id == "pi" else values[node.id]
        if isinstance(node, ast.BinOp):
            return OPERATORS[type(node.op)](self._value(node.left, values), self._value(node.right, values))
        if isinstance(node, ast.UnaryOp):
            value = self._value(node.operand, values)
            return -value if isinstance(node.op, ast.USub) else value
        assert isinstance(node, ast.Call)
        assert isinstance(node.func, ast.Name)
        return FUNCTIONS[node.func.id](*(self._value(a, values) for a in node.args))
