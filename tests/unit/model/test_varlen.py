"""When PyTorch's FlashAttention is called without its module. tests/rehearsal/test_signatures.py tests the calls."""

from types import SimpleNamespace

import pytest
import torch

from seqmill.model import varlen
from seqmill.model.varlen import find_operation

PACK = "Tensor query, Tensor key, Tensor value, Tensor? cum_seq_q, Tensor? cum_seq_k, SymInt max_q, SymInt max_k"
USUAL = f"{PACK}, float dropout_p, bool is_causal, bool return_debug_mask"
WINDOW = "float? scale=None, SymInt? window_size_left=None, SymInt? window_size_right=None"


def pytorch_with(**operations: object) -> SimpleNamespace:
    return SimpleNamespace(ops=SimpleNamespace(aten=SimpleNamespace(**operations)), Tensor=torch.Tensor)


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (f"{USUAL}, *, {WINDOW}, Tensor? seqused_k=None, Tensor? alibi_slopes=None", {}),
        (f"{USUAL}, *, {WINDOW}, Tensor? block_table=None, int? num_splits=None", {"num_splits": 1}),
        (f"{USUAL}, *, {WINDOW}, Tensor sinks", None),  # a new argument that must be given
        (f"{USUAL}, Tensor? sinks=None, *, {WINDOW}", None),
        (f"{PACK}, bool is_causal, bool return_debug_mask, *, {WINDOW}", None),
        (f"{USUAL}, *, float? softmax_scale=None", None),
    ],
)
def test_an_operation_with_other_arguments_is_not_called(
    monkeypatch: pytest.MonkeyPatch, arguments: str, options: dict[str, int] | None
) -> None:
    schema = torch._C.parse_schema(f"aten::_flash_attention_forward({arguments}) -> (Tensor output, Tensor lse)")
    operation = SimpleNamespace(default=SimpleNamespace(_schema=schema))
    monkeypatch.setattr(varlen, "torch", pytorch_with(_flash_attention_forward=operation))
    found = find_operation()
    assert (found and found[1]) == options


def test_a_pytorch_without_the_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "torch", pytorch_with())
    assert find_operation() is None
