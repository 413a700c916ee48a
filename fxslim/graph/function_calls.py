# SPDX-License-Identifier: Apache-2.0
"""Which torch function the model is in while an operator runs, and the sizes that it was called with.

ATen no longer tells chunk from split, nor a size that was computed from one that was written down.
"""

import functools
import operator
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from fxslim.graph.tagged_sizes import Extent, as_number, tagged

_LIBRARIES = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))
_FACTORIES = ("zeros", "ones", "empty", "rand", "randn", "full", "new_zeros", "new_ones", "new_empty", "new_full")
_WITH_SIZES = ("view", "reshape", "expand", "repeat", "tile", *_FACTORIES)
_LIKE_ANOTHER = ("view_as", "reshape_as", "expand_as")
_CONVOLUTIONS = frozenset(f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3))
_WITH_CUTS = ("split", "split_with_sizes", "narrow", "__getitem__", "__setitem__", "unflatten", "tensor_split")

# Functions whose ints are numbers, not sizes; by their names without underscores.
_WITH_NUMBERS = frozenset(
    """
    add sub mul div truediv floordiv pow radd rsub rmul rdiv rtruediv rfloordiv rpow iadd isub imul idiv itruediv
    subtract multiply divide true_divide floor_divide tensor as_tensor scalar_tensor full_like fill masked_fill
    addcmul addcdiv lerp clamp clip maximum minimum
    """.split()
)

# Functions written down as one operator, not as what they are made of: a rule knows more about the whole.
WHOLE = frozenset(
    """
    lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell _pack_padded_sequence
    _pad_packed_sequence bilinear instance_norm rms_norm local_response_norm multi_head_attention_forward _weight_norm
    """.split()
)


@dataclass(frozen=True, kw_only=True)
class Call:
    """A torch function by its name; ``sizes`` as the user's code gave them (tagged or plain), None if it gave none."""

    name: str = ""
    sizes: tuple[Any, ...] | None = None
    where: str = ""


class CalledFunctions(TorchFunctionMode):
    """Keeps the stack of calls, and answers questions about sizes with tagged ints."""

    def __init__(self, node_of: Callable[[Tensor], fx.Node], take_whole: Callable[..., Any]) -> None:
        self.stack: list[Call] = []
        self.take_whole = take_whole
        self.node_of = node_of

    @property
    def current(self) -> Call:
        return self.stack[-1] if self.stack else Call()

    def _with_tags(self, x: Tensor, sizes: Any) -> Any:
        node = self.node_of(x)
        if isinstance(sizes, int):
            return sizes
        return torch.Size([tagged(size, Extent(node=node, dim=d)) for d, size in enumerate(sizes)])

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        if name == "__get__":
            if func.__self__ is torch.Tensor.shape:
                return self._with_tags(args[0], func(*args))
        elif func is torch.Tensor.size:
            dim = args[1] if len(args) > 1 else kwargs.get("dim")
            sizes = self._with_tags(args[0], args[0].size())
            return sizes if dim is None else sizes[int(dim)]
        elif name in ("numel", "nelement") and args[0].dim():
            return functools.reduce(operator.mul, self._with_tags(args[0], args[0].shape))
        self.stack.append(self._call(name, args, kwargs))
        args, kwargs = self._with_numbers(name, args, kwargs)
        try:
            if name in WHOLE:
                return self.take_whole(func, args, kwargs)
            return func(*args, **kwargs)
        finally:
            self.stack.pop()

    def _with_numbers(self, name: str, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The arguments, with sizes that become numbers here noted; attention scales by the width of its heads."""
        if name.strip("_") in _WITH_NUMBERS:
            return [as_number(value) for value in args], {key: as_number(value) for key, value in kwargs.items()}
        if name == "scaled_dot_product_attention" and kwargs.get("scale") is None:
            query = args[0] if args else kwargs["query"]
            return args, kwargs | {"scale": float(self._with_tags(query, query.shape)[-1]) ** -0.5}
        return args, kwargs

    def _call(self, name: str, args: Any, kwargs: dict[str, Any]) -> Call:
        if name in _WITH_SIZES:
            rest = args if name in _FACTORIES and not name.startswith("new_") else args[1:]
            given = rest[0] if rest else kwargs.get("shape", kwargs.get("size"))
            sizes = tuple(given) if isinstance(given, tuple | list) else tuple(rest)
            known = all(isinstance(size, int) for size in sizes)
            return Call(name=name, sizes=sizes if known else None, where=users_line())
        if name in _LIKE_ANOTHER and len(args) > 1:
            return Call(name=name, sizes=tuple(self._with_tags(args[1], args[1].shape)), where=users_line())
        if name in _WITH_CUTS:
            rest = (*args[1:], *kwargs.values())
            return Call(name=name, sizes=tuple(_without_tensors(value) for value in rest), where=users_line())
        if name in _CONVOLUTIONS:
            groups = args[6] if len(args) > 6 else kwargs.get("groups", 1)
            return Call(name=name, sizes=(groups,), where=users_line())
        if name == "multi_head_attention_forward":
            return Call(name=name, sizes=tuple(args[3:5]), where=users_line())
        return Call(name=name)


def _without_tensors(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return tuple(_without_tensors(item) for item in value)
    return value if isinstance(value, int | slice | type(None) | type(...)) else None


def users_line() -> str:
    """File and line of the first caller outside torch and this package."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_LIBRARIES):
        frame = frame.f_back  # type: ignore[assignment]
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame is not None else ""
