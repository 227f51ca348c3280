"""Embedding sequences from Python, without files: with the packs, kernels and policies of the workflow."""

import logging
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from collections.abc import Sequence as Several
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain, pairwise
from operator import index as index_of
from typing import Literal, overload

import numpy as np
import torch
from tqdm import tqdm

from seqmill.api.records import Sequences, read_blocks
from seqmill.embedding.device import choose_precision, dtype_of
from seqmill.embedding.embedder import DoesNotFit, PackEmbedder
from seqmill.embedding.finite import FiniteResults
from seqmill.embedding.job import UNTRAINED_WARNING, memory_explained
from seqmill.embedding.readout import Readout
from seqmill.embedding.runner import CPU_PIECE_TOKENS, embed_packs
from seqmill.errors import SeqmillError
from seqmill.index.arrange import log_changes
from seqmill.index.fasta import FastaRecord
from seqmill.index.memory import index_in_memory
from seqmill.index.tokens import RecordTokenizer, make_tokenizer
from seqmill.model.encoder import Encoder, make_encoder
from seqmill.model.weights import load_weights
from seqmill.spec.lengths import LengthPolicy
from seqmill.spec.models import ModelSource
from seqmill.spec.outputs import Outputs
from seqmill.spec.packing import MAX_PACK_TOKENS, PACKS_WANTED
from seqmill.store.index import Index, residue_offsets
from seqmill.store.index_format import Fate

Embedded = np.ndarray | list[np.ndarray]
BLOCK_BYTES = 256 << 20  # of the vectors in a block of `Embedder.stream`

log = logging.getLogger(__name__)
# Computing sets the number of torch's threads, which the whole process shares.
_computing = threading.Lock()


