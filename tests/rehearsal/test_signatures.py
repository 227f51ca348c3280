"""Packages of attention are called as each of their versions wants it.

The signatures are those of the documentation and the sources of PyTorch 2.10 to 2.13, and of flash-attention v2.0.0 to
v2.8.3 (its folder hopper is FlashAttention 3). Behind each is PyTorch's attention on the CPU.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pipeline import SCRIPTS
from seqmill.errors import SeqmillError
from seqmill.model import alibi, attention, varlen
from seqmill.model.pack import Pack

CUDA = torch.device("cuda")
PACK = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
DROPOUT = f"q, k, v, {PACK}, dropout_p=0.0, softmax_scale=None, causal=False"
PYTORCHS = "query, key, value, cu_seq_q, cu_seq_k, max_q, max_k"
HOPPER = f"""q, k, v, {PACK}, seqused_q=None, seqused_k=None, softmax_scale=None, causal=False, qv=None,
    q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=0,
    pack_gqa=None, deterministic=False, sm_margin=0"""
# The kernel, its parameters, whether it also returns the log-sum-exp, and options that must be given if it has them.
VERSIONS = {
    "torch 2.10": ("varlen", f"{PYTORCHS}, is_causal=False, return_aux=None", False),
    "torch 2.11": ("varlen", f"{PYTORCHS}, *, return_aux=None, scale=None, window_size=(-1, -1)", False),
    "torch 2.12 and 2.13": (
        "varlen",
        f"{PYTORCHS}, *, return_aux=None, scale=None, window_size=(-1, -1), enable_gqa=False, seqused_k=None, "
        "block_table=None, num_splits=None",
        False,
    ),
    "flash_attn 2.0": ("flash_attn_2", f"{DROPOUT}, return_attn_probs=False", False),
    "flash_attn 2.3": ("flash_attn_2", f"{DROPOUT}, window_size=(-1, -1), return_attn_probs=False", False),
    "flash_attn 2.4": (
        "flash_attn_2",
        f"{DROPOUT}, window_size=(-1, -1), alibi_slopes=None, deterministic=False, return_attn_probs=False",
        False,
    ),
    "flash_attn 2.8": (
        "flash_attn_2",
        f"{DROPOUT}, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, "
        "return_attn_probs=False, block_table=None",
        False,
    ),
    "hopper of 2.6": ("flash_attn_3", f"q, k, v, {PACK}, softmax_scale=None, causal=False", True),
    "hopper of 2.8": ("flash_attn_3", HOPPER, True),
    "hopper after 2.8": ("flash_attn_3", f"{HOPPER}, return_attn_probs=False", False),
}


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, scale: float) -> torch.Tensor:
    sizes = cu_seqlens.diff().tolist()
    each = zip(*(t.transpose(0, 1).split(sizes, dim=1) for t in (q, k, v)), strict=True)
    outputs = [F.scaled_dot_product_attention(*parts, scale=scale) for parts in each]
    return torch.cat(outputs, dim=1).transpose(0, 1).contiguous()


def stand_in(parameters: str, with_lse: bool, calls: list[dict[str, Any]]) -> Callable[..., Any]:
    """A function with these parameters, which notes them."""

    def compute(given: dict[str, Any]) -> Any:
        calls.append(given)
        q, k, v, cu_q, cu_k, max_q, max_k = list(given.values())[:7]
        assert cu_q is cu_k
        assert cu_q.dtype == torch.int32
        assert max_q == max_k == cu_q.diff().max()
        scale = given.get("scale", given.get("softmax_scale"))
        output = dense(q, k, v, cu_q, q.shape[-1] ** -0.5 if scale is None else scale)
        return (output, torch.empty(0)) if with_lse else output

    space: dict[str, Any] = {"compute": compute}
    exec(f"def function({parameters}): return compute(dict(locals()))", space)
    return space["function"]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], list[dict[str, Any]]]]:
    """Installs a version on a GPU of compute capability 9.0; its calls come into the list that is returned."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(varlen, "find_operation", lambda: None)  # so that PyTorch's module is called
    attention._packed_function.cache_clear()

    def install(version: str) -> list[dict[str, Any]]:
        kernel, parameters, with_lse = VERSIONS[version]
        name, function = attention.PACKED[kernel]
        module, calls = ModuleType(name), []
        setattr(module, function, stand_in(parameters, with_lse, calls))
        monkeypatch.setitem(sys.modules, name, module)
        return calls

    yield install
    attention._packed_function.cache_clear()


