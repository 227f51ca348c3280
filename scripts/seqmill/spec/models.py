"""Models: the names and paths that a user may give, their architectures and files. Imports no torch."""

import difflib
import os
import re
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from seqmill.base.commands import command
from seqmill.base.files import cache_folder, read_json
from seqmill.errors import SeqmillError
from seqmill.spec.weight_files import PICKLED_WEIGHTS, SAFETENSORS, SAFETENSORS_INDEX, weight_files

if TYPE_CHECKING:
    import numpy as np

UNTRAINED_PREFIX = "untrained:"
WEIGHTS_FOLDER = Path("resources/models")  # the workflow's; see `weights_folders`
WEIGHTS_VARIABLE = "SEQMILL_MODELS"
CONFIG, TOKENIZER = "config.json", "tokenizer.json"
RELEASED_FILES = (CONFIG, TOKENIZER, PICKLED_WEIGHTS)  # of a nucleotide model
UNTRAINED_TOKENIZER = Path(__file__).with_name("untrained_dnabert_s") / TOKENIZER
ESM2, DNABERT_S = "esm2", "dnabert_s"  # families: each has one module, one tokenizer, one reference
# Several times the sizes of any published model; larger ones are damage, or an attempt to exhaust the memory.
MOST_LAYERS, MOST = 1_000, 1_000_000


@dataclass(frozen=True)
class Transformer:
    """The sizes that both families have; raises a ValueError for impossible ones."""

    num_layers: int
    hidden_dim: int
    num_heads: int
    layer_matrices: ClassVar[int]  # parameters in a layer's matrices, divided by hidden_dim squared

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

    @property
    def matrix_parameters(self) -> int:
        """Parameters in all layers' matrices, each 2 FLOP per token."""
        return self.num_layers * self.layer_matrices * self.hidden_dim**2


@dataclass(frozen=True)
class Architecture(Transformer):
    """The shape of an ESM-2 model (Lin et al. 2023, doi:10.1126/science.ade2574; fair-esm 2.0.0)."""

    vocabulary: int = 33
    token_dropout: bool = True
    layer_matrices: ClassVar[int] = 12  # 4 in attention, 8 in the FFN

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_dim % 2:
            raise ValueError(f"num_heads is {self.num_heads}, so heads are {self.head_dim} wide, not an even number")


@dataclass(frozen=True)
class DnabertArchitecture(Transformer):
    """The shape of DNABERT-2 (Zhou et al. 2023, arXiv:2306.15006) and of DNABERT-S, which was trained from it."""

    num_layers: int = 12
    hidden_dim: int = 768
    num_heads: int = 12
    vocabulary: int = 4096
    token_types: int = 2
    layer_matrices: ClassVar[int] = 16  # 4 in attention, 8 in the gated layer, 4 in the last


AnyArchitecture = Architecture | DnabertArchitecture

MODELS = {
    "esm2_t6_8M_UR50D": Architecture(6, 320, 20),
    "esm2_t12_35M_UR50D": Architecture(12, 480, 20),
    "esm2_t30_150M_UR50D": Architecture(30, 640, 20),
    "esm2_t33_650M_UR50D": Architecture(33, 1280, 20),
    "esm2_t36_3B_UR50D": Architecture(36, 2560, 40),
    "esm2_t48_15B_UR50D": Architecture(48, 5120, 40),
}
# Nucleotide models; their weights are Hugging Face folders.
DNABERT_MODELS = {"dnabert_s": DnabertArchitecture(), "dnabert_2": DnabertArchitecture()}
NAMES = [*MODELS, *DNABERT_MODELS]
DEFAULT_MODEL = "esm2_t33_650M_UR50D"  # the usual choice
# Their names on the Hugging Face Hub, in lower case: the Hub ignores case as well.
HUB_NAMES = {
    **{f"facebook/{name}".lower(): name for name in MODELS},
    "zhihan1996/dnabert-s": "dnabert_s",
    "zhihan1996/dnabert-2-117m": "dnabert_2",
}
HUB_ID = re.compile(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}", re.ASCII)


