"""Runs of the real runner on the simulated CUDA, with a model that is small, exact, and sensitive to every token."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import patch
from zlib import crc32

import numpy as np
import torch

from families import random_contigs
from pipeline import Run
from seqmill.embedding import embedder, readout, runner
from seqmill.embedding.embedder import PackEmbedder
from seqmill.embedding.pooling import Pooling
from seqmill.embedding.readout import Readout
from seqmill.model.pack import Pack
from seqmill.spec.families import DNABERT_S, ESM2
from seqmill.spec.lengths import LengthPolicy
from seqmill.spec.outputs import Outputs
from seqmill.spec.packing import plan_packs
from seqmill.store.index import Index, open_index
from sequences import random_sequences
from simulated_cuda import CUDA, Race, SimulatedCuda, apply, is_pinned

DIM = 3
PACK_TOKENS, PIECE_TOKENS, KEPT_TOKENS = 240, 100, 60
Result = tuple[int, np.ndarray, np.ndarray]


class ExactModel:
    """Hidden states are whole numbers of a token and its position, so any split of a pack gives the same bits."""

    architecture = SimpleNamespace(hidden_dim=DIM)

    def hidden_states(self, pack: Pack, layers: tuple[int, ...]) -> Iterator[tuple[int, torch.Tensor]]:
        number = len(pack.tokens)
        states = apply(partial(_embed, pack.lengths), (number, DIM), torch.float32, pack.tokens, pack.cu_seqlens)
        for layer in layers:
            wide = apply(lambda x: x.repeat(1, 4) + 1, (number, 4 * DIM), torch.float32, states)
            states = apply(lambda x: x[:, DIM : 2 * DIM] + 1, (number, DIM), torch.float32, wide)
            yield layer, states


def _embed(lengths: np.ndarray, tokens: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    if cu_seqlens[0] != 0 or cu_seqlens.diff().tolist() != lengths.tolist():
        raise Race(f"boundaries {cu_seqlens.tolist()} instead of those of {lengths.tolist()}")
    position = torch.cat([torch.arange(length) for length in lengths.tolist()])
    token = tokens.long()
    return torch.stack([token, position, token * position % 31], dim=1).float()


def _sum(hidden: torch.Tensor, pack: Pack) -> torch.Tensor:
    def kernel(hidden: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        return torch.segment_reduce(hidden, "sum", lengths=cu_seqlens.diff().long(), axis=0)

    return apply(kernel, (len(pack.lengths), hidden.shape[1]), hidden.dtype, hidden, pack.cu_seqlens)


@dataclass(frozen=True)
class Case:
    """An index of a few packs, and what the CPU makes of it."""

    index: Index
    readout: Readout
    expected: list[Result]


def make_case(folder: Path, name: str) -> Case:
    """Return the case of that name: proteins, residues, windows (blended, with residues), or contigs (uint16)."""
    family, model, policy = ESM2, "untrained:esm2_t6_8M_UR50D", LengthPolicy()
    lengths = np.random.default_rng(7).integers(3, 60, 40).tolist()
    texts = random_sequences(lengths)
    if name == "windows":
        policy = LengthPolicy("window", 30, 30, 15)
    if name == "contigs":
        family, model, policy = DNABERT_S, "untrained:dnabert_s", LengthPolicy("window", 150, 150, 100)
        texts = random_contigs([6 * length for length in lengths])
    fasta = folder / "sequences.fa"
    fasta.write_text("".join(f">{number}\n{text}\n" for number, text in enumerate(texts)))
    index = in_small_packs(open_index(Run(folder, 1).build(fasta, model, policy).index))
    outputs = Outputs((0, 1), per_residue={"residues": "float16", "windows": "float32"}.get(name, ""))
    reader = Readout(family, outputs)
    reader._poolings = [Pooling(_sum)]
    with small_pieces(runner):
        expected = list(runner.embed_packs(make_embed(reader), index, range(index.num_packs), torch.device("cpu"), 2))
    return Case(index, reader, expected)


def in_small_packs(index: Index) -> Index:
    """Return the index with many packs of PACK_TOKENS, whatever the plan of its making."""
    begins = index.segment_offsets[index.sequence_segments] if index.has_segments else index.token_offsets
    offsets = plan_packs(begins, PACK_TOKENS)
    edges = index.token_offsets[offsets]
    checksums = [crc32(index.tokens[begin:end]) for begin, end in pairwise(edges)]
    return replace(index, pack_offsets=offsets, pack_checksums=np.array(checksums, np.uint32))


def make_embed(reader: Readout) -> PackEmbedder:
    return PackEmbedder(ExactModel(), reader, ExactModel)


@contextmanager
def small_pieces(module: ModuleType, pieces: int = PIECE_TOKENS) -> Iterator[None]:
    with ExitStack() as stack:
        for name in ("CPU_PIECE_TOKENS", "CUDA_PIECE_TOKENS"):
            stack.enter_context(patch.object(module, name, pieces))
        for name in ("CPU_KEPT_TOKENS", "CUDA_KEPT_TOKENS"):
            stack.enter_context(patch.object(embedder, name, KEPT_TOKENS))
        yield


@contextmanager
def on_cuda(cuda: SimulatedCuda, module: ModuleType = runner, pieces: int = PIECE_TOKENS) -> Iterator[None]:
    """Let the runner and what it calls see the simulated CUDA; afterwards raise the first error on the device."""
    with ExitStack() as stack:
        for each in (module, embedder, readout):
            stack.enter_context(patch.object(each, "torch", cuda.torch))
        stack.enter_context(small_pieces(module, pieces))
        yield
    if cuda.errors:
        raise Race(f"on the device: {cuda.errors[0]!r}") from cuda.errors[0]


def run_on(
    cuda: SimulatedCuda,
    case: Case,
    packs: Iterable[int],
    module: ModuleType = runner,
    pieces: int = PIECE_TOKENS,
    embed: PackEmbedder | None = None,
    results: list[Result] | None = None,
) -> list[Result]:
    """Compute packs of a case; results are added to `results`, so that they can be seen after an error."""
    results = [] if results is None else results
    embed = embed or make_embed(case.readout)
    with on_cuda(cuda, module, pieces), closing(module.embed_packs(embed, case.index, packs, CUDA, 1)) as computed:
        results.extend(computed)
    return results


def require_equal(results: list[Result], expected: list[Result]) -> None:
    """Raise Race unless the results have the same bits in the same order, in memory of their own."""
    if (found := [pack for pack, *_ in results]) != (order := [pack for pack, *_ in expected]):
        raise Race(f"packs {found} instead of {order}")
    for (pack, *arrays), (_, *exact) in zip(results, expected, strict=True):
        for array, right in zip(arrays, exact, strict=True):
            if array.dtype != right.dtype or not np.array_equal(array, right):
                raise Race(f"pack {pack}: {array.dtype} {array.shape} differs from the CPU's")
            if is_pinned(array):
                raise Race(f"pack {pack}: a result holds pinned memory")


def require_overlap(cuda: SimulatedCuda, case: Case) -> None:
    """Raise Race if a pack's copies delayed the computing stream, or a wait kept a core busy."""
    if cuda.default.copies and not case.index.is_blended:  # the boundaries of blended sequences are copied there
        raise Race(f"{cuda.default.copies} copies on the computing stream")
    if cuda.busy_waits:
        raise Race(f"{cuda.busy_waits} waits that keep a core busy")