def make_pack(lengths: list[int]) -> tuple[Pack, tuple[torch.Tensor, ...]]:
    pack = Pack.from_tokens(np.zeros(sum(lengths), np.uint8), np.array(lengths, np.int64))
    return pack, torch.randn(sum(lengths), 3, 4, 32, generator=torch.Generator().manual_seed(1)).unbind(1)


@pytest.mark.parametrize("version", VERSIONS)
def test_each_version_is_called_as_it_wants(version: str, install: Callable[[str], list[dict[str, Any]]]) -> None:
    calls, kernel = install(version), VERSIONS[version][0]
    pack, (q, k, v) = make_pack([40, 17, 9])
    assert attention.choose_kernel(CUDA, torch.bfloat16, 32, kernel) == kernel
    found = attention.packed(kernel, q, k, v, pack)
    torch.testing.assert_close(found, dense(q, k, v, pack.cu_seqlens, 32**-0.5).flatten(1))
    (given,) = calls
    assert given.get("num_splits", 1) == 1  # so that the bits don't depend on the pack's longest sequence
    assert not given.get("causal", given.get("is_causal", False))
    assert given.get("dropout_p", 0.0) == 0.0


@pytest.mark.parametrize("version", [version for version in VERSIONS if version.startswith("flash_attn")])
def test_linear_biases_need_a_version_that_has_them(
    version: str, install: Callable[[str], list[dict[str, Any]]]
) -> None:
    calls = install(version)
    if "alibi_slopes" in VERSIONS[version][1]:
        assert alibi.choose_kernel(CUDA, torch.bfloat16, 32, "flash_attn_2") == "flash_attn_2"
        pack, (q, k, v) = make_pack([40, 17, 9])
        biases = alibi.make_biases("flash_attn_2", 4, 40, torch.float32)
        alibi.attend("flash_attn_2", torch.stack((q, k, v), dim=1), biases, pack)
        assert calls[0]["alibi_slopes"] is biases
    else:
        with pytest.raises(
            SeqmillError, match=r"this version of flash_attn has no linear biases, which came with 2\.4"
        ):
            alibi.choose_kernel(CUDA, torch.bfloat16, 32, "flash_attn_2")


def test_the_operation_gets_the_same_call_as_from_pytorchs_module() -> None:
    """With the installed PyTorch; the operation has only a kernel for CUDA, so it gets one for the CPU here."""
    from torch.nn.attention.varlen import varlen_attn

    calls: list[tuple[Any, ...]] = []

    def on_cpu(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any, scale: float, **options: Any) -> Any:
        calls.append((*(t.tolist() if torch.is_tensor(t) else t for t in rest), scale, options))
        return dense(q, k, v, rest[0], scale), *(torch.empty(0) for _ in range(4))

    found = varlen.find_operation()
    assert found is not None
    operation, options = found
    pack, qkv = make_pack([40, 17])
    arguments = *qkv, pack.cu_seqlens, pack.cu_seqlens, 40, 40
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", on_cpu, "CPU")
        ours, theirs = (function(*arguments, scale=0.25, **options) for function in (operation, varlen_attn))
    assert torch.equal(ours, theirs)
    assert len(calls) == 2
    assert calls[0] == calls[1]
    assert calls[0][-1]["num_splits"] == 1


def test_choosing_it_does_not_import_pytorchs_compiler() -> None:
    code = """
import sys, torch
torch.cuda.get_device_capability = lambda device: (9, 0)
from seqmill.model.attention import choose_kernel
assert choose_kernel(torch.device("cuda"), torch.bfloat16, 64, "varlen") == "varlen"
assert not {"torch._dynamo", "torch.nn.attention.varlen"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(SCRIPTS)}, check=True)
