# SPDX-License-Identifier: Apache-2.0
"""Sees each product with a weight while a model runs: what it was multiplied with, and whose forward it was in.

By memory, not by module: a weight that is handed to a function, or of which only some rows are used, is seen too.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fxslim.graph.masked_states import masked_state
from fxslim.graph.weight_reads import WeightReads, memory_of

_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
# Where the factors of a product stand among its arguments.
_PRODUCTS = {"mm": 0, "addmm": 1, "bmm": 0, "baddbmm": 1}


@dataclass(frozen=True, kw_only=True)
class Convolution:
    """How a convolution walks over its input."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int


@dataclass(frozen=True, kw_only=True)
class WeightUse:
    """Rows ``first`` to ``last`` of a weight were multiplied with ``x``, in the forward of ``module``."""

    name: str
    x: Tensor
    first: int
    last: int
    module: str
    convolution: Convolution | None = None


class WeightUses(TorchDispatchMode):
    """Calls ``hear`` for each product with one of the named weights.

    ``hear_read`` gets the name and the running module where a stored weight is used in any way without a mask.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Mapping[str, Tensor],
        hear: Callable[[WeightUse], None],
        hear_read: Callable[[str, str], None] | None = None,
    ) -> None:
        super().__init__()
        self.hear, self.weights = hear, dict(weights)
        states = [*model.parameters(), *model.buffers()]
        self.reads = None if hear_read is None else WeightReads(states, weights, hear_read)
        self.by_memory = {memory_of(weight): name for name, weight in self.weights.items()}
        self.names = {id(t): name for name, t in [*model.named_parameters(), *model.named_buffers()]}
        # Masked copies of weights, and the names they stand for; alive, so that their memory is not given out again.
        self.copies: dict[int, tuple[str, Tensor]] = {}
        self.stack: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.is_inference_mode_enabled() and func.has_kernel_for_dispatch_key(_COMPOSITE):
            # There nothing takes linear and matmul apart before they come here.
            with self:
                return func.decompose(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        name = getattr(getattr(func, "overloadpacket", None), "__name__", "")
        found = masked_state(func, args, self.names)
        if found is not None and memory_of(found[0]) in self.by_memory:
            self.copies[memory_of(result)] = self.by_memory[memory_of(found[0])], result
            return result
        if self.reads is not None:
            self.reads.see(name, tree_leaves((args, kwargs)), tree_leaves(result), self._module())
        if name == "convolution":
            self._see_convolution(*args)
        elif name in _PRODUCTS:
            left, right = args[_PRODUCTS[name] : _PRODUCTS[name] + 2]
            self._see_product(left, right)
            if not any(left.stride()[:-2]):
                self._see_product(right.mT, left[0].mT if left.dim() > 2 else left.mT)
        elif name == "mv":
            self._see_product(args[1].unsqueeze(0), args[0].mT)
        elif name == "_to_copy" and (copied := self._weight(args[0])) and args[0].stride() == result.stride():
            # Autocast multiplies with a copy of another dtype.
            self.copies[memory_of(result)] = copied[0], result
        return result

    def forget_copies(self) -> None:
        """After each batch: the next makes its own."""
        self.copies.clear()
        if self.reads is not None:
            self.reads.made.clear()

    def _weight(self, value: Tensor) -> tuple[str, Tensor] | None:
        copied = self.copies.get(memory_of(value))
        if copied is not None:
            return copied
        name = self.by_memory.get(memory_of(value))
        return None if name is None else (name, self.weights[name])

    def _module(self) -> str:
        return self.stack[-1] if self.stack else ""

    def _see_convolution(
        self, x: Tensor, weight: Tensor, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: bool,
        output_padding: Any, groups: int,
    ) -> None:  # fmt: skip
        found = self._weight(weight)
        if found is None or weight.shape != found[1].shape:
            return
        lists = (tuple(value) for value in (stride, padding, dilation, output_padding))
        strides, paddings, dilations, output_paddings = (
            value * (weight.dim() - 2) if len(value) == 1 else value for value in lists
        )
        convolution = Convolution(
            stride=strides, padding=paddings, dilation=dilations, transposed=transposed,
            output_padding=output_paddings, groups=groups,
        )  # fmt: skip
        rows = weight.shape[1] * groups if transposed else weight.shape[0]
        self.hear(WeightUse(name=found[0], x=x, first=0, last=rows, module=self._module(), convolution=convolution))

    def _see_product(self, left: Tensor, right: Tensor) -> None:
        """x times (a part of) a weight transposed: its rows are the columns of the right factor."""
        found = self._weight(right)
        if found is None or right.dim() < 2 or found[1].dim() != 2:
            return
        name, weight = found
        columns = weight.shape[1]
        first, skipped = divmod(int(right.storage_offset()) - int(weight.storage_offset()), columns)
        read = right.shape[-2]
        if skipped + read > columns or right.stride(-2) != 1 or right.stride(-1) != columns:
            return
        # Where only some columns are read, the others read 0.
        x = nn.functional.pad(left.reshape(-1, read), (skipped, columns - skipped - read))
        self.hear(WeightUse(name=name, x=x, first=first, last=first + right.shape[-1], module=self._module()))


def ignored(use: WeightUse) -> None:
    """Where only reads matter."""


@contextlib.contextmanager
def watched(model: nn.Module, uses: WeightUses) -> Iterator[None]:
    """Watch the model's forwards, knowing which module is running."""
    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: uses.stack.append(name)))
        handles.append(module.register_forward_hook(lambda *_: _left(uses.stack), always_call=True))
    try:
        with uses:
            yield
    finally:
        for handle in handles:
            handle.remove()


