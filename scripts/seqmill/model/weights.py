"""A model's weights: from a checkpoint file, a Hugging Face folder, or a seed.

All three give the same canonical tensors (`parameter_shapes` in the architecture's module) and a digest of their
values, so a model is recognized whatever file it came from. No code in a file is executed.
"""

import hashlib
import json
import math
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import numpy as np
import torch

from seqmill.base.commands import command
from seqmill.errors import SeqmillError
from seqmill.model.families import IMPLEMENTATIONS
from seqmill.model.tensor_files import Tensors
from seqmill.model.weights_record import require_recorded
from seqmill.spec.architectures import Architecture, T5Architecture
from seqmill.spec.models import ModelSource
from seqmill.spec.weight_files import weight_files

UNTRAINED_SEED = 20230316


@dataclass(frozen=True)
class Weights:
    """A model's tensors."""

    architecture: Architecture
    tensors: dict[str, torch.Tensor]  # by canonical name, in the dtype of the file
    digest: str  # hexadecimal SHA-256 of the values as float32, their names and the architecture
    trained: bool  # False for seeded random weights, whose embeddings are meaningless


def load_weights(source: ModelSource) -> Weights:
    """Load a model's weights.

    Raise a SeqmillError as `open_weights`, or if a released model's tensors differ from those that were fetched
    (`seqmill.model.weights_record`).
    """
    if source.kind == "untrained":
        assert source.architecture is not None
        architecture, tensors = source.architecture, untrained_tensors(source.architecture)
    else:
        architecture, parts = open_weights(source)
        tensors = {name: torch.cat(part) if len(part) > 1 else part[0] for name, part in parts.items()}
    digest = _digest(architecture, tensors)
    require_recorded(source, digest)
    return Weights(architecture, tensors, digest, trained=source.kind != "untrained")


def open_weights(source: ModelSource) -> tuple[Architecture, Tensors]:
    """Open a model's file or folder as memory maps and check names and shapes of the tensors, without reading them.

    Returns:
        The architecture, and for each canonical name the file's tensors, to be concatenated by rows.

    Raises:
        SeqmillError: the weights are missing, damaged, or not of the model's family or size; tensors are missing or
            unknown.
    """
    path = source.path
    assert path is not None
    if not (weight_files(path) if source.is_folder else path.is_file()):
        what = "the model's Hugging Face folder" if source.is_folder else "the model's checkpoint file"
        fetch = f"run `{command('fetch', source.name)}`, or " if source.kind == "released" else ""
        raise SeqmillError(f"{path}: no such weights; {fetch}put {what} there")
    implementation = IMPLEMENTATIONS[source.family]
    opener = implementation.open_folder if source.is_folder else implementation.open_checkpoint
    assert opener is not None
    architecture, parts = opener(path)
    if source.architecture is not None and architecture != source.architecture:
        raise SeqmillError(f"{path}: holds {architecture}, but {source.name} is {source.architecture}")
    return architecture, parts


def parameter_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter by its canonical name, for any family."""
    return IMPLEMENTATIONS[architecture.family].parameter_shapes(architecture)


def untrained_tensors(architecture: Architecture) -> dict[str, torch.Tensor]:
    """Return seeded random weights, with the same bits on every machine.

    The values are uniform and scaled so that activations and attention scores have a spread of about one. Every tensor
    has its own generator, so its values do not depend on the others.
    """
    tensors = {}
    for name, shape in parameter_shapes(architecture).items():
        generator = np.random.Generator(np.random.PCG64([UNTRAINED_SEED, zlib.crc32(name.encode())]))
        values = generator.random(shape, dtype=np.float32) * 2 - 1
        if len(shape) == 2:
            fan_in = 1 if name.startswith(("embed.", "relative_bias.")) else shape[1]
            values *= np.float32(math.sqrt(3 / fan_in))
            if isinstance(architecture, T5Architecture) and name.endswith(".qkv.weight"):  # its scores are not scaled
                values[: architecture.inner_dim] *= np.float32(architecture.head_dim**-0.5)
        else:
            values *= np.float32(0.1)
            if "norm" in name and name.endswith(".weight"):
                values += 1
        tensors[name] = torch.from_numpy(values)
    return tensors


def _digest(architecture: Architecture, tensors: Mapping[str, torch.Tensor]) -> str:
    def digest_one(name: str) -> bytes:
        values = tensors[name].to(torch.float32).contiguous().numpy()
        return hashlib.sha256(f"{name}{values.shape}".encode() + hashlib.sha256(values).digest()).digest()

    with ThreadPoolExecutor() as pool:  # hashlib releases the interpreter's lock
        digests = list(pool.map(digest_one, sorted(tensors)))
    return hashlib.sha256(json.dumps(asdict(architecture)).encode() + b"".join(digests)).hexdigest()
