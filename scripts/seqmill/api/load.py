"""Loading a model for use in Python, and embedding in one call."""

import threading
from collections.abc import Sequence as Several
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seqmill.base.extras import optional_packages
from seqmill.errors import SeqmillError
from seqmill.fetch.models import fetch_model
from seqmill.spec.lengths import choose_length_policy
from seqmill.spec.models import find_model, is_hub_id
from seqmill.spec.task import DEVICES, PRECISIONS

if TYPE_CHECKING:  # this module can be imported, and explained by help(), without torch
    from seqmill.api.embedder import Embedded, Embedder
    from seqmill.api.records import Sequences

_loading = threading.Lock()
_last: dict[tuple[Any, ...], "Embedder"] = {}


def load(
    model: str | Path,
    *,
    device: str = "auto",
    precision: str = "auto",
    long_sequences: str = "auto",
    max_length: int | str = "auto",
    window: int | str = "auto",
    stride: int | str = "auto",
    strand: str = "forward",
) -> "Embedder":
    """Load a model; missing weights are fetched first.

    Args:
        model: a name such as "esm2_t33_650M_UR50D", "esmc_300m", "prott5_xl_u50" or "dnabert_s", a model on the Hugging
            Face Hub such as "facebook/esm2_t33_650M_UR50D", a checkpoint (ESM-2's .pt, ESM C's .pth), a Hugging Face
            folder, or "untrained:NAME" for random weights, whose embeddings have no meaning.
        device: "cpu", "cuda", or "auto" for CUDA if the machine has a GPU.
        precision: of the matrix products: "float32", "bfloat16", "float16" (not ProtT5 and ProstT5), "float8" (ESM-2
            and DNABERT-S; CUDA of compute capability 8.9 and later), or "auto" for bfloat16 if the device computes it
            natively, else float32.
        long_sequences: for sequences longer than `max_length`: "truncate", "window" (embed windows), "full" (embed them
            whole), "reject" (raise an error), or "auto", which truncates proteins and embeds nucleotides in windows.
        max_length: in residues or bases (auto: 1022 for ESM-2, 2046 for ESM C, 12,000 for ProtT5 and ProstT5, 10,000
            for DNABERT-S).
        window: the length of a window (auto: `max_length`).
        stride: from the start of one window to the next (auto: half a window for proteins, else a whole one).
        strand: "forward", or "both" for the mean of a nucleotide sequence and its reverse complement.

    Raises:
        SeqmillError: there is no such model, device or precision, or the model can't be computed in it; the weights are
            damaged, can't be fetched or do not fit the memory; torch is missing, or can't use the machine's GPU, unless
            the device is "cpu".
    """
    for name, value, known in (("device", device, DEVICES), ("precision", precision, PRECISIONS)):
        if value not in known:
            hint = "; CUDA_VISIBLE_DEVICES chooses a GPU" if str(value).startswith("cuda") else ""
            raise SeqmillError(f"{name} must be one of {', '.join(known)}, not {value}{hint}")
    with optional_packages():
        from seqmill.api.embedder import Embedder
        from seqmill.embedding.device import choose_device
    name, lengths = str(model), (long_sequences, max_length, window, stride, strand)
    chosen = choose_device(device)  # this and the next line come before a long download
    if not is_hub_id(name):
        family = find_model(name).family
        family.require_precision(precision)
        choose_length_policy(family, *lengths)
    source = fetch_model(name)
    source.family.require_precision(precision)
    return Embedder(source, chosen, precision, choose_length_policy(source.family, *lengths))


def embed(
    sequences: "Sequences",
    model: str | Path,
    *,
    layers: int | Several[int] = -1,
    pooling: str | Several[str] = "mean",
    per_residue: bool = False,
    progress: bool | None = None,
    **options: Any,  # noqa: ANN401
) -> "Embedded":
    """Embed sequences with a model, which stays loaded until another one is used.

    `options` are those of `load`; the other arguments and the result are those of `Embedder.embed`.
    """
    embedder = _loaded(str(model), **options)
    return embedder.embed(sequences, layers=layers, pooling=pooling, per_residue=per_residue, progress=progress)


def _loaded(model: str, **options: Any) -> "Embedder":  # noqa: ANN401
    """Return the model of the last call if it is the same; otherwise release that one before this one is loaded."""
    key = (model, *sorted(options.items()))
    with _loading:
        if key not in _last:
            _last.clear()
            _last[key] = load(model, **options)
        return _last[key]
