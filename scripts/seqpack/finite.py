"""Embeddings that are not finite: computed in float32 again, quarantined if that does not help.

Half precision overflows above 65,504. In the forward an overflow ends as NaN in every vector of its
sequence (docs/accuracy.md), and in no other sequence, so that it can't go unseen.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch

from seqpack.index import Index
from seqpack.memory import PackEmbedder, is_out_of_memory
from seqpack.models.encoders import Encoder
from seqpack.packs import Pack, Windows
from seqpack.parts import PackResult
from seqpack.readout import Readout

SHOWN = 20

log = logging.getLogger(__name__)


class FiniteResults:
    """Passes packs on with finite embeddings only.

    Args:
        index: holds the tokens.
        device: where to compute again.
        readout: what is read of the model.
        make_model: makes the model in float32 on a device; called at the first embedding that needs it.

    Attributes:
        recomputed: how many sequences float32 has mended.
        quarantined: index rows of those that it has not.
    """

    def __init__(
        self, index: Index, device: torch.device, readout: Readout, make_model: Callable[[torch.device], Encoder]
    ) -> None:
        self._index, self._device, self._readout, self._make_model = index, device, readout, make_model
        self._embed: PackEmbedder | None = None
        self.recomputed = 0
        self.quarantined: list[int] = []

    def __call__(self, results: Iterable[tuple[int, np.ndarray]]) -> Iterator[PackResult]:
        """Yield what came of each pack, of its number and its embeddings (sequences in the pack, hidden_dim)."""
        for pack, embeddings in results:
            first, last = (int(row) for row in self._index.pack_offsets[pack : pack + 2])
            rows = np.arange(first, last)
            finite = np.isfinite(embeddings).all(axis=1)
            for place in np.flatnonzero(~finite).tolist():
                again = self._again(first + place)
                if np.isfinite(again).all():
                    embeddings[place] = again
                    finite[place] = True
            if finite.all():
                yield PackResult(pack, rows, embeddings, rows[:0])
            else:
                yield PackResult(pack, rows[finite], embeddings[finite], rows[~finite])

    def _again(self, row: int) -> np.ndarray:
        index = self._index
        if self._embed is None:
            log.warning("an embedding is not finite: computing it in float32, by itself")
            self._embed = PackEmbedder(self._model(), self._readout, lambda: self._make_model(torch.device("cpu")))
        segments = index.row_segments(row)
        if index.is_blended and len(segments) > 1:
            windows = Windows(np.array([0, len(segments)]), index.stride)
            embedding = self._readout.combine(self._rows(segments, windows), None)[0]
        else:
            rows = np.concatenate([self._rows([tokens]) for tokens in segments])
            embedding = self._readout.combine(rows, (np.zeros(1, np.int64), index.row_weights(row)))[0]
        if np.isfinite(embedding).all():
            self.recomputed += 1
            if self.recomputed <= SHOWN:
                log.info("%s: finite in float32", index.sequence_name(row))
        else:
            self.quarantined.append(row)
            if len(self.quarantined) <= SHOWN:
                log.warning("%s: not finite in float32 either: quarantined", index.sequence_name(row))
        return embedding

    def _rows(self, segments: list[np.ndarray], windows: Windows | None = None) -> np.ndarray:
        assert self._embed is not None
        pack = Pack.from_tokens(np.concatenate(segments), np.array([len(tokens) for tokens in segments], np.int64))
        tokens, cu_seqlens = pack.tokens.int().to(self._device), pack.cu_seqlens.to(self._device)
        return self._embed(Pack(tokens, cu_seqlens, pack.lengths, windows=windows)).cpu().numpy()

    def _model(self) -> Encoder:
        try:
            return self._make_model(self._device)
        except (RuntimeError, MemoryError) as error:
            if self._device.type == "cpu" or not is_out_of_memory(error):
                raise
        log.warning("the float32 model does not fit %s beside the other: using the CPU", self._device)
        self._device = torch.device("cpu")
        return self._make_model(self._device)
