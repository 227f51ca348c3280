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


@dataclass(frozen=True)
class Architecture:
    """The shape of an ESM-2 model (Lin et al. 2023, doi:10.1126/science.ade2574; fair-esm 2.0.0)."""

    num_layers: int
    hidden_dim: int
    num_heads: int
    vocabulary: int = 33
    token_dropout: bool = True

    @property
    def head_dim(self) -> int:
        return self.hidden_dim // self.num_heads

    @property
    def ffn_dim(self) -> int:
        return 4 * self.hidden_dim


MODELS = {
    "esm2_t6_8M_UR50D": Architecture(6, 320, 20),
    "esm2_t12_35M_UR50D": Architecture(12, 480, 20),
    "esm2_t30_150M_UR50D": Architecture(30, 640, 20),
    "esm2_t33_650M_UR50D": Architecture(33, 1280, 20),
    "esm2_t36_3B_UR50D": Architecture(36, 2560, 40),
    "esm2_t48_15B_UR50D": Architecture(48, 5120, 40),
}


@dataclass(frozen=True)
class ModelSource:
    """Where a model's weights come from.

    Attributes:
        name: as the user gave it.
        kind: "untrained" (seeded random weights), "released" (a registry name, fetched to
            resources/models), "checkpoint" (a fair-esm .pt file) or "folder" (Hugging Face).
        architecture: known for registry names; None where the file tells.
        path: the file or folder of the weights; None for untrained ones.
    """

    name: str
    kind: str
    architecture: Architecture | None
    path: Path | None

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
    if name.startswith(UNTRAINED_PREFIX):
        architecture = MODELS.get(name.removeprefix(UNTRAINED_PREFIX))
        if architecture is None:
            raise SeqpackError(_unknown(name, [UNTRAINED_PREFIX + known for known in MODELS]))
        return ModelSource(name, "untrained", architecture, None)
    if not name:
        raise SeqpackError(_unknown(name, list(MODELS)))  # Path("") would be the current folder
    if name in MODELS:
        return ModelSource(name, "released", MODELS[name], WEIGHTS_FOLDER / f"{name}.pt")
    try:
        path = Path(name).expanduser()
    except RuntimeError as error:  # ~nobody
        raise SeqpackError(f"model {name}: {error}") from error
    if path.is_dir():
        _require_esm_folder(path)
        return ModelSource(name, "folder", None, path)
    if path.suffix == ".pt" and path.is_file():
        return ModelSource(name, "checkpoint", None, path)
    if path.suffix == ".pt" or path.is_absolute():
        raise SeqpackError(f"model {path}: no such fair-esm .pt file or Hugging Face folder")
    raise SeqpackError(_unknown(name, list(MODELS)))


def _require_esm_folder(path: Path) -> None:
    config = path / "config.json"
    if not config.is_file():
        raise SeqpackError(f"model {path}: the folder has no config.json; expected a Hugging Face ESM-2 folder")
    try:
        model_type = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise SeqpackError(f"{config}: not a JSON object: {error}") from error
    if model_type != "esm":
        raise SeqpackError(f"{config}: model_type is {model_type!r}; seqpack reads 'esm' (ESM-2)")
    if not any(path.glob("*.safetensors")):
        raise SeqpackError(f"model {path}: the folder has no .safetensors file; seqpack reads no pickled weights")


def _unknown(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]}?" if close else "."
    return (
        f"model {name!r} is not known{hint} "
        f"Give one of {', '.join(known)}, a fair-esm .pt file or a Hugging Face folder"
        + ("" if name.startswith(UNTRAINED_PREFIX) else f"; {UNTRAINED_PREFIX}NAME gives random weights for trials")
    )
