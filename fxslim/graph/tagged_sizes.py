# SPDX-License-Identifier: Apache-2.0
"""Integers that remember where they come from: a module's attribute, a tensor's size, arithmetic on both.

While a model is recorded they stand in for its int attributes and for the sizes of its tensors, so that
``x.view(b, self.heads, c // self.heads)`` tells which sizes follow when channels go, and which attribute must
change. An int without a tag is a number that was written down.
"""

import contextlib
import operator
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, SupportsIndex

from torch import fx


@dataclass(frozen=True, kw_only=True)
class Attribute:
    """An int attribute of a module, or one item of a tuple or list; ``config.width`` is that of an object in it."""

    module: str
    name: str
    item: int | None = None

    def __str__(self) -> str:
        where = f"{self.module}.{self.name}".lstrip(".")
        return where if self.item is None else f"{where}[{self.item}]"


@dataclass(frozen=True, kw_only=True)
class Extent:
    """The size of one dim of a recorded value."""

    node: fx.Node
    dim: int


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """One operation on two expressions."""

    symbol: str
    left: "Expression"
    right: "Expression"


Expression = int | Attribute | Extent | Arithmetic
Lookup = Callable[[Attribute | Extent], int]

_OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "//": lambda a, b: a // b,
    "%": lambda a, b: a % b,
}


class NumbersRead:
    """Sizes that the forward used as numbers (``math.sqrt(x.shape[-1])``), in order; it is told ``answers`` instead.

    What such a number does to the model is found by running it again with other answers.
    """

    def __init__(self, answers: tuple[int, ...], users_line: Callable[[], str]) -> None:
        self.sizes: list[TaggedInt] = []
        self.answers = answers
        self.users_line = users_line

    def answer(self, size: "TaggedInt") -> int:
        """What the forward is told where it asks for a size as a number."""
        noted = tagged(int(size), size.expression)
        noted.where = self.users_line()
        self.sizes.append(noted)
        return self.answers[len(self.sizes) - 1] if len(self.sizes) <= len(self.answers) else int(size)


_READ: ContextVar[NumbersRead | None] = ContextVar("_READ", default=None)


@contextlib.contextmanager
def noting_numbers(numbers: NumbersRead) -> Iterator[None]:
    """Let ``numbers`` see every size that is used as a number."""
    token = _READ.set(numbers)
    try:
        yield
    finally:
        _READ.reset(token)


def as_number(value: Any) -> Any:
    """A size where it leaves the sizes: in a float, or in the arithmetic of tensors."""
    numbers = _READ.get()
    if not isinstance(value, TaggedInt):
        return value
    return int(value) if numbers is None else numbers.answer(value)


class TaggedInt(int):
    """An int with the expression that made it."""

    expression: Expression
    # File and line where it was used as a number.
    where: str = ""

    def __reduce__(self) -> tuple[Any, ...]:
        return int, (int(self),)

    def __deepcopy__(self, memo: Any) -> int:
        return int(self)

    def __neg__(self) -> int:
        return _combined("-", 0, self)

    def __add__(self, other: int) -> int:
        return _combined("+", self, other)

    def __radd__(self, other: int) -> int:
        return _combined("+", other, self)

    def __sub__(self, other: int) -> int:
        return _combined("-", self, other)

    def __rsub__(self, other: int) -> int:
        return _combined("-", other, self)

    def __mul__(self, other: int) -> int:
        return _combined("*", self, other)

    def __rmul__(self, other: int) -> int:
        return _combined("*", other, self)

    def __floordiv__(self, other: int) -> int:
        return _combined("//", self, other)

    def __rfloordiv__(self, other: int) -> int:
        return _combined("//", other, self)

    def __mod__(self, other: int) -> int:
        return _combined("%", self, other)

    def __rmod__(self, other: int) -> int:
        return _combined("%", other, self)

    def __divmod__(self, other: int) -> tuple[int, int]:
        return self // other, self % other

    def __rdivmod__(self, other: int) -> tuple[int, int]:
        return other // self, other % self

    def __float__(self) -> float:
        return float(as_number(self))

    def __truediv__(self, other: Any) -> float:
        return _as_floats(operator.truediv, self, other)

    def __rtruediv__(self, other: Any) -> float:
        return _as_floats(operator.truediv, other, self)

    def __pow__(self, other: Any, modulus: None = None) -> Any:  # type: ignore[override]
        whole = isinstance(other, int) and other >= 0
        return int(self) ** int(other) if whole else _as_floats(operator.pow, self, other)