@dataclass(frozen=True)
class ModelSource:
    """The origin of a model's weights.

    Its kind is "untrained" (seeded random weights), "released" (a name in `NAMES`; `seqmill fetch` fetches it),
    "checkpoint" (a fair-esm .pt file) or "folder" (Hugging Face).
    """

    name: str  # as the user gave it
    kind: str
    architecture: AnyArchitecture | None  # known for `NAMES`; None if the file defines it
    path: Path | None  # the file or folder; None for untrained weights
    family: str = ESM2  # or DNABERT_S

    @property
    def tokenizer(self) -> Path | None:
        """The tokenizer.json of a nucleotide model; ESM-2 needs none."""
        if self.family != DNABERT_S:
            return None
        return self.path / TOKENIZER if self.path else UNTRAINED_TOKENIZER

    @property
    def files(self) -> list[Path]:
        """All files of the model; none for untrained weights. A released model's files may be missing.

        Raise a SeqmillError if a folder's weight index can't be read, or names a missing file.
        """
        if self.path is None:
            return []
        if self.kind == "folder" or self.family == DNABERT_S:
            weights = weight_files(self.path) or [self.path / PICKLED_WEIGHTS]
            return [self.path / CONFIG, *([self.tokenizer] if self.tokenizer else []), *weights]
        return [self.path]

    @property
    def is_on_disk(self) -> bool:
        """Whether all files of the model exist."""
        return all(file.exists() for file in self.files)

    @property
    def slug(self) -> str:
        """A folder name for results: the model's name without parent folders and unusual characters."""
        name = self.path.stem if self.kind == "checkpoint" and self.path else Path(self.name).name
        if name in ("", ".."):  # a folder given as . or as ../..
            name = Path(self.name).resolve().name
        return re.sub(r"[^\w.-]+", "-", name)


def user_weights_folder() -> Path:
    """Return the user's folder of released models' weights: $SEQMILL_MODELS, else models in seqmill's cache folder.

    Raise a RuntimeError if there is no home folder.
    """
    chosen = os.environ.get(WEIGHTS_VARIABLE)
    return Path(chosen).expanduser() if chosen else cache_folder() / "models"


def released_sources(name: str) -> list[ModelSource]:
    """Return where one of `NAMES` may be on this disk, in the order in which it is looked for."""
    folders = [WEIGHTS_FOLDER]
    with suppress(RuntimeError):  # no home folder, as in some containers
        folders.append(user_weights_folder())
    family, file = (ESM2, f"{name}.pt") if name in MODELS else (DNABERT_S, name)
    architecture = (MODELS | DNABERT_MODELS)[name]
    return [ModelSource(name, "released", architecture, folder / file, family) for folder in folders]


def find_model(name: str) -> ModelSource:
    """Resolve one of `NAMES` or `HUB_NAMES`, untrained:NAME, a fair-esm .pt file or a Hugging Face folder.

    The files of a released model are those in `WEIGHTS_FOLDER` if all are there, else those in the user's folder if all
    are there, else those that the workflow will fetch to `WEIGHTS_FOLDER`.

    Raise a SeqmillError that lists the possibilities if `name` is neither a known name nor a usable path.
    """
    known = name.removeprefix(UNTRAINED_PREFIX)
    if known in NAMES:
        if known != name:
            family = ESM2 if known in MODELS else DNABERT_S
            return ModelSource(name, "untrained", (MODELS | DNABERT_MODELS)[known], None, family)
        sources = released_sources(name)
        return next((source for source in sources if source.is_on_disk), sources[0])
    if known != name:
        raise SeqmillError(_unknown(name, [UNTRAINED_PREFIX + model for model in NAMES]))
    if not name:
        raise SeqmillError(_unknown(name, NAMES))  # Path("") would be the current folder
    try:
        path = Path(name).expanduser()
    except RuntimeError as error:  # ~nobody
        raise SeqmillError(f"model {name}: {error}") from error
    if path.is_dir():
        return ModelSource(name, "folder", None, path, _family_of_folder(path))
    if path.suffix == ".pt" and path.is_file():
        return ModelSource(name, "checkpoint", None, path)
    if name.lower() in HUB_NAMES:
        return find_model(HUB_NAMES[name.lower()])
    if is_hub_id(name):
        close = difflib.get_close_matches(name.lower(), HUB_NAMES, n=1)
        hint = f"; did you mean {HUB_NAMES[close[0]]}?" if close else "."
        raise SeqmillError(
            f"model {name}: no such folder{hint} If it is a model on the Hugging Face Hub, run "
            f"`{command('fetch', name)}` and give the folder that it prints"
        )
    if path.suffix == ".pt" or path.is_absolute():
        raise SeqmillError(f"model {path}: no such fair-esm .pt file or Hugging Face folder")
    raise SeqmillError(_unknown(name, NAMES))


