"""The asynchronous runner on CUDA compared with one pack at a time. Skipped without a CUDA device."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from on_cuda import cuda, embedder, make_model, needs_cuda, on

from pipeline import Run
from seqmill.embedding.pooling import mean_over_residues
from seqmill.embedding.runner import embed_packs
from seqmill.model.elementwise import EAGER, TRITON
from seqmill.model.kernels import fused
from seqmill.model.pack import Pack
from seqmill.spec.models import MODELS
from seqmill.store.index import open_index
from sequences import random_sequences

pytestmark = needs_cuda


@pytest.mark.parametrize("elementwise", [EAGER, TRITON])
def test_the_asynchronous_runner_matches_one_pack_at_a_time(tmp_path: Path, elementwise: str) -> None:
    fasta = tmp_path / "many.faa"
    lengths = np.random.default_rng(1).integers(1, 1022, 600).tolist()
    fasta.write_text("".join(f">{number}\n{s}\n" for number, s in enumerate(random_sequences(lengths))))
    index = open_index(Run(tmp_path, 1).build(fasta).index)
    model = make_model(MODELS["esm2_t6_8M_UR50D"], torch.bfloat16, elementwise, index.max_tokens)
    found = list(embed_packs(embedder(model), index, range(index.num_packs), cuda(), threads=1))
    assert [number for number, *_ in found] == list(range(index.num_packs))
    assert len(found) > 20
    for number, embeddings, _ in found:
        pack = on(cuda(), Pack.from_tokens(index.pack_tokens(number), index.pack_lengths(number)))
        assert (mean_over_residues(model(pack), pack).float().cpu().numpy() == embeddings).all()


@dataclass(frozen=True)
class Packs:
    """Packs of the given lengths; has what the runner reads of an index."""

    lengths: list[np.ndarray]
    is_blended = has_segments = False
    stride = 0

    def pack_lengths(self, pack: int) -> np.ndarray:
        return self.lengths[pack]

    def pack_tokens(self, pack: int) -> np.ndarray:
        return np.random.default_rng(pack).integers(4, 24, self.lengths[pack].sum()).astype(np.uint8)

    def first_segment(self, pack: int) -> int:
        return 0

    def pack_windows(self, pack: int) -> None:
        return None

    def pack_segments(self, pack: int) -> None:
        return None


@contextmanager
def other_work() -> Iterator[None]:
    """Keep the device busy from another thread, on a stream of its own, with memory that comes and goes."""
    ended = threading.Event()

    def work() -> None:
        stream = torch.cuda.Stream(cuda())
        with torch.cuda.stream(stream):
            while not ended.is_set():
                for size in (64, 2048, 512):
                    x = torch.randn(size, size, device=cuda())
                    (x @ x).sum()
                stream.synchronize()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@pytest.mark.parametrize("elementwise", [EAGER, TRITON])
def test_packs_of_very_different_sizes_keep_their_bits_beside_other_work(elementwise: str) -> None:
    """A result that is copied too early, or a buffer that is used again too early, would show as another value."""
    if elementwise == TRITON and not fused.available(cuda()):
        pytest.skip("Triton's kernels are not available")
    generator = np.random.default_rng(9)
    tokens = generator.choice([3, 40, 900, 9000, 30000], 60, p=[0.3, 0.2, 0.2, 0.2, 0.1])
    lengths = [np.full(max(size // 300, 1), min(size, 300), np.int64) for size in tokens.tolist()]
    packs = Packs(lengths)
    model = make_model(MODELS["esm2_t6_8M_UR50D"], torch.bfloat16, elementwise)
    one_by_one = []
    for number in range(len(lengths)):
        pack = on(cuda(), Pack.from_tokens(packs.pack_tokens(number), packs.pack_lengths(number)))
        one_by_one.append(mean_over_residues(model(pack), pack).float().cpu().numpy())
    with other_work():
        for _ in range(3):
            found = list(embed_packs(embedder(model), packs, range(len(lengths)), cuda(), threads=1))
            assert [number for number, *_ in found] == list(range(len(lengths)))
            for number, rows, _ in found:
                assert np.array_equal(rows, one_by_one[number]), f"pack {number} of {tokens[number]} tokens"
