"""Too little memory on CUDA: packs are split, single sequences go to the CPU. Skipped without a CUDA device."""

import gc
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from on_cuda import cuda, make_pack, needs_cuda, on

from seqmill.embedding.embedder import PackEmbedder
from seqmill.embedding.readout import Readout
from seqmill.model.esm2 import ESM2
from seqmill.model.pack import Pack
from seqmill.model.weights import untrained_tensors
from seqmill.spec.models import MODELS
from seqmill.spec.outputs import Outputs
from sequences import relative_error

pytestmark = needs_cuda

ARCHITECTURE = MODELS["esm2_t12_35M_UR50D"]


@pytest.fixture
def embed() -> Iterator[PackEmbedder]:
    """ESM-2 35M in float32; the limit of the memory is taken back."""
    tensors = untrained_tensors(ARCHITECTURE)

    def model() -> ESM2:
        return ESM2(ARCHITECTURE, tensors, torch.float32, 30_000, "sdpa")

    yield PackEmbedder(model().cuda(), Readout(ARCHITECTURE.family, Outputs((ARCHITECTURE.num_layers,))), model)
    torch.cuda.set_per_process_memory_fraction(1.0)


def spare_of(embed: PackEmbedder, pack: Pack) -> tuple[np.ndarray, int]:
    """Return a pack's embeddings, and the bytes that computing it takes."""
    before = free_what_is_unused()
    torch.cuda.reset_peak_memory_stats()
    rows = embed(pack).rows.cpu().numpy()
    return rows, torch.cuda.max_memory_allocated() - before


def free_what_is_unused() -> int:
    """Return the bytes that are still allocated."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


def leave(spare: float) -> None:
    """Let this process allocate so many bytes more."""
    total = torch.cuda.get_device_properties(cuda()).total_memory
    torch.cuda.set_per_process_memory_fraction((free_what_is_unused() + spare) / total)


def test_a_pack_that_does_not_fit_is_split(embed: PackEmbedder) -> None:
    pack = on(cuda(), make_pack([300] * 64))
    expected, spare = spare_of(embed, pack)
    assert embed.splits == 0
    leave(0.4 * spare)
    found = embed(pack).rows.cpu().numpy()
    assert embed.splits > 0
    assert embed.on_cpu == 0
    assert relative_error(found, expected) < 1e-6


def test_a_sequence_that_does_not_fit_goes_to_the_cpu(embed: PackEmbedder) -> None:
    pack = on(cuda(), make_pack([8000, 200, 100, 30]))
    expected, _ = spare_of(embed, pack)
    alone = on(cuda(), make_pack([8000]))
    _, spare = spare_of(embed, alone)
    leave(0.5 * spare)
    found = embed(pack).rows.cpu().numpy()
    assert embed.on_cpu == 1
    assert relative_error(found, expected) < 1e-5
    # The next pack that fits is computed on the device again.
    on_cpu = embed.on_cpu
    small = on(cuda(), make_pack([200, 100, 30]))
    embed(small)
    assert embed.on_cpu == on_cpu
