"""Files of tensors: read without executing anything in them, and matched to the tensors that a model has."""

from __future__ import annotations

import errno
import json
import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from seqpack.errors import SeqpackError

SHOWN_KEYS = 8


def load_pickled(path: Path, what: str, allowed: Sequence[type] = ()) -> Any:  # noqa: ANN401 - a file may hold anything
    """Load a file of torch.save as memory maps; tensors, plain values and `allowed` classes alone.

    Raises:
        SeqpackError: the file is damaged, or its pickle calls for something else; `what` says what was expected.
    """
    try:
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))  # all else that PyTorch says is how to execute the file
        reason = f"its pickle calls for {named[1]}" if named else "its pickle is damaged"
        raise SeqpackError(f"{path}: not loaded as {what}: {reason}; it was not executed") from error
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise SeqpackError(f"{path}: not loaded as {what}: its pickle is damaged") from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        reason = str(error).split("\n")[0]
        unreadable = isinstance(error, OSError) and error.errno != errno.EINVAL  # which mapping a cut file gives
        if not unreadable and not isinstance(error, EOFError) and not zipfile.is_zipfile(path):
            reason = "it is truncated, or not a file of torch.save"
        raise SeqpackError(f"{path}: cannot be loaded as {what}: {reason}") from error


def load_safetensors(folder: Path) -> dict[str, torch.Tensor]:
    """Load the tensors of a Hugging Face folder, in one file or several, as memory maps.

    Raises:
        SeqpackError: a file is absent or damaged.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SeqpackError(f"{index}: damaged, or not an index of safetensors: {error!r}") from error
    else:
        names = ["model.safetensors"]
    state: dict[str, torch.Tensor] = {}
    for name in names:
        file = folder / name
        if not file.is_file():
            raise SeqpackError(f"{file}: no such file; seqpack reads safetensors, not pickled weights")
        try:
            state.update(load_file(file))
        except (SafetensorError, OSError) as error:
            raise SeqpackError(f"{file}: damaged or not safetensors: {error}") from error
    # transformers 5 saves the layer norms under their TensorFlow names.
    return {
        key.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias"): tensor
        for key, tensor in state.items()
    }


def match_tensors(
    state: Mapping[str, torch.Tensor],
    sources: Mapping[str, list[str]],
    shapes: Mapping[str, tuple[int, ...]],
    ignored: str,
    path: Path,
    what: str,
) -> dict[str, list[torch.Tensor]]:
    """Sort tensors by canonical name; several under one name are to be joined by rows.

    Args:
        state: a file's tensors.
        sources: by canonical name, the file's names of what makes it up.
        shapes: by canonical name.
        ignored: regular expression of the file's names that the model does not use.
        path: of the file, for messages.
        what: the model's name, for messages.

    Raises:
        SeqpackError: lists missing and unknown keys, and tensors of a wrong shape.
    """
    wanted = {name for names in sources.values() for name in names}
    missing = sorted(wanted - state.keys())
    unknown = sorted(key for key in state.keys() - wanted if not re.search(ignored, key))
    if missing or unknown:
        raise SeqpackError(f"{path}: not the tensors of {what}: missing {_some(missing)}; unknown {_some(unknown)}")
    for name, (rows, *columns) in shapes.items():
        for key in sources[name]:
            shape = (rows // len(sources[name]), *columns)
            if tuple(state[key].shape) != shape:
                raise SeqpackError(f"{path}: {key} has shape {tuple(state[key].shape)}, not {shape}")
    return {name: [state[key] for key in keys] for name, keys in sources.items()}


def _some(keys: list[str]) -> str:
    shown = ", ".join(keys[:SHOWN_KEYS]) or "none"
    return shown + (f" and {len(keys) - SHOWN_KEYS} more" if len(keys) > SHOWN_KEYS else "")
