"""The names a user may give as `model`, and what each stands for. Light: imports no torch."""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from seqpack.errors import SeqpackError

UNTRAINED_PREFIX = "untrained:"
WEIGHTS_FOLDER = Path("resources/models")
CONFIG, TOKENIZER = "config.json", "tokenizer.json"
PICKLED_WEIGHTS = "pytorch_model.bin"  # DNABERT-S is published so
RELEASED_FILES = (CONFIG, TOKENIZER, PICKLED_WEIGHTS)  # of a model of nucleotides
UNTRAINED_TOKENIZER = Path(__file__).with_name("untrained_dnabert_s") / TOKENIZER
ESM2, DNABERT_S = "esm2", "dnabert_s"  # families: one module, one tokenizer, one reference each


@dataclass(frozen=True)
class Transformer:
    """What the shapes of both families have in common."""

    num_layers: int
    hidden_dim: int
    num_heads: int

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
        """All files that the model is made from; none for untrained ones. Those of a released one may not be there."""
        if self.path is None:
            return []
        if self.kind == "folder":
            weights = sorted(self.path.glob("*.safetensors")) or [self.path / PICKLED_WEIGHTS]
            return [self.path / CONFIG, *([self.tokenizer] if self.tokenizer else []), *weights]
        if self.family == DNABERT_S:
            return [self.path / name for name in RELEASED_FILES]
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
        SeqpackError: neither a known name nor a usable path; lists what could have been meant.
    """
    known = name.removeprefix(UNTRAINED_PREFIX)
    if known in DNABERT_MODELS:
        kind, path = ("released", WEIGHTS_FOLDER / name) if known == name else ("untrained", None)
        return ModelSource(name, kind, DNABERT_MODELS[known], path, DNABERT_S)
    if name.startswith(UNTRAINED_PREFIX):
        architecture = MODELS.get(known)
        if architecture is None:
            raise SeqpackError(_unknown(name, [UNTRAINED_PREFIX + model for model in NAMES]))
        return ModelSource(name, "untrained", architecture, None)
    if not name:
        raise SeqpackError(_unknown(name, NAMES))  # Path("") would be the current folder
    if name in MODELS:
        return ModelSource(name, "released", MODELS[name], WEIGHTS_FOLDER / f"{name}.pt")
    try:
        path = Path(name).expanduser()
    except RuntimeError as error:  # ~nobody
        raise SeqpackError(f"model {name}: {error}") from error
    if path.is_dir():
        return ModelSource(name, "folder", None, path, _family_of_folder(path))
    if path.suffix == ".pt" and path.is_file():
        return ModelSource(name, "checkpoint", None, path)
    if path.suffix == ".pt" or path.is_absolute():
        raise SeqpackError(f"model {path}: no such fair-esm .pt file or Hugging Face folder")
    raise SeqpackError(_unknown(name, NAMES))


def _family_of_folder(path: Path) -> str:
    config_path = path / CONFIG
    if not config_path.is_file():
        raise SeqpackError(
            f"model {path}: the folder has no {CONFIG}; expected a Hugging Face folder of ESM-2 or DNABERT-S"
        )
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
        model_type = config.get("model_type")
    except (ValueError, AttributeError) as error:
        raise SeqpackError(f"{config_path}: not a JSON object: {error}") from error
    # MosaicBERT calls itself bert; only its configuration has ALiBi.
    if model_type == "bert" and "alibi_starting_size" in config:
        if not any(path.glob("*.safetensors")) and not (path / PICKLED_WEIGHTS).is_file():
            raise SeqpackError(f"model {path}: the folder has neither a .safetensors file nor {PICKLED_WEIGHTS}")
        if not (path / TOKENIZER).is_file():
            raise SeqpackError(
                f"model {path}: the folder has no {TOKENIZER}; put the one there that its model came with"
            )
        return DNABERT_S
    if model_type != "esm":
        raise SeqpackError(
            f"{config_path}: model_type is {model_type!r}; seqpack reads 'esm' (ESM-2), "
            "and 'bert' with ALiBi (DNABERT-S)"
        )
    if not any(path.glob("*.safetensors")):
        raise SeqpackError(f"model {path}: the folder has no .safetensors file; seqpack reads no pickled weights")
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
