# SPDX-License-Identifier: Apache-2.0
"""Torch's own switches that decide how a forward runs: of the process, not of a model."""

import sys

import torch
from torch.overrides import _pop_mode as _pop_function_mode
from torch.utils._python_dispatch import _pop_mode as _pop_dispatch_mode

_DEVICES = ("cpu", "cuda")


class TorchSwitches:
    """Fast attention, autocast, torch.compile's stance, the gradient mode and how many modes watch, as they are now.

    ``restore`` may be called any number of times: an interrupt can fall between the lines of a context manager, and
    then nobody but the one who remembers the switches can put them back.
    """

    def __init__(self) -> None:
        self._grad = torch.is_grad_enabled()
        self._depths = torch._C._len_torch_dispatch_stack(), torch._C._len_torch_function_stack()
        self._fast_path = torch.backends.mha.get_fastpath_enabled()
        self._attention = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()
        self._attention_math = torch.backends.cuda.math_sdp_enabled(), torch.backends.cuda.cudnn_sdp_enabled()
        self._autocast = [torch.is_autocast_enabled(device) for device in _DEVICES]
        self._stance = None
        if "torch._dynamo" in sys.modules:
            # Its constructor sets the new stance and remembers the old one, which leaving it brings back.
            (stance := torch.compiler.set_stance("default")).__exit__(None, None, None)
            self._stance = stance

    def restore(self) -> None:
        """Put all of them back; modes that nobody left are left."""
        dispatch, functions = self._depths
        while torch._C._len_torch_dispatch_stack() > dispatch:
            _pop_dispatch_mode()
        while torch._C._len_torch_function_stack() > functions:
            _pop_function_mode()
        torch.set_grad_enabled(self._grad)
        torch.backends.mha.set_fastpath_enabled(self._fast_path)
        flash, efficient = self._attention
        math, cudnn = self._attention_math
        torch.backends.cuda.enable_flash_sdp(flash)
        torch.backends.cuda.enable_mem_efficient_sdp(efficient)
        torch.backends.cuda.enable_math_sdp(math)
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        for device, enabled in zip(_DEVICES, self._autocast, strict=True):
            torch.set_autocast_enabled(device, enabled)
        if self._stance is not None:
            self._stance.__exit__(None, None, None)


def plain_forwards() -> None:
    """The model's own code in its own dtypes, in operators that can be seen: until the switches are restored."""
    torch.backends.mha.set_fastpath_enabled(False)
    torch.backends.cuda.enable_math_sdp(True)
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    for device in _DEVICES:
        torch.set_autocast_enabled(device, False)
    if "torch._dynamo" in sys.modules:
        torch.compiler.set_stance("force_eager")
