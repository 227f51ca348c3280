"""Packs on a device without enough memory: split, down to one segment, and that one on the CPU."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from seqmill.embed.readout import NO_RESIDUES, Readout, Vectors
from seqmill.errors import SeqmillError
from seqmill.model.encoder import Encoder
from seqmill.model.pack import Pack, boundaries
from seqmill.spec.models import AnyArchitecture

# How errors without a type of their own say it: PyTorch's allocator on a CPU, CUDA, cuBLAS and cuDNN.
SAID = ("can't allocate memory", "CUDA error: out of memory", "_STATUS_ALLOC_FAILED")

# Where hidden states are kept, packs go through the model in pieces of so many tokens.
CPU_KEPT_TOKENS, CUDA_KEPT_TOKENS = 2048, 32768

log = logging.getLogger(__name__)

Read = Callable[[Encoder, Pack], torch.Tensor]


class DoesNotFit(SeqmillError):
    """Memory does not suffice for one segment, on the CPU either; `segment` is its number in the index."""

    def __init__(self, pack: Pack) -> None:
        super().__init__(f"not enough memory for a sequence of {len(pack.tokens)} tokens")
        self.segment = pack.first_segment


class PackEmbedder:
    """Computes packs, in smaller pieces once one did not fit; a size that failed is never tried again.

    Args:
        model: on the device.
        readout: what is read of it, and how it is pooled.
        cpu_model: makes the same model on the CPU; called when a single sequence does not fit the device.

    Attributes:
        too_large: tokens in the smallest piece that did not fit; 0 if all did.
        splits: how many pieces did not fit.
        on_cpu: how many segments were left to the CPU.
    """

    def __init__(self, model: Encoder, readout: Readout, cpu_model: Callable[[], Encoder]) -> None:
        self._model, self.readout, self._make_cpu_model = model, readout, cpu_model
        self._cpu_model: Encoder | None = None
        self.too_large = 0
        self.splits = 0
        self.on_cpu = 0

    @property
    def architecture(self) -> AnyArchitecture:
        return self._model.architecture

    def __call__(self, pack: Pack) -> Vectors:
        """Return what is read of a pack, on the model's device, or on the CPU if that has not the memory.

        Raises:
            DoesNotFit: a segment for which neither the device's nor the CPU's memory suffices.
        """
        if pack.windows is None and self.readout.residue_dtype is None:
            return Vectors(self._compute(pack, self.readout), NO_RESIDUES)
        pieces = replace(pack, windows=None).split(CUDA_KEPT_TOKENS if pack.tokens.is_cuda else CPU_KEPT_TOKENS)
        if pack.windows is None:
            found = [self.readout.of_hidden(self._compute(piece, self.readout.hidden), piece) for piece in pieces]
            return Vectors(*map(torch.cat, zip(*found, strict=True)))
        try:
            return self._blended(pack, pieces, pack.tokens.device)
        except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if not pack.tokens.is_cuda:
                raise DoesNotFit(pack) from error
        log.warning("windows of %d tokens can't be blended on the device: blending them on the CPU", len(pack.tokens))
        torch.cuda.empty_cache()
        return self._blended(pack, pieces, torch.device("cpu"))

    def _blended(self, pack: Pack, pieces: list[Pack], device: torch.device) -> Vectors:
        dim = len(self.readout.outputs.layers) * self.architecture.hidden_dim
        blender = Blender(pack, dim, device)
        for piece in pieces:
            blender.add(self._compute(piece, self.readout.hidden), piece.lengths)
        return self.readout.of_hidden(*blender.finish())

    def _compute(self, pack: Pack, read: Read) -> torch.Tensor:
        if not self._fits(pack):
            return self._in_pieces(pack, read)
        try:
            return read(self._model, pack)
        except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # Outside of the handler, whose traceback holds the activations.
        self.splits += 1
        num_tokens = len(pack.tokens)
        self.too_large = min(self.too_large or num_tokens, num_tokens)
        log.warning(
            "not enough memory on %s for %d tokens (%d segments): from now on in pieces of %d",
            pack.tokens.device,
            num_tokens,
            len(pack.lengths),
            self.too_large // 2,
        )
        gc.collect()
        if pack.tokens.is_cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        return self._in_pieces(pack, read)

    def _fits(self, pack: Pack) -> bool:
        return not self.too_large or len(pack.tokens) < self.too_large

    def _in_pieces(self, pack: Pack, read: Read) -> torch.Tensor:
        if len(pack.lengths) == 1:
            return self._by_cpu(pack, read)
        pieces = pack.split(min(self.too_large, len(pack.tokens)) // 2)
        return torch.cat([self._compute(piece, read) for piece in pieces])

    def _by_cpu(self, pack: Pack, read: Read) -> torch.Tensor:
        device = pack.tokens.device
        if device.type == "cpu":
            raise DoesNotFit(pack)
        log.warning("a sequence of %d tokens does not fit the device: computing it on the CPU", len(pack.tokens))
        if self._cpu_model is None:
            self._cpu_model = self._make_cpu_model()
        self.on_cpu += 1
        on_cpu = Pack(pack.tokens.cpu(), pack.cu_seqlens.cpu(), pack.lengths, pack.first_segment)
        try:
            return read(self._cpu_model, on_cpu).to(device)
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise DoesNotFit(pack) from error
            raise


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed; PyTorch has no type of its own for that on a CPU."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in str(error) for words in SAID)


class Blender:
    """Blends the windows of a pack as they come, so that they need not be kept.

    Args:
        pack: with `windows`.
        dim: numbers in the vector of a token.
        device: where the sums are.
    """

    def __init__(self, pack: Pack, dim: int, device: torch.device) -> None:
        assert pack.windows is not None
        self._windows = pack.windows
        firsts, counts = pack.windows.begins[:-1], np.diff(pack.windows.begins)
        # The last window ends where the sequence does; all before it are a stride apart.
        lengths = (counts - 1) * pack.windows.stride + pack.lengths[firsts + counts - 1]
        self._lengths, self._counts = lengths, counts
        self._sequence_of_segment = np.repeat(np.arange(len(counts)), counts)
        self._place_of_segment = np.arange(len(pack.lengths)) - np.repeat(firsts, counts)
        self._states = torch.zeros(int(lengths.sum()), dim, device=device)
        self._total = torch.zeros(int(lengths.sum()), 1, device=device)
        self._begins = boundaries(lengths).tolist()
        self._next = 0

    def add(self, hidden: torch.Tensor, lengths: np.ndarray) -> None:
        """Take the hidden states (num_tokens, dim), float32, of the next segments, of so many tokens each.

        They are added one after the other, so that a sum has the same bits every time.
        """
        for window in hidden.to(self._states.device).split(lengths.tolist()):
            sequence, place = self._sequence_of_segment[self._next], self._place_of_segment[self._next]
            self._next += 1
            span = slice(self._begins[sequence], self._begins[sequence + 1])
            self._add(self._states[span], self._total[span], window, int(place), self._counts[sequence] == 1)

    def _add(self, states: torch.Tensor, total: torch.Tensor, window: torch.Tensor, place: int, is_whole: bool) -> None:
        if is_whole:  # keeps its bits
            states.copy_(window)
            total.fill_(1)
            return
        count = len(window) - 2
        places = torch.arange(1, count + 1, device=window.device)
        weights = torch.minimum(places, places.flip(0)).to(window.dtype)[:, None]
        span = slice(1 + place * self._windows.stride, 1 + place * self._windows.stride + count)
        states[span] += window[1:-1] * weights
        total[span] += weights
        for end in (0, -1):
            states[end] += window[end] * count
            total[end] += count

    def finish(self) -> tuple[torch.Tensor, Pack]:
        """Return the hidden states of sequences, and a pack that says where each begins (its tokens mean nothing).

        Each sequence has a first vector, the mean of its windows' first weighted by their residues, then one a
        residue, then a last vector likewise.
        """
        device = self._states.device
        cu_seqlens = torch.from_numpy(boundaries(self._lengths)).to(device)
        nothing = torch.empty(len(self._states), dtype=torch.uint8, device=device)
        return self._states.div_(self._total), Pack(nothing, cu_seqlens, self._lengths)
