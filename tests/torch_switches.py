# SPDX-License-Identifier: Apache-2.0
"""What torch has switched on in this process."""

import sys
from typing import Any

import torch


def switches() -> dict[str, Any]:
    """What runs of a model may turn and must put back."""
    attention = ("flash", "mem_efficient", "math", "cudnn")
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    return {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "dtype": torch.get_default_dtype(),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "attention": [getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in attention],
        "autocast": [torch.is_autocast_enabled(device) for device in ("cpu", "cuda")],
        "function modes": torch._C._len_torch_function_stack(),
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "tracing": torch.fx._symbolic_trace._get_is_fx_tracing(),
        "stance": "default" if compiler is None else compiler._stance.stance,
    }