@dataclass(frozen=True)
class _Result:
    """What to compute, and the shape of the result."""

    outputs: Outputs  # with layers from 0 on
    axes: tuple[int, ...]  # layers and poolings asked for in lists

    def __call__(self, vectors: np.ndarray) -> np.ndarray:
        """Return vectors (n, outputs * hidden_dim) as (n, *axes, hidden_dim)."""
        width = len(self.outputs.layers) * (1 if self.outputs.per_residue else len(self.outputs.poolings))
        return vectors.reshape(len(vectors), *self.axes, vectors.shape[1] // width)


class Embedder:
    """A model that is loaded, as `seqmill.load` returns it.

    Threads may share it: one computes at a time. After Ctrl-C it can be used again.

    Attributes:
        name: the model's name, as it was given.
        device: where it computes.
        precision: of the matrix products.
        policy: how long sequences are treated.
        dim: numbers in a vector.
        num_layers: of the model; `layers` may be 0 to `num_layers`, or negative to count from the end.
        trained: whether the weights are trained; embeddings of untrained ones have no meaning.
    """

    def __init__(self, source: ModelSource, device: torch.device, precision: str, policy: LengthPolicy) -> None:
        self.name, self.device, self.policy = source.name, device, policy
        self.precision = choose_precision(precision, self.device)
        self._source, self._max_tokens = source, 2  # grows with the sequences
        self._tokenizer = make_tokenizer(source, policy)
        weights = load_weights(source)
        architecture, self.trained = weights.architecture, weights.trained
        self.dim, self.num_layers = architecture.hidden_dim, architecture.num_layers
        dtype = dtype_of(self.precision)
        with memory_explained(f"{source.name} in {self.precision}", self.device):
            model = make_encoder(weights, dtype, self._max_tokens, self.device)
        readout = Readout(source.family, Outputs().of(self.num_layers))
        self._embed_pack = PackEmbedder(model, readout, lambda: self._make_encoder(torch.device("cpu"), dtype))
        self._exact: dict[torch.device, Encoder] = {}  # in float32, made when it is needed
        if not self.trained:
            log.warning(UNTRAINED_WARNING)

    def __repr__(self) -> str:
        return f"<Embedder {self.name}, {self.dim} dimensions, {self.precision} on {self.device}>"

    @overload
    def embed(
        self,
        sequences: Sequences,
        *,
        layers: int | Several[int] = ...,
        pooling: str | Several[str] = ...,
        per_residue: Literal[False] = ...,
        progress: bool | None = ...,
    ) -> np.ndarray: ...

    @overload
    def embed(
        self,
        sequences: Sequences,
        *,
        layers: int | Several[int] = ...,
        per_residue: Literal[True],
        progress: bool | None = ...,
    ) -> list[np.ndarray]: ...

    @overload
    def embed(
        self,
        sequences: Sequences,
        *,
        layers: int | Several[int] = ...,
        pooling: str | Several[str] = ...,
        per_residue: bool,
        progress: bool | None = ...,
    ) -> Embedded: ...

    def embed(
        self,
        sequences: Sequences,
        *,
        layers: int | Several[int] = -1,
        pooling: str | Several[str] = "mean",
        per_residue: bool = False,
        progress: bool | None = None,
    ) -> Embedded:
        """Return the vectors of sequences, in the order given; equal sequences are computed once.

        For the same sequences, settings and device they have the same bits as those in the workflow's embeddings.h5.

        Args:
            sequences: one sequence, several in a list or another iterable, a dict or a pandas Series from ids to
                sequences, or a FASTA file (plain, gzip, bgzip or zstd). A sequence is text, a Bio.Seq or a SeqRecord;
                in a list also a tuple of an id and one of these. A file is a Path, or text with a "." or a "/", which
                no sequence has.
            layers: one or a list: -1 is the last layer (after the model's last norm, if it has one), 0 the embedding of
                the tokens, k the output of block k.
            pooling: one or a list of "mean" (as the model's authors do it), "mean_tokens" (nucleotides, without CLS and
                SEP), "max", "std" and "cls" (not of ProtT5 and ProstT5, which have no such token).
            per_residue: return the vectors of a protein's residues instead; `pooling` is not used.
            progress: show a bar on standard error; None shows it in notebooks only.

        Returns:
            float32 (n, dim). A list of layers or of poolings adds an axis: with both, (n, layers, poolings, dim). With
            `per_residue` a list of arrays (length, dim), or (length, layers, dim) for a list of layers.

        Raises:
            SeqmillError: a sequence has an invalid letter, is empty or too long for the policy "reject", has no
                finite embedding, or does not fit the memory; the message names its number and id. A model has no such
                layer or pooling.
        """
        result = self._result(layers, pooling, per_residue)
        name, blocks = read_blocks(sequences)
        changes = _Changes(self._tokenizer.with_new_counts(), self.policy)
        with _bar(progress) as bar:
            vectors = self._embed(name, blocks, result, changes, bar)
        changes.log()
        return vectors

    def stream(
        self,
        sequences: Sequences,
        *,
        layers: int | Several[int] = -1,
        pooling: str | Several[str] = "mean",
        per_residue: bool = False,
        progress: bool | None = None,
    ) -> Iterator[tuple[list[str], Embedded]]:
        """Yield ids and vectors of sequences of any number, block by block, in the order given.

        Memory is bounded: a block has about 130 thousand tokens on a CPU and 2 million on a GPU, and at most 256 MB of
        vectors unless one sequence has more. Inside a block, sequences are sorted and packed by length, and equal ones
        are computed once. Arguments, vectors and errors are those of `embed`. A sequence without an id has its number,
        from 1 on.
        """
        result = self._result(layers, pooling, per_residue)
        most = max(BLOCK_BYTES // (4 * self.dim * len(result.outputs.pairs)), 1)  # vectors in a block
        tokens = PACKS_WANTED * (CPU_PIECE_TOKENS if self.device.type == "cpu" else MAX_PACK_TOKENS)
        letters = tokens * self._source.family.letters_per_token / self.policy.copies
        name, blocks = read_blocks(sequences, int(min(letters, most) if per_residue else letters))
        chopped = (block[start : start + most] for block in blocks for start in range(0, len(block), most))
        return self._stream(name, chopped, result, _bar(progress))

    def _stream(
        self, name: str, blocks: Iterator[list[FastaRecord]], result: _Result, bar: "tqdm[None]"
    ) -> Iterator[tuple[list[str], Embedded]]:
        changes = _Changes(self._tokenizer.with_new_counts(), self.policy)
        with bar:
            for block in blocks:
                vectors = self._embed(name, iter([block]), result, changes, bar)
                yield [record.id for record in block], vectors
        changes.log()

    def _result(self, layers: int | Several[int], pooling: str | Several[str], per_residue: bool) -> _Result:
        is_one = hasattr(layers, "__index__")
        try:
            numbers = tuple(map(index_of, [layers] if is_one else layers))  # type: ignore[arg-type]
            poolings = (pooling,) if isinstance(pooling, str) else tuple(pooling)
        except TypeError:
            expected = "layers must be one whole number or a list, and pooling one name or a list"
            raise SeqmillError(f"{expected}, not layers={layers!r}, pooling={pooling!r}") from None
        if per_residue:
            poolings = ("mean",)
        outputs = Outputs(numbers, poolings, "float32" if per_residue else "").of(self.num_layers)
        outputs.require_family(self._source.family)
        axes = [] if is_one else [len(numbers)]
        if not isinstance(pooling, str) and not per_residue:
            axes.append(len(poolings))
        return _Result(outputs, tuple(axes))

    def _embed(
        self, name: str, blocks: Iterator[list[FastaRecord]], result: _Result, changes: "_Changes", bar: "tqdm[None]"
    ) -> Embedded:
        """Return the vectors of the records in blocks; add what was changed to `changes`."""
        readout = Readout(self._source.family, result.outputs)
        if (first := next(blocks, None)) is None:
            width = len(result.outputs.pairs) * self.dim
            return [] if result.outputs.per_residue else result(np.empty((0, width), np.float32))
        index = index_in_memory(chain([first], blocks), name, self._source, changes.tokenizer, self.policy)
        changes.fates.update(index.record_fates.tolist())
        if len(rejected := np.flatnonzero(index.record_fates == Fate.REJECTED)):
            longer = f"is longer than max_length={self.policy.max_length}"
            raise SeqmillError(f"{name}: {index.record_name(int(rejected[0]))} {longer}; shorten it or leave it out")
        with _computing:
            rows, residues = self._compute(index, readout, bar)
        if result.outputs.per_residue:  # copied, so that no two records share memory, nor keep a whole pack in it
            return [result(residues[row].copy()) for row in index.record_rows.tolist()]
        return result(rows[index.record_rows])

    def _compute(self, index: Index, readout: Readout, bar: "tqdm[None]") -> tuple[np.ndarray, list[np.ndarray]]:
        """Return the vectors of an index's sequences, and those of their residues if the readout keeps them."""
        self._max_tokens = max(self._max_tokens, index.max_tokens)
        self._embed_pack.reserve(self._max_tokens)
        self._embed_pack.readout = readout
        finite = FiniteResults(index, self.device, readout, self._exact_encoder)
        rows = np.empty((index.num_sequences, len(readout.outputs.pairs) * self.dim), np.float32)
        residues: list[np.ndarray] = []
        computed = embed_packs(self._embed_pack, index, range(index.num_packs), self.device, torch.get_num_threads())
        bar.total = bar.n + int(index.token_offsets[-1])  # of a stream, so far
        try:
            with closing(computed):
                for pack in finite(computed):
                    if finite.quarantined:
                        name = index.sequence_name(finite.quarantined[0])
                        raise SeqmillError(f"{index.path}: {name} has no finite embedding, in float32 either")
                    rows[pack.index_rows] = pack.embeddings
                    if readout.residue_dtype is not None:
                        bounds = residue_offsets(index, pack.index_rows).tolist()
                        residues += [pack.residues[begin:end] for begin, end in pairwise(bounds)]
                    bar.update(int(index.pack_lengths(pack.pack).sum()))
        except DoesNotFit as error:
            name = index.sequence_name(index.row_of_segment(error.segment))
            raise SeqmillError(f"{error}: {name}; use a machine with more, or a lower max_length") from error
        return rows, residues

    def _exact_encoder(self, device: torch.device) -> Encoder:
        """Return the model in float32."""
        if device not in self._exact:
            self._exact[device] = self._make_encoder(device, torch.float32)
        self._exact[device].reserve(self._max_tokens)
        return self._exact[device]

    def _make_encoder(self, device: torch.device, dtype: torch.dtype) -> Encoder:
        return make_encoder(load_weights(self._source), dtype, self._max_tokens, device)


@dataclass
class _Changes:
    """What one call changed or cut."""

    tokenizer: RecordTokenizer  # counts the letters of this call
    policy: LengthPolicy
    fates: Counter[int] = field(default_factory=Counter)

    def log(self) -> None:
        fates = {fate.name.lower(): self.fates[fate] for fate in Fate}
        log_changes(self.tokenizer.letter_counts(), fates, self.policy)


def _bar(progress: bool | None) -> "tqdm[None]":
    """Return a bar of the tokens computed, shown as asked, else in notebooks only."""
    if progress is None:
        shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
        progress = shell is not None and "IPKernelApp" in shell.config
    return tqdm(unit=" tokens", unit_scale=True, disable=not progress)
