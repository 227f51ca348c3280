"""The names a user may give as `model`, and what each stands for. Light: imports no torch."""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seqmill.errors import SeqmillError

if TYPE_CHECKING:
    import numpy as np

UNTRAINED_PREFIX = "untrained:"
WEIGHTS_FOLDER = Path("resources/models")
CONFIG, TOKENIZER = "config.json", "tokenizer.json"
SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED_WEIGHTS = "pytorch_model.bin"  # DNABERT-S is published so
RELEASED_FILES = (CONFIG, TOKENIZER, PICKLED_WEIGHTS)  # of a model of nucleotides
UNTRAINED_TOKENIZER = Path(__file__).with_name("untrained_dnabert_s") / TOKENIZER
ESM2, DNABERT_S = "esm2", "dnabert_s"  # families: one module, one tokenizer, one reference each


# Of layers, and of all other sizes: several times those of any published model. What has more is damaged, or was made
# to exhaust the memory before a tensor is compared.
MOST_LAYERS, MOST = 1_000, 1_000_000


@dataclass(frozen=True)
class Transformer:
    """What the shapes of both families have in common; raises ValueError for one that no model can have."""

    num_layers: int
    hidden_dim: int
    num_heads: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            most = MOST_LAYERS if name == "num_layers" else MOST
            if name != "token_dropout" and (type(value) is not int or not 1 <= value <= most):
                raise ValueError(f"{name} is {value!r}, not a whole number from 1 to {most:,}")
        if self.hidden_dim % self.num_heads:
            raise ValueError(f"num_heads is {self.num_heads}, which does not divide hidden_dim {self.hidden_dim}")

    @property
    def head_dim(self) -> int:
        return self.hidden_dim // self.num_heads

    @property
    def ffn_dim(self) -> int:
        return 4 * self.hidden_dim


@dataclass(frozen=True)
class Architecture(Transformer):
    """The shape of an ESM-2 model (Lin et al. 2023, doi:10.1126/science.ade2574; fair-esm 2.0.0)."""

    vocabulary: int = 33
    token_dropout: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_dim % 2:
            raise ValueError(
                f"num_heads is {self.num_heads}, so that heads are {self.head_dim} wide, not an even number"
            )

    @property
    def matrix_parameters(self) -> int:
        """Parameters of all layers' matrices, each of which costs 2 FLOP a token: 4 d^2 of attention, 8 d^2 of FFN."""
        return self.num_layers * 12 * self.hidden_dim**2


@dataclass(frozen=True)
class DnabertArchitecture(Transformer):
    """The shape of DNABERT-2 (Zhou et al. 2023, arXiv:2306.15006) and of DNABERT-S, which was trained from it."""

    num_layers: int = 12
    hidden_dim: int = 768
    num_heads: int = 12
    vocabulary: int = 4096
    token_types: int = 2

    @property
    def matrix_parameters(self) -> int:
        """Parameters of all layers' matrices: 4 d^2 of attention, 8 d^2 of the gated layers, 4 d^2 of the last."""
        return self.num_layers * 16 * self.hidden_dim**2


AnyArchitecture = Architecture | DnabertArchitecture

MODELS = {
    "esm2_t6_8M_UR50D": Architecture(6, 320, 20),
    "esm2_t12_35M_UR50D": Architecture(12, 480, 20),
    "esm2_t30_150M_UR50D": Architecture(30, 640, 20),
    "esm2_t33_650M_UR50D": Architecture(33, 1280, 20),
    "esm2_t36_3B_UR50D": Architecture(36, 2560, 40),
    "esm2_t48_15B_UR50D": Architecture(48, 5120, 40),
}
# Of nucleotides; their weights are folders, as Hugging Face has them.
DNABERT_MODELS = {"dnabert_s": DnabertArchitecture(), "dnabert_2": DnabertArchitecture()}
NAMES = [*MODELS, *DNABERT_MODELS]


@dataclass(frozen=True)
class ModelSource:
    """Where a model's weights come from.

    Attributes:
        name: as the user gave it.
        kind: "untrained" (seeded random weights), "released" (a registry name, fetched to
            resources/models), "checkpoint" (a fair-esm .pt file) or "folder" (Hugging Face).
        architecture: known for registry names; None where the file tells.
        path: the file or folder of the weights; None for untrained ones.
        family: "esm2" or "dnabert_s".
    """

    name: str
    kind: str
    architecture: AnyArchitecture | None
    path: Path | None
    family: str = ESM2

    @property
    def tokenizer(self) -> Path | None:
        """The tokenizer.json of a model of nucleotides; ESM-2 needs none."""
        if self.family != DNABERT_S:
            return None
        return self.path / TOKENIZER if self.path else UNTRAINED_TOKENIZER

    @property
    def files(self) -> list[Path]:
        """All files that the model is made from; none for untrained ones. Those of a released one may not be there.

        Raises:
            SeqmillError: a folder's index of weights can't be read, or names a file that is not there.
        """
        if self.path is None:
            return []
        if self.kind == "folder" or self.family == DNABERT_S:
            weights = weight_files(self.path) or [self.path / PICKLED_WEIGHTS]
            return [self.path / CONFIG, *([self.tokenizer] if self.tokenizer else []), *weights]
        return [self.path]

    @property
    def slug(self) -> str:
        """A folder name for results: the model's name without its folders and odd characters."""
        name = self.path.stem if self.kind == "checkpoint" and self.path else Path(self.name).name
        if name in ("", ".."):  # a folder given as . or as ../..
            name = Path(self.name).resolve().name
        return re.sub(r"[^\w.-]+", "-", name)