def is_hub_id(name: str) -> bool:
    """Return whether a name can only be that of a model on the Hugging Face Hub which is not in `HUB_NAMES`."""
    is_shaped = bool(HUB_ID.fullmatch(name)) and not name.endswith(".pt")
    return is_shaped and name.lower() not in HUB_NAMES and not Path(name).exists()


def family_of_config(path: Path) -> str:
    """Return the family of the model that a folder's config.json describes; raise a SeqmillError if it has none."""
    config_path = path / CONFIG
    if not config_path.is_file():
        raise SeqmillError(
            f"model {path}: the folder has no {CONFIG}; expected a Hugging Face folder of ESM-2 or DNABERT-S"
        )
    config = read_json(config_path)
    model_type = config.get("model_type")
    if "transformers_weights" in config:  # transformers would read that file
        raise SeqmillError(f"{config_path}: names its weights in transformers_weights; seqmill reads {SAFETENSORS}")
    # MosaicBERT's model_type is bert; only its configuration has ALiBi.
    if model_type == "bert" and "alibi_starting_size" in config:
        return DNABERT_S
    if model_type != "esm":
        raise SeqmillError(
            f"{config_path}: model_type is {model_type!r}; seqmill reads 'esm' (ESM-2), "
            "and 'bert' with ALiBi (DNABERT-S)"
        )
    return ESM2


def _family_of_folder(path: Path) -> str:
    family, weights = family_of_config(path), weight_files(path)
    if family == DNABERT_S:
        if not weights:
            raise SeqmillError(f"model {path}: the folder has neither a .safetensors file nor {PICKLED_WEIGHTS}")
        if not (path / TOKENIZER).is_file():
            raise SeqmillError(f"model {path}: the folder has no {TOKENIZER}; copy the one that came with the model")
    elif not weights or weights[0].name == PICKLED_WEIGHTS:
        raise SeqmillError(
            f"model {path}: the folder has no .safetensors file ({SAFETENSORS}, or {SAFETENSORS_INDEX} and its files); "
            "seqmill does not read pickled weights of ESM-2"
        )
    return family


def _unknown(name: str, known: list[str]) -> str:
    # Compare the last part, in lower case: users give names such as zhihan1996/DNABERT-S.
    keys = {model.lower(): model for model in known}
    close = difflib.get_close_matches(name.rpartition("/")[2].lower(), keys, n=1)
    hint = f"; did you mean {keys[close[0]]}?" if close else "."
    return (
        f"model {name!r} is not known{hint} "
        f"Give one of {', '.join(known)}, a fair-esm .pt file or a Hugging Face folder"
        + ("" if name.startswith(UNTRAINED_PREFIX) else f"; {UNTRAINED_PREFIX}NAME gives random weights for trials")
    )


def model_flop(architecture: AnyArchitecture, lengths: "np.ndarray") -> float:
    """Return the floating-point operations of a forward over segments, only of matrix products and attention.

    With L layers of hidden dimension d, a token in a segment of n tokens costs 24 L d^2 (ESM-2) or 32 L d^2 (DNABERT-S:
    6 for qkv, 2 for out, 16 for the gated layer, 8 for the last), plus 4 n d L for attention. `lengths` (num_segments,)
    are the tokens in each, special tokens included.
    """
    lengths = lengths.astype(float)
    layers, dim = architecture.num_layers, architecture.hidden_dim
    return float((lengths * (2 * architecture.matrix_parameters + 4 * lengths * dim * layers)).sum())
