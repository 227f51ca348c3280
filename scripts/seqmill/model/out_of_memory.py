"""Failed allocations, of the host or the device, however they are reported."""

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")

# Texts in errors that have no type of their own. Triton's OutOfResources is another matter: its kernel is too large.
OUT_OF_MEMORY = (
    *("can't allocate memory", "could not create a memory object", "could not execute a primitive"),  # CPU, oneDNN
    "out of memory",  # CUDA's runtime, CUDA's driver, Triton
    *("_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED"),  # cuBLAS, cuDNN; the latter without room for a handle
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an allocation failed."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(text in str(error) for text in OUT_OF_MEMORY)


def unless_out_of_memory(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
    """Return what a function returns; None if an allocation failed.

    By then the error is gone, whose traceback holds the function's tensors.
    """
    try:
        return function(*args, **kwargs)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    return None
