"""Embeddings that are not finite: they are computed again in float32, and quarantined if that does not help.

float16 overflows above 65,504. In the forward an overflow turns into NaN in every vector of its sequence, and in no
other sequence (docs/explanation/accuracy.md), so it can't be missed.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import numpy as np
import torch

from seqmill.embedding.embedder import PackEmbedder
from seqmill.embedding.readout import Readout
from seqmill.errors import SeqmillError
from seqmill.model.encoder import Encoder
from seqmill.model.out_of_memory import is_out_of_memory
from seqmill.model.pack import Pack, Windows
from seqmill.store.index import Index, residue_counts
from seqmill.store.part_file import PackResult

SHOWN = 20

log = logging.getLogger(__name__)


class FiniteResults:
    """Passes packs on with finite embeddings only.

    `make_model` makes the model in float32 on a device; it is called at the first embedding that is not finite.
    `recomputed` counts the sequences that are finite in float32; `quarantined` are index rows of the others.
    """

    def __init__(
        self, index: Index, device: torch.device, readout: Readout, make_model: Callable[[torch.device], Encoder]
    ) -> None:
        self._index, self._device, self._readout, self._make_model = index, device, readout, make_model
        self._embed: PackEmbedder | None = None
        self.recomputed = 0
        self.quarantined: list[int] = []

    def __call__(self, results: Iterable[tuple[int, np.ndarray, np.ndarray]]) -> Iterator[PackResult]:
        """Yield the result of each pack, given its number, embeddings and residues (`runner.embed_packs`)."""
        for pack, embeddings, residues in results:
            first, last = (int(row) for row in self._index.pack_offsets[pack : pack + 2])
            rows = np.arange(first, last)
            counts = residue_counts(self._index, rows) if len(residues) else np.zeros(len(rows), np.int64)
            finite = np.isfinite(embeddings).all(axis=1) & _finite_spans(residues, counts)
            for place in np.flatnonzero(~finite).tolist():
                embedding, own_residues = self._again(first + place)
                if self._judge(first + place, embedding, own_residues):
                    begin = int(counts[:place].sum())
                    embeddings[place], residues[begin : begin + counts[place]] = embedding, own_residues
                    finite[place] = True
            if not finite.all():
                embeddings = embeddings[finite]
                residues = residues[np.repeat(finite, counts)] if len(residues) else residues
            yield PackResult(pack, rows[finite], embeddings, rows[~finite], residues)

    def _again(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the embedding of a row and the vectors of its residues, in float32."""
        index = self._index
        if self._embed is None:
            log.warning("an embedding is not finite: computing it alone in float32")
            self._embed = PackEmbedder(self._model(), self._readout, lambda: self._make_model(torch.device("cpu")))
        segments, first = index.row_segments(row), index.first_segment_of(row)
        if index.is_blended and len(segments) > 1:
            rows, residues = self._compute(segments, first, Windows(np.array([0, len(segments)]), index.stride))
            return self._readout.combine(rows, None)[0], residues
        computed = [self._compute([tokens], segment) for segment, tokens in enumerate(segments, first)]
        rows, residues = map(np.concatenate, zip(*computed, strict=True))
        return self._readout.combine(rows, (np.zeros(1, np.int64), index.row_weights(row)))[0], residues

    def _judge(self, row: int, embedding: np.ndarray, residues: np.ndarray) -> bool:
        """Return whether a row is finite in float32, and note it.

        Raise a SeqmillError if the embedding is, but a residue's vector does not fit float16.
        """
        name = self._index.sequence_name(row)
        whole = np.isfinite(residues).all()
        is_overflow = residues.dtype == np.float16 and not whole and not np.isnan(residues).any()
        if not np.isfinite(embedding).all() or not (whole or is_overflow):
            self.quarantined.append(row)
            if len(self.quarantined) <= SHOWN:
                log.warning("%s: not finite in float32 either: quarantined", name)
            return False
        if is_overflow:
            advice = "set per_residue to float32 (all is computed again)"
            raise SeqmillError(f"{name}: a residue has values beyond float16 (65504): {advice}")
        self.recomputed += 1
        if self.recomputed <= SHOWN:
            log.info("%s: finite in float32", name)
        return True

    def _compute(
        self, segments: list[np.ndarray], first_segment: int, windows: Windows | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        assert self._embed is not None
        lengths = np.array([len(tokens) for tokens in segments], np.int64)
        pack = Pack.from_tokens(np.concatenate(segments), lengths, first_segment)
        tokens, cu_seqlens = pack.tokens.int().to(self._device), pack.cu_seqlens.to(self._device)
        rows, residues = self._embed(replace(pack, tokens=tokens, cu_seqlens=cu_seqlens, windows=windows))
        return rows.cpu().numpy(), residues.cpu().numpy()

    def _model(self) -> Encoder:
        try:
            return self._make_model(self._device)
        except (RuntimeError, MemoryError) as error:
            if self._device.type == "cpu" or not is_out_of_memory(error):
                raise
        log.warning("%s has no memory for the float32 model as well: using the CPU", self._device)
        self._device = torch.device("cpu")
        return self._make_model(self._device)


def _finite_spans(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return whether each span of rows has only finite values (bool); `counts` are the rows of the spans."""
    finite = np.ones(len(counts), bool)
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
    finite[np.searchsorted(np.cumsum(counts), bad, side="right")] = False
    return finite
