"""Which errors say that memory ran out, of the device or of the computer."""

from __future__ import annotations

import sys

#: How allocators say so that raise no error of their own kind.
#: Drivers and Triton do not raise the allocator's type either: "CUDA error: out of memory", "Triton Error [CUDA]:
#: out of memory".
_SIGNS = (
    "DefaultCPUAllocator",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
    "[CUDA]: out of memory",
    # Python, where a limit leaves no room for the stack of one.
    "can't start new thread",
    # torch, where its own code finds none.
    "bad_alloc",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this says that memory ran out, of the device or of the computer."""
    # Not imported here: where torch cannot be loaded, that is the error.
    of_torch = getattr(sys.modules.get("torch"), "OutOfMemoryError", MemoryError)
    if isinstance(error, (of_torch, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def explain_in_brief(error: BaseException) -> str:
    """What an allocator, a driver or a loader says, in part of a line."""
    return " ".join(str(error).split())[:120] or type(error).__name__
