"""Tensor files and configurations: read without executing code in them, and matched to a model's parameters."""

import errno
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from seqmill.base.files import read_json
from seqmill.errors import SeqmillError
from seqmill.spec.architectures import Architecture
from seqmill.spec.weight_files import PICKLED_WEIGHTS, SAFETENSORS_INDEX, weight_files

SHOWN_KEYS = 8
Tensors = dict[str, list[torch.Tensor]]  # by canonical name; those of a list are to be joined by rows
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

A = TypeVar("A", bound=Architecture)
SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads")  # by the names of most models


def load_pickled(path: Path, what: str, allowed: Sequence[type] = ()) -> Any:  # noqa: ANN401 - a file may hold anything
    """Load a torch.save file as memory maps; only tensors, plain values and `allowed` classes are accepted.

    Raise a SeqmillError if it is damaged, or its pickle calls for other code; `what` is what was expected.
    """
    try:
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))  # PyTorch's own text tells how to execute the file
        reason = f"its pickle calls for {named[1]}" if named else "its pickle is damaged"
        raise SeqmillError(f"{path}: not loaded as {what}: {reason}; it was not executed") from error
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise SeqmillError(f"{path}: not loaded as {what}: its pickle is damaged") from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        reason = str(error).split("\n")[0]
        unreadable = isinstance(error, OSError) and error.errno != errno.EINVAL  # a truncated file can't be mapped
        if not unreadable and not isinstance(error, EOFError) and not zipfile.is_zipfile(path):
            reason = "it is truncated, or not a file of torch.save"
        raise SeqmillError(f"{path}: cannot be loaded as {what}: {reason}") from error


def load_safetensors(files: Sequence[Path]) -> dict[str, torch.Tensor]:
    """Load a folder's tensors (`seqmill.spec.weight_files`); raise a SeqmillError if a file is damaged."""
    # Imported here, because untrained weights and pickles need no safetensors.
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    state: dict[str, torch.Tensor] = {}
    for file in files:
        if file.name == SAFETENSORS_INDEX:
            continue
        try:
            state.update(load_file(file))
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise SeqmillError(f"{file}: damaged or not safetensors: {error}") from error
    # transformers 5 saves the layer norms under their TensorFlow names.
    return {
        key.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias"): tensor
        for key, tensor in state.items()
    }


def load_folder(path: Path, what: str) -> tuple[dict[str, torch.Tensor], Path]:
    """Load the tensors of a folder that has weights, safetensors or a pickle; raises as those.

    The path that comes with them is the one to name in messages: the folder, or the pickle.
    """
    files = weight_files(path)
    if files[0].name != PICKLED_WEIGHTS:
        return load_safetensors(files), path
    state = load_pickled(files[0], what)
    require_tensors(state, files[0], what)
    return state, files[0]


def require_tensors(state: Any, path: Path, what: str) -> None:  # noqa: ANN401 - a file may hold anything
    """Raise a SeqmillError unless a file's content is a dictionary of tensors by name."""
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise SeqmillError(f"{path}: not {what}: it holds more than tensors")
    for key in state:
        if not isinstance(key, str):
            raise SeqmillError(f"{path}: not {what}: a tensor is named {key!r}, which is no text")


def read_architecture(
    path: Path,
    family: type[A],
    own_fields: Callable[[dict[str, Any]], dict[str, Any]],
    settings: Mapping[str, Any],
    model: str,
    sizes: Sequence[str] = SIZES,
) -> A:
    """Return a model's shape from its Hugging Face config.json.

    `own_fields` returns the fields that only this family has, from the file's content; `settings` are the values that
    the implementation supports, which the file may leave out; `model` is the name for messages; `sizes` are the file's
    names of num_layers, hidden_dim, and num_heads. Raise a SeqmillError if the file is unreadable, lacks a size, or has
    sizes or settings that the model can't have.
    """
    config = read_json(path)
    for key, value in settings.items():
        if config.get(key, value) not in (value, None):
            raise SeqmillError(f"{path}: {key} is {config[key]!r}; {model} has {value!r}")
    try:
        layers, dim, heads = (config[key] for key in sizes)
        architecture = family(layers, dim, heads, **own_fields(config))
    except KeyError as error:
        raise SeqmillError(f"{path}: lacks {error}") from error
    except ValueError as error:
        raise SeqmillError(f"{path}: not the shape of a model: {error}") from error
    ffn_dim = config.get("intermediate_size", architecture.ffn_dim)
    if ffn_dim != architecture.ffn_dim:
        raise SeqmillError(
            f"{path}: intermediate_size is {ffn_dim}; {model} has {architecture.ffn_dim} for hidden_size {dim}"
        )
    return architecture


