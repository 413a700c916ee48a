# SPDX-License-Identifier: Apache-2.0
"""What numbers that the forward computes from sizes do when the sizes change.

``scores / math.sqrt(d)``, ``corr / torch.sqrt(torch.tensor(c))``, the scale that attention chooses itself: no
expression is followed. The same forward runs again and is told the new sizes where it uses them as numbers (and only
there); then the two recordings are compared, operator by operator.
"""

import math
import operator
from typing import Any

from torch import fx

from fxslim.errors import TraceError
from fxslim.graph.propagation import operator_name
from fxslim.graph.recording import Recording

# Scalars made from scalars, in the precision of Python.
_SCALAR = {
    "sqrt": math.sqrt,
    "rsqrt": lambda a: a**-0.5,
    "reciprocal": lambda a: 1 / a,
    "neg": operator.neg,
    "log": math.log,
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "pow": operator.pow,
    **dict.fromkeys(["lift_fresh", "_to_copy", "clone", "detach", "alias"], lambda a: a),
}


def changed_operators(recording: Recording, answers: tuple[int, ...]) -> dict[fx.Node, float | None] | None:
    """Operators of tensors that get another number when sizes get these answers.

    The value is by what their result is multiplied then, None for any other change. None where the forward takes
    another path with these answers, or none at all.
    """
    try:
        other = recording.again(answers)
    except TraceError:
        return None
    pairs = list(zip(recording.nodes, other.nodes, strict=False))
    if len(recording.nodes) != len(other.nodes) or any(a.target != b.target for a, b in pairs if a.op != "placeholder"):
        return None
    before, after = _Numbers(), _Numbers()
    found: dict[fx.Node, float | None] = {}
    for a, b in pairs:
        if a.op != "call_function" or before.of(a) is not None:
            continue
        old, new = before.arguments(a), after.arguments(b)
        if old != new:
            found[a] = _multiple(a, old, new)
    return found


def _multiple(node: fx.Node, old: list[Any], new: list[Any]) -> float | None:
    """By what a product or quotient with one number is multiplied."""
    differ = [i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]
    name = operator_name(node)
    if len(differ) != 1 or not all(isinstance(values[differ[0]], int | float) for values in (old, new)):
        return None
    a, b = old[differ[0]], new[differ[0]]
    if not (a and b and b / a > 0):
        return None
    if name == "mul" or (name == "baddbmm" and node.kwargs.get("beta", 1) == 0):
        return float(b / a)
    return a / b if name == "div" and differ[0] == 1 and "rounding_mode" not in node.kwargs else None


class _Numbers:
    """Values of the scalars of one recording."""

    def __init__(self) -> None:
        self.known: dict[fx.Node, float | None] = {}

    def of(self, node: fx.Node) -> float | None:
        """The value of a tensor that is one number made from numbers; None for any other."""
        if node not in self.known:
            self.known[node] = self._computed(node)
        return self.known[node]

    def _computed(self, node: fx.Node) -> float | None:
        if node.op != "call_function":
            return node.meta.get("number")
        name = operator_name(node)
        if node.meta.get("shape") != () or name not in _SCALAR:
            return None
        given = [self.of(value) if isinstance(value, fx.Node) else value for value in node.args]
        if not given or any(not isinstance(value, int | float) for value in given):
            return None
        try:
            return float(_SCALAR[name](*given))  # type: ignore[operator]
        except (ArithmeticError, ValueError, TypeError):
            return None

    def arguments(self, node: fx.Node) -> list[Any]:
        """Numbers that an operator gets, in order; None in the place of tensors."""
        found: list[Any] = []
        for value in (*node.args, *node.kwargs.values()):
            for item in value if isinstance(value, list | tuple) else (value,):
                found.append(self.of(item) if isinstance(item, fx.Node) else item)
        return found