def find_model(name: str) -> ModelSource:
    """Resolve a registry name, untrained:NAME, a fair-esm .pt file or a Hugging Face folder.

    Raises:
        SeqmillError: neither a known name nor a usable path; lists what could have been meant.
    """
    known = name.removeprefix(UNTRAINED_PREFIX)
    if known in DNABERT_MODELS:
        kind, path = ("released", WEIGHTS_FOLDER / name) if known == name else ("untrained", None)
        return ModelSource(name, kind, DNABERT_MODELS[known], path, DNABERT_S)
    if name.startswith(UNTRAINED_PREFIX):
        architecture = MODELS.get(known)
        if architecture is None:
            raise SeqmillError(_unknown(name, [UNTRAINED_PREFIX + model for model in NAMES]))
        return ModelSource(name, "untrained", architecture, None)
    if not name:
        raise SeqmillError(_unknown(name, NAMES))  # Path("") would be the current folder
    if name in MODELS:
        return ModelSource(name, "released", MODELS[name], WEIGHTS_FOLDER / f"{name}.pt")
    try:
        path = Path(name).expanduser()
    except RuntimeError as error:  # ~nobody
        raise SeqmillError(f"model {name}: {error}") from error
    if path.is_dir():
        return ModelSource(name, "folder", None, path, _family_of_folder(path))
    if path.suffix == ".pt" and path.is_file():
        return ModelSource(name, "checkpoint", None, path)
    if path.suffix == ".pt" or path.is_absolute():
        raise SeqmillError(f"model {path}: no such fair-esm .pt file or Hugging Face folder")
    raise SeqmillError(_unknown(name, NAMES))


def weight_files(folder: Path) -> list[Path]:
    """Return the files that a folder's weights are read from, the index of several before them; empty if none is there.

    The same as transformers would choose: model.safetensors, else the index of safetensors and what it names, else
    pytorch_model.bin.

    Raises:
        SeqmillError: the index can't be read, or names a file that is not there.
    """
    if (folder / SAFETENSORS).is_file():
        return [folder / SAFETENSORS]
    index = folder / SAFETENSORS_INDEX
    if not index.is_file():
        return [folder / PICKLED_WEIGHTS] if (folder / PICKLED_WEIGHTS).is_file() else []
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise SeqmillError(f"{index}: damaged, or not an index of safetensors: it has no weight_map")
    for key, shard in shards.items():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise SeqmillError(f"{index}: damaged: its weight_map has {shard!r} for {key}, not the name of a file")
    names = sorted(set(shards.values()))
    for name in names:
        if not (folder / name).is_file():
            raise SeqmillError(f"{folder / name}: no such file, but {index} names it; copy it there")
    return [index, *(folder / name for name in names)]


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        SeqmillError: it can't be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SeqmillError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise SeqmillError(f"{path}: not a JSON object: {reason}") from error
    if not isinstance(content, dict):
        raise SeqmillError(f"{path}: not a JSON object: it holds a {type(content).__name__}")
    return content


def _family_of_folder(path: Path) -> str:
    config_path = path / CONFIG
    if not config_path.is_file():
        raise SeqmillError(
            f"model {path}: the folder has no {CONFIG}; expected a Hugging Face folder of ESM-2 or DNABERT-S"
        )
    config = read_json(config_path)
    model_type = config.get("model_type")
    if "transformers_weights" in config:  # transformers would read the file that it names
        raise SeqmillError(f"{config_path}: names its weights in transformers_weights; seqmill reads {SAFETENSORS}")
    weights = weight_files(path)
    # MosaicBERT calls itself bert; only its configuration has ALiBi.
    if model_type == "bert" and "alibi_starting_size" in config:
        if not weights:
            raise SeqmillError(f"model {path}: the folder has neither a .safetensors file nor {PICKLED_WEIGHTS}")
        if not (path / TOKENIZER).is_file():
            raise SeqmillError(
                f"model {path}: the folder has no {TOKENIZER}; put the one there that its model came with"
            )
        return DNABERT_S
    if model_type != "esm":
        raise SeqmillError(
            f"{config_path}: model_type is {model_type!r}; seqmill reads 'esm' (ESM-2), "
            "and 'bert' with ALiBi (DNABERT-S)"
        )
    if not weights or weights[0].name == PICKLED_WEIGHTS:
        raise SeqmillError(
            f"model {path}: the folder has no .safetensors file ({SAFETENSORS}, or {SAFETENSORS_INDEX} and those that "
            "it names); seqmill reads no pickled weights of ESM-2"
        )
    return ESM2


def _unknown(name: str, known: list[str]) -> str:
    # By the last part and in lower case, as in zhihan1996/DNABERT-S.
    keys = {model.lower(): model for model in known}
    close = difflib.get_close_matches(name.rpartition("/")[2].lower(), keys, n=1)
    hint = f"; did you mean {keys[close[0]]}?" if close else "."
    return (
        f"model {name!r} is not known{hint} "
        f"Give one of {', '.join(known)}, a fair-esm .pt file or a Hugging Face folder"
        + ("" if name.startswith(UNTRAINED_PREFIX) else f"; {UNTRAINED_PREFIX}NAME gives random weights for trials")
    )


def model_flop(architecture: AnyArchitecture, lengths: np.ndarray) -> float:
    """Return the floating-point operations of a forward over segments, matrix products and attention alone.

    For L layers of hidden dimension d, a token of a segment of n tokens costs 24 L d^2 (ESM-2) or 32 L d^2
    (DNABERT-S: 6 of qkv, 2 of out, 16 of the gated layers, 8 of the last), and 4 n d L of attention.

    Args:
        architecture: the model's shape.
        lengths: (num_segments,), tokens in each, special tokens included.
    """
    lengths = lengths.astype(float)
    layers, dim = architecture.num_layers, architecture.hidden_dim
    return float((lengths * (2 * architecture.matrix_parameters + 4 * lengths * dim * layers)).sum())