@dataclass(frozen=True)
class Naming:
    """The names that a file format gives to a model's canonical parameters, without .weight and .bias."""

    prefix: str  # a regular expression, stripped from the beginning of the file's names
    whole: Mapping[str, str]  # the file's name for each parameter outside the layers
    layer: str  # the beginning of a layer's names, with {} for its number
    parts: Mapping[str, tuple[str, ...]]  # for each parameter of a layer the names, to be concatenated by rows
    ignored: str  # a regular expression for names in the file that the model does not use

    def names_of(self, parameter: str) -> list[str]:
        """Return the file's names for a canonical parameter, e.g. layers.0.qkv.weight."""
        stem, kind = parameter.rsplit(".", 1)
        if found := re.fullmatch(r"layers\.(\d+)\.(\w+)", stem):
            return [f"{self.layer.format(found[1])}{part}.{kind}" for part in self.parts[found[2]]]
        return [f"{self.whole[stem]}.{kind}"]

    def match(
        self, state: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]], path: Path, model: str
    ) -> dict[str, list[torch.Tensor]]:
        """Return a file's tensors by canonical name; several under one name are to be concatenated by rows.

        `shapes` are the concatenated ones. Raise a SeqmillError if tensors are missing or unknown (all are listed), or
        one has a wrong shape, dtype or layout.
        """
        stripped: dict[str, torch.Tensor] = {}
        for key, tensor in state.items():
            name = re.sub(self.prefix, "", key)
            if name in stripped:
                raise SeqmillError(f"{path}: holds the tensor {name} twice, with a prefix and without it")
            stripped[name] = tensor
        sources = {name: self.names_of(name) for name in shapes}
        wanted = {name for names in sources.values() for name in names}
        missing = sorted(wanted - stripped.keys())
        unknown = sorted(key for key in stripped.keys() - wanted if not re.search(self.ignored, key))
        if missing or unknown:
            raise SeqmillError(
                f"{path}: not the tensors of {model}: missing {_some(missing)}; unknown {_some(unknown)}"
            )
        for name, (rows, *columns) in shapes.items():
            for key in sources[name]:
                shape, found = (rows // len(sources[name]), *columns), tuple(stripped[key].shape)
                if found != shape:
                    raise SeqmillError(f"{path}: {key} has shape {found}, not {shape}")
                if unusable := _unusable(stripped[key]):
                    raise SeqmillError(
                        f"{path}: {key} is {unusable}; seqmill reads dense float32, float16 and bfloat16"
                    )
        return {name: [stripped[key] for key in keys] for name, keys in sources.items()}


def _unusable(tensor: torch.Tensor) -> str:
    """Return why a tensor's values can't be used; empty if they can."""
    if tensor.is_meta:
        return "a meta tensor, which has no values"
    if tensor.is_quantized:
        return "a quantized tensor"
    if tensor.layout != torch.strided:
        return f"a sparse tensor ({tensor.layout})"
    return "" if tensor.dtype in DTYPES else f"of {tensor.dtype}"


def _some(keys: list[str]) -> str:
    shown = ", ".join(keys[:SHOWN_KEYS]) or "none"
    return shown + (f" and {len(keys) - SHOWN_KEYS} more" if len(keys) > SHOWN_KEYS else "")
