# SPDX-License-Identifier: Apache-2.0
"""What becomes of one layer when a model is converted."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from fxslim.errors import PlanError
from fxslim.nn import BlockSparseConv2d, BlockSparseLinear, QuantizedLayer
from fxslim.nn.block_sparse_layers import BlockSparseLayer
from fxslim.nn.int8_block_sparse import Int8BlockSparseConv2d, Int8BlockSparseLinear
from fxslim.nn.semi_structured_linear import SemiStructuredLinear
from fxslim.patterns import Block
from fxslim.plan.applied_plans import module_in

# Small integers, blocks that are not zero, 2:4 on GPUs, or what it was, without masks.
SMALL, BLOCKS, SEMI_STRUCTURED, DENSE = FORMS = ("small", "blocks", "2:4", "dense")


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """How a block-sparse weight is stored. ``relu``: a ReLU behind the layer is part of it."""

    cin: int
    cout: int
    num_blocks: int
    relu: bool = False

    @property
    def pattern(self) -> Block:
        """Their size."""
        return Block(cin=self.cin, cout=self.cout)


@dataclass(frozen=True, kw_only=True)
class LayerConversion:
    """What becomes of one layer; ``kernel`` is what it computes with on the machine that planned.

    ``norm``: a batch norm that becomes part of it. ``given``: the quantizer that its input comes from. ``blocks``: of
    the form "blocks".
    """

    name: str
    norm: str | None
    given: str | None
    kernel: str
    bytes_before: int
    bytes_after: int
    form: str = SMALL
    blocks: Blocks | None = None

    def made(self, model: nn.Module, *, values: bool) -> tuple[nn.Module, nn.Module | None]:
        """The layer and what takes its place; None where it stays dense.

        Without ``values`` there is room for the blocks of the plan, whatever the weight's.
        """
        layer: Any = model.get_submodule(module_in(model, self.name))
        norm = None if self.norm is None else model.get_submodule(module_in(model, self.norm))
        given: Any = None if self.given is None else model.get_submodule(module_in(model, self.given))
        if self.form == SMALL:
            if not isinstance(layer, QuantizedLayer):
                raise PlanError(f"{self.name or 'the model'} is a {type(layer).__name__}, which is not quantized")
            return layer, layer.deployed(norm, given)
        if self.form == DENSE:
            return layer, None
        return layer, sparse_form(self, layer, norm, given, None if values else self.num_blocks)

    @property
    def num_blocks(self) -> int | None:
        """Those that are kept."""
        return None if self.blocks is None else self.blocks.num_blocks

    def with_blocks_of(self, made: Any) -> "LayerConversion":
        """As this layer was packed."""
        if self.blocks is None:
            return self
        return replace(self, blocks=replace(self.blocks, num_blocks=made.weight.num_blocks))

    def to_row(self) -> list[Any]:
        """The fields as plain data."""
        row = [self.name, self.norm, self.given, self.kernel, self.bytes_before, self.bytes_after]
        if self.form == SMALL:
            return row
        return [*row, self.form, *([] if self.blocks is None else [asdict(self.blocks)])]


def sparse_form(
    one: LayerConversion, layer: Any, norm: nn.Module | None, given: Any, num_blocks: int | None
) -> nn.Module:
    """A layer that skips zeros."""
    linear = isinstance(layer, nn.Linear)
    if not linear and not isinstance(layer, nn.Conv2d):
        raise PlanError(f"{one.name or 'the model'} is a {type(layer).__name__}, which has no block-sparse form")
    if one.blocks is None:
        return SemiStructuredLinear(layer)
    settings: Any = {"pattern": one.blocks.pattern, "relu": one.blocks.relu, "num_blocks": num_blocks}
    if isinstance(layer, QuantizedLayer):
        return (Int8BlockSparseLinear if linear else Int8BlockSparseConv2d)(layer, norm, given, **settings)
    made: BlockSparseLayer = (BlockSparseLinear if linear else BlockSparseConv2d)(layer, norm, **settings)
    made.layer_name = one.name or made.layer_name
    return made


def conversion_from_row(
    name: Any, norm: Any, given: Any, kernel: Any, before: Any, after: Any, form: Any = SMALL, blocks: Any = None
) -> LayerConversion:
    """From the fields that ``to_row`` wrote."""
    if form not in FORMS or (form == BLOCKS) != (blocks is not None):
        raise ValueError(f"layer {name} has the form {form!r}")
    return LayerConversion(
        name=str(name), norm=None if norm is None else str(norm), given=None if given is None else str(given),
        kernel=str(kernel), bytes_before=int(before), bytes_after=int(after), form=form,
        blocks=None if blocks is None else _blocks(**blocks),
    )  # fmt: skip


def _blocks(cin: Any, cout: Any, num_blocks: Any, relu: Any) -> Blocks:
    if int(num_blocks) < 0:
        raise ValueError(f"{num_blocks} blocks")
    made = Blocks(cin=int(cin), cout=int(cout), num_blocks=int(num_blocks), relu=bool(relu))
    # Sizes that no block has are refused.
    return replace(made, cin=made.pattern.cin)
