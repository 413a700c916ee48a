# SPDX-License-Identifier: Apache-2.0
"""Decisions that a forward takes by its values: which boxes are best, what is above a threshold, how many pixels.

Rounding can turn a decision that is nearly tied, and then everything behind it differs. So the twin decides, the
pruned model is given the same decisions, and the values that it would have decided by are compared like outputs:
where these are equal the decision was a tie or the same; where they are not, the models differ.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

COMPARING = frozenset("eq ne lt le gt ge".split())
ROUNDING = frozenset("floor ceil round trunc sign floor_divide".split())
CHOOSING = frozenset(
    """
    topk sort argsort argmax argmin max min median kthvalue mode nonzero nms searchsorted bucketize multinomial
    """.split()
)


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What an operator decided, and the values that it decided by."""

    operator: str
    given: list[Tensor]
    results: list[Tensor]


def _floats(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor) and value.is_floating_point()]


def _decides(func: Any, args: Any, result: Any) -> bool:
    """Whether an operator makes something discrete of floating values."""
    name = func.__name__.split(".")[0]
    if func._schema.is_mutable or not _floats(args):
        return False
    if name in ROUNDING or (name == "div" and "_mode" in func.__name__):
        return True
    tensors = [value for value in tree_leaves(result) if isinstance(value, Tensor)]
    found = any(not value.is_floating_point() for value in tensors)
    return found and (name in COMPARING or name in CHOOSING or name == "_to_copy")


class TakenDecisions(TorchDispatchMode):
    """Notes every decision of a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[Decision] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if _decides(func, args, result):
            results = [value.clone() for value in tree_leaves(result) if isinstance(value, Tensor)]
            given = [value.clone() for value in _floats(args)]
            self.all.append(Decision(operator=str(func), given=given, results=results))
        return result


class RepeatedDecisions(TorchDispatchMode):
    """Gives a forward the decisions of another; ``compared`` are the values that each of them was taken by.

    A decision about each channel has another shape where channels are cut: there the forward takes its own.
    ``strayed``: the forward asked for another decision than came next, and took its own from there on.
    """

    def __init__(self, decisions: Sequence[Decision]) -> None:
        super().__init__()
        self.decisions = decisions
        self.next = 0
        self.strayed = ""
        self.compared: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.strayed or not _decides(func, args, result):
            return result
        if self.next == len(self.decisions) or self.decisions[self.next].operator != str(func):
            self.strayed = f"decision {self.next} is {func}"
            return result
        decision, given = self.decisions[self.next], _floats(args)
        self.next += 1
        if [value.shape for value in given] != [value.shape for value in decision.given]:
            return result
        self.compared += [(theirs, own.clone()) for theirs, own in zip(decision.given, given, strict=True)]
        taken = iter(decision.results)
        is_rounded = isinstance(result, Tensor)

        def repeated(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            theirs = next(taken)
            # The values that come with places are the forward's own: they are no decision.
            return theirs.clone() if is_rounded or not value.is_floating_point() else value

        return tree_map(repeated, result)
