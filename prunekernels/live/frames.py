"""What torch.compile is told of functions that it cannot trace."""

from __future__ import annotations

from typing import Any

import torch


def skip_frames(*functions: Any) -> None:
    """Makes torch.compile leave alone what these functions run, unless it inlines them into another function.

    torch.compiler.disable does the same, but imports the compiler and costs a microsecond a call.
    """
    frames: Any = getattr(getattr(torch._C, "_dynamo", None), "eval_frame", None)
    if all(hasattr(frames, n) for n in ("set_code_exec_strategy", "_FrameExecStrategy", "_FrameAction")):
        skip = frames._FrameExecStrategy(frames._FrameAction.SKIP, frames._FrameAction.SKIP)
        for function in functions:
            frames.set_code_exec_strategy(function.__code__, skip)


def never_inline(reason: str, *functions: Any) -> None:
    """Makes torch.compile break the graph at these functions, and tell why."""
    for function in functions:
        function._torchdynamo_disable, function._torchdynamo_disable_msg = True, reason
