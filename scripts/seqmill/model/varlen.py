"""PyTorch's FlashAttention over packs, by the operation behind `torch.nn.attention.varlen`.

Importing that module imports PyTorch's compiler, 800 modules, only to tell it about an operation that is not used here
(docs/explanation/performance.md). The operation needs no import, and one GPU kernel less in each layer: the module also
fills the state of a random generator. But the operation is private, so it is called only if it has the known arguments.
"""

from collections.abc import Callable

import torch

POSITIONAL = (
    *("query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k"),
    *("dropout_p", "is_causal", "return_debug_mask"),
)
NO_DROPOUT, NOT_CAUSAL, NO_DEBUG_MASK = 0.0, False, False
NO_WINDOW = {"window_size_left": -1, "window_size_right": -1}


def find_operation() -> tuple[Callable[..., torch.Tensor], dict[str, int]] | None:
    """Return the operation, to be called like `varlen_attn`, and its options; None if it has other arguments.

    The option num_splits, which came with PyTorch 2.12, is explained in `attention`.
    """
    try:
        operation = torch.ops.aten._flash_attention_forward.default
    except AttributeError:
        return None
    schema = operation._schema
    named = {argument.name: argument for argument in schema.arguments if argument.kwarg_only}
    positional = tuple(argument.name for argument in schema.arguments if not argument.kwarg_only)
    is_optional = all(argument.has_default_value() for argument in named.values())
    if positional != POSITIONAL or not {"scale", *NO_WINDOW} <= named.keys() or not is_optional:
        return None

    def attend(*pack: torch.Tensor | int, scale: float, **options: int) -> torch.Tensor:
        fixed = NO_DROPOUT, NOT_CAUSAL, NO_DEBUG_MASK
        output, *_ = operation(*pack, *fixed, scale=scale, **NO_WINDOW, **options)
        return output

    return attend, ({"num_splits": 1} if "num_splits" in named else {})