def _as_floats(function: Callable[[Any, Any], Any], left: Any, right: Any) -> Any:
    known = isinstance(left, int | float) and isinstance(right, int | float)
    return function(as_number(left), as_number(right)) if known else NotImplemented


def _combined(symbol: str, left: Any, right: Any) -> Any:
    if isinstance(left, float) or isinstance(right, float):
        return _as_floats(_OPERATIONS[symbol], left, right)
    if not isinstance(left, int) or not isinstance(right, int):
        # int has no answer for a float, a tensor or a list either: their own method gets its turn.
        return NotImplemented
    value = _OPERATIONS[symbol](int(left), int(right))
    return tagged(value, Arithmetic(symbol=symbol, left=expression_of(left), right=expression_of(right)))


def tagged(value: SupportsIndex, expression: Expression) -> TaggedInt:
    """An int that remembers an expression.

    >>> heads = tagged(8, Attribute(module="attention", name="heads"))
    >>> (64 // heads).expression.symbol
    '//'
    """
    result = TaggedInt(value)
    result.expression = expression
    return result


def expression_of(value: int) -> Expression:
    """Where an int comes from; itself if it was written down."""
    return value.expression if isinstance(value, TaggedInt) else int(value)


def leaves(expression: Expression) -> Iterator[Attribute | Extent]:
    """All attributes and sizes in an expression."""
    if isinstance(expression, Arithmetic):
        yield from leaves(expression.left)
        yield from leaves(expression.right)
    elif not isinstance(expression, int):
        yield expression


def evaluate(expression: Expression, lookup: Lookup) -> int:
    """The value of an expression for other attributes and sizes."""
    if isinstance(expression, int):
        return expression
    if isinstance(expression, Arithmetic):
        left, right = evaluate(expression.left, lookup), evaluate(expression.right, lookup)
        if right == 0 and expression.symbol in ("//", "%"):
            return -1
        return _OPERATIONS[expression.symbol](left, right)
    return lookup(expression)


def solve(expression: Expression, wanted: int, lookup: Lookup) -> tuple[Attribute, int] | None:
    """Which attribute must become what for an expression to have this value; None where there is no one answer.

    >>> width = Arithmetic(symbol="*", left=Attribute(module="", name="heads"), right=16)
    >>> solve(width, 48, lambda leaf: 8)
    (Attribute(module='', name='heads', item=None), 3)
    """
    if isinstance(expression, Attribute):
        return expression, wanted
    if not isinstance(expression, Arithmetic):
        return None
    for side, other in (("left", expression.right), ("right", expression.left)):
        part = getattr(expression, side)
        if not any(isinstance(leaf, Attribute) for leaf in leaves(part)):
            continue
        needed = _undone(expression.symbol, side, wanted, evaluate(other, lookup))
        answer = None if needed is None else solve(part, needed, lookup)
        if answer is not None:
            return answer
    return None


def _undone(symbol: str, side: str, wanted: int, other: int) -> int | None:
    """What one side must be, given the other."""
    if symbol == "+":
        return wanted - other
    if symbol == "-":
        return wanted + other if side == "left" else other - wanted
    if symbol == "*":
        return wanted // other if other and wanted % other == 0 else None
    if symbol == "//":
        if side == "left":
            return wanted * other
        return other // wanted if wanted and other % wanted == 0 else None
    return None