def _left(stack: list[str]) -> None:
    stack.pop()


def read_rows(use: WeightUse, weight: Tensor) -> Tensor:
    """What each output read, as groups x places x columns, in the order of the weight's (in, *kernel)."""
    if use.convolution is None:
        return use.x.unsqueeze(0)
    setting, rank = use.convolution, weight.dim() - 2
    x = use.x if use.x.dim() == weight.dim() else use.x.unsqueeze(0)
    kernel = weight.shape[2:]
    if setting.transposed:
        x, strides = _spread(x, setting, kernel), (1,) * rank
    else:
        x = nn.functional.pad(x, [p for size in reversed(setting.padding) for p in (size, size)])
        strides = setting.stride
    for dim in range(rank):
        reach = setting.dilation[dim] * (kernel[dim] - 1) + 1
        x = x.unfold(2 + dim, reach, strides[dim])[..., :: setting.dilation[dim]]
    if setting.transposed:
        x = x.flip([d + 2 + rank for d in range(rank)])
    # batch, channels, places, kernel: channels go to the groups, places to the batch.
    x = x.unflatten(1, (setting.groups, -1)).movedim(1, 0).movedim(2, 2 + rank)
    return x.flatten(2 + rank).flatten(1, 1 + rank)


def _spread(x: Tensor, setting: Convolution, kernel: tuple[int, ...]) -> Tensor:
    """The input with zeros in between, over which a transposed convolution is a plain one."""
    sizes = [(size - 1) * stride + 1 for size, stride in zip(x.shape[2:], setting.stride, strict=True)]
    wide = x.new_zeros(*x.shape[:2], *sizes)
    inner = wide
    for dim, stride in enumerate(setting.stride):
        inner = inner[(slice(None),) * (2 + dim) + (slice(None, None, stride),)]
    inner.copy_(x)
    edges = []
    for dim in reversed(range(len(kernel))):
        edge = setting.dilation[dim] * (kernel[dim] - 1) - setting.padding[dim]
        edges += [edge, edge + setting.output_padding[dim]]
    return nn.functional.pad(wide, edges)
