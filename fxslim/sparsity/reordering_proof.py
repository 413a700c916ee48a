# SPDX-License-Identifier: Apache-2.0
"""Proves that a model with its channels in another order computes what it did, in float64 on example inputs."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxslim.errors import ConfigError
from fxslim.graph.double_floats import in_double
from fxslim.graph.inputs import Inputs, output_tensors
from fxslim.graph.recording import undisturbed
from fxslim.graph.surgery.changes import Changes
from fxslim.graph.surgery.cutting import Cut, Surgery

# Of the largest value of each output.
TOLERANCE = 1e-9


class ReorderingProof:
    """A copy of the model, and what it computes as it is."""

    def __init__(self, model: nn.Module, examples: Sequence[Inputs]) -> None:
        self.examples = [inputs.in_double() for inputs in examples]
        try:
            self.model = copy.deepcopy(model).double()
        except Exception as error:
            raise ConfigError(
                f"permute=True proves on a copy that nothing changes, and the model can't be copied "
                f"({type(error).__name__}: {error}): make it copyable, or leave permute= out"
            ) from error
        with torch.inference_mode(False), torch.no_grad():
            self.before = self._outputs()

    def holds(self, cuts: Sequence[Cut]) -> bool:
        """Whether the outputs stay what they are under these cuts, up to the order of sums."""
        changes = Changes()
        with torch.inference_mode(False), torch.no_grad():
            try:
                Surgery(self.model, cuts).commit(changes)
                return all(_is_close(*pair) for pair in zip(self._outputs(), self.before, strict=True))
            except Exception:
                # A forward that fails, or returns more or less than it did, is no proof.
                return False
            finally:
                changes.undo()

    def _outputs(self) -> list[Tensor]:
        found: list[Tensor] = []
        for inputs in self.examples:
            with undisturbed(self.model, training=False), in_double():
                found += [tensor.clone() for tensor in output_tensors(inputs.copied().run(self.model))]
        return found


def _is_close(after: Tensor, before: Tensor) -> bool:
    if after.shape != before.shape:
        return False
    if not before.is_floating_point() and not before.is_complex():
        return torch.equal(after, before)
    largest = before[before.isfinite()].abs()
    return torch.allclose(
        after, before, rtol=0, atol=TOLERANCE * float(largest.max()) if largest.numel() else 0, equal_nan=True
    )


def exact_parts(parts: Sequence[Any], holds: Callable[[Sequence[Any]], bool]) -> list[Any]:
    """The parts that hold, found by halving.

    >>> exact_parts([1, 2, 3, 4], lambda some: 3 not in some)
    [1, 2, 4]
    """
    if not parts or holds(parts):
        return list(parts)
    if len(parts) == 1:
        return []
    half = len(parts) // 2
    found = [*exact_parts(parts[:half], holds), *exact_parts(parts[half:], holds)]
    return found if len(found) < len(parts) and holds(found) else []
