# SPDX-License-Identifier: Apache-2.0
"""Where a quantizer stands: batches seen, switched on or off, observing or frozen. Kept in one buffer."""

from typing import Any

import torch
from torch import Tensor, nn

_SEEN, _ENABLED, _OBSERVING = 0, 1, 2
# Numbers are kept in such parts: averages of models cut whole numbers off below the next one, which must not matter.
PART = 1 << 20


def lasting(value: Tensor) -> Tensor:
    """A value to keep in a buffer: free of its graph, and fit for training where it was made in inference mode."""
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        return value.detach()
    with torch.inference_mode(False):
        return value.clone()


def set_buffers(module: nn.Module, **values: Tensor) -> None:
    """Other tensors for buffers that exist; an attribute assignment costs many times as much."""
    kept = {name: lasting(value) for name, value in values.items()}
    if torch.compiler.is_compiling():
        for name, value in kept.items():
            setattr(module, name, value)
    else:
        module._buffers.update(kept)


def is_recomputed() -> bool:
    """Whether this forward runs inside a backward: of a batch that gradient checkpointing sees again.

    Compiled code can't ask.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class Phased(nn.Module):
    """A module with a buffer ``phase``: training batches seen, whether it is enabled, whether it observes.

    Python reads the numbers from a copy, so that no device is waited for; it is read anew after a change from outside.
    """

    phase: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("phase", torch.tensor([0, PART, PART]))
        self._read: tuple[Tensor, int, tuple[int, ...]] = (self.phase, 0, (0, 1, 1))

    def read_phase(self) -> tuple[int, ...]:
        """The three numbers."""
        if torch.compiler.is_compiling():
            return self._read[2]
        phase = self.phase
        if phase.is_meta:
            return 0, 1, 1
        version = -1 if phase.is_inference() else phase._version
        if self._read[0] is not phase or self._read[1] != version or version < 0:
            self.reread()
        return self._read[2]

    def reread(self) -> None:
        """Look at the buffer again: state that was loaded is known before anything is compiled or exported."""
        if not self.phase.is_meta:
            version = -1 if self.phase.is_inference() else self.phase._version
            self._read = self.phase, version, tuple((n + PART // 2) // PART for n in self.phase.tolist())

    @torch.compiler.disable
    def _write_phase(self, place: int, value: int) -> None:
        with torch.no_grad(), torch.inference_mode(False):
            phase = self.phase.clone()
            phase[place] = value * PART
            self.phase = phase
        self.reread()

    @property
    def batches_seen(self) -> int:
        """Training batches seen, up to the number that matters."""
        return self.read_phase()[_SEEN]

    @batches_seen.setter
    def batches_seen(self, value: int) -> None:
        self._write_phase(_SEEN, value)

    @property
    def enabled(self) -> bool:
        """Whether it quantizes; off, everything passes unchanged."""
        return bool(self.read_phase()[_ENABLED])

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._write_phase(_ENABLED, int(value))

    @property
    def observing(self) -> bool:
        """Whether ranges still follow the data."""
        return bool(self.read_phase()[_OBSERVING])

    @observing.setter
    def observing(self, value: bool) -> None:
        self._write_phase(_OBSERVING, int(value))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """A state of the float model has none of these names: then all stays as it is."""
        if not any(key.startswith(prefix) for key in state_dict):
            self.reset()
            return
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self.reread()

    def reset(self) -> None:
        """Other weights were loaded: what was learned from the old ones is forgotten."""
