"""Computing packs on a device with too little memory: in smaller pieces, and single segments on the CPU."""

import gc
import logging
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from seqmill.embedding.readout import NO_RESIDUES, Readout, Vectors
from seqmill.errors import SeqmillError
from seqmill.model.encoder import Encoder
from seqmill.model.out_of_memory import unless_out_of_memory
from seqmill.model.pack import Pack, boundaries
from seqmill.spec.architectures import Architecture
from seqmill.spec.families import Family

# Tokens in a piece of a pack when all hidden states are kept.
CPU_KEPT_TOKENS, CUDA_KEPT_TOKENS = 2048, 32768

log = logging.getLogger(__name__)

Read = Callable[[Encoder, Pack], torch.Tensor]


class DoesNotFit(SeqmillError):
    """Neither the device nor the CPU has the memory for a segment; `segment` is its number in the index."""

    def __init__(self, pack: Pack) -> None:
        super().__init__(f"not enough memory for a sequence of {len(pack.tokens)} tokens")
        self.segment = pack.first_segment


class PackEmbedder:
    """Computes packs, in smaller pieces after one did not fit; a size that failed is never tried again.

    `cpu_model` makes the same model on the CPU; it is called if a single segment does not fit the device. `too_large`
    is the size in tokens of the smallest piece that did not fit (0 if all did), `splits` the number of pieces that did
    not fit, and `on_cpu` the number of segments that the CPU computed.
    """

    def __init__(self, model: Encoder, readout: Readout, cpu_model: Callable[[], Encoder]) -> None:
        self._model, self.readout, self._make_cpu_model = model, readout, cpu_model
        self._cpu_model: Encoder | None = None
        self.too_large = self.splits = self.on_cpu = 0

    @property
    def architecture(self) -> Architecture:
        return self._model.architecture

    def reserve(self, max_tokens: int) -> None:
        """Prepare for segments of up to `max_tokens` tokens, if they are longer than the model was made for."""
        self._model.reserve(max_tokens)
        if self._cpu_model is not None:
            self._cpu_model.reserve(max_tokens)

    def __call__(self, pack: Pack) -> Vectors:
        """Return the vectors of a pack, on the model's device, or on the CPU if that lacks the memory.

        Raise DoesNotFit if neither has the memory for a segment.
        """
        if pack.windows is None and self.readout.residue_dtype is None:
            return Vectors(self._compute(pack, self.readout), NO_RESIDUES)
        pieces = replace(pack, windows=None).split(CUDA_KEPT_TOKENS if pack.tokens.is_cuda else CPU_KEPT_TOKENS)
        if pack.windows is None:
            found = [self.readout.of_hidden(self._compute(piece, self.readout.hidden), piece) for piece in pieces]
            return Vectors(*map(torch.cat, zip(*found, strict=True)))
        blended = unless_out_of_memory(self._blended, pack, pieces, pack.tokens.device)
        if blended is not None:
            return blended
        if not pack.tokens.is_cuda:
            raise DoesNotFit(pack)
        log.warning("windows of %d tokens can't be blended on the device: blending them on the CPU", len(pack.tokens))
        torch.cuda.empty_cache()
        return self._blended(pack, pieces, torch.device("cpu"))

    def _blended(self, pack: Pack, pieces: list[Pack], device: torch.device) -> Vectors:
        dim = len(self.readout.outputs.layers) * self.architecture.hidden_dim
        blender = Blender(pack, dim, device, self.readout.family)
        for piece in pieces:
            blender.add(self._compute(piece, self.readout.hidden), piece.lengths)
        return self.readout.of_hidden(*blender.finish())

    def _compute(self, pack: Pack, read: Read) -> torch.Tensor:
        if self.too_large and len(pack.tokens) >= self.too_large:
            return self._in_pieces(pack, read)
        computed = unless_out_of_memory(read, self._model, pack)
        if computed is not None:
            return computed
        self.splits += 1
        num_tokens = len(pack.tokens)
        self.too_large = min(self.too_large or num_tokens, num_tokens)
        text = "not enough memory on %s for %d tokens (%d segments): computing at most %d tokens at a time from now on"
        log.warning(text, pack.tokens.device, num_tokens, len(pack.lengths), self.too_large // 2)
        gc.collect()
        if pack.tokens.is_cuda:
            torch.cuda.empty_cache()  # for cuBLAS and Triton, which allocate on their own
        return self._in_pieces(pack, read)

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
        computed = unless_out_of_memory(read, self._cpu_model, on_cpu)
        if computed is None:
            raise DoesNotFit(pack)
        return computed.to(device)


class Blender:
    """Blends the windows of a pack into vectors (num_tokens, dim) as they come, so that they need not be kept.

    Where windows overlap, a residue's vector is a mean weighted by the distance to the end of each window.
    """

    def __init__(self, pack: Pack, dim: int, device: torch.device, family: Family) -> None:
        assert pack.windows is not None
        self._before, self._after = family.before, family.after  # special tokens
        self._stride = pack.windows.stride
        firsts, self._counts = pack.windows.begins[:-1], np.diff(pack.windows.begins)
        # The last window ends where the sequence does; the others are a stride apart.
        self._lengths = (self._counts - 1) * self._stride + pack.lengths[firsts + self._counts - 1]
        counts = enumerate(self._counts)
        self._places = iter([(sequence, place) for sequence, count in counts for place in range(count)])
        self._states = torch.zeros(int(self._lengths.sum()), dim, device=device)
        self._total = torch.zeros(int(self._lengths.sum()), 1, device=device)
        self._begins = boundaries(self._lengths).tolist()

    def add(self, hidden: torch.Tensor, lengths: np.ndarray) -> None:
        """Add the hidden states (num_tokens, dim), float32, of the next segments, which have these lengths.

        They are added one after another, so that a sum has the same bits every time.
        """
        for window in hidden.to(self._states.device).split(lengths.tolist()):
            sequence, place = next(self._places)
            span = slice(self._begins[sequence], self._begins[sequence + 1])
            states, total = self._states[span], self._total[span]
            if self._counts[sequence] == 1:  # keeps its bits
                states.copy_(window)
                total.fill_(1)
                continue
            before, after = self._before, self._after
            count = len(window) - before - after
            places = torch.arange(1, count + 1, device=window.device)
            weights = torch.minimum(places, places.flip(0)).to(window.dtype)[:, None]
            inner = slice(before + place * self._stride, before + place * self._stride + count)
            states[inner] += window[before : before + count] * weights
            total[inner] += weights
            for end in (*range(before), *range(-after, 0)):
                states[end] += window[end] * count
                total[end] += count

    def finish(self) -> tuple[torch.Tensor, Pack]:
        """Return the hidden states of the sequences, and a pack with their boundaries (its tokens mean nothing).

        The vectors of special tokens are means of those of the windows, weighted by the residues of each.
        """
        device = self._states.device
        cu_seqlens = torch.from_numpy(boundaries(self._lengths))
        if device.type == "cuda":  # through pinned memory, so that the host need not wait for the device
            cu_seqlens = cu_seqlens.pin_memory().to(device, non_blocking=True)
        nothing = torch.empty(len(self._states), dtype=torch.uint8, device=device)
        return self._states.div_(self._total), Pack(nothing, cu_seqlens, self._lengths)
