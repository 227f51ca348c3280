"""Models: the names and paths that a user may give, their architectures and files. Imports no torch."""

import difflib
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from seqmill.base.commands import command
from seqmill.base.files import cache_folder, read_json
from seqmill.errors import SeqmillError
from seqmill.spec.architectures import (
    T5_VOCABULARIES,
    Architecture,
    DnabertArchitecture,
    Esm2Architecture,
    EsmcArchitecture,
    T5Architecture,
)
from seqmill.spec.families import DNABERT_S, ESM2, ESMC, FAMILIES, PROSTT5, PROTT5, Family
from seqmill.spec.released import release_of
from seqmill.spec.weight_files import PICKLED_WEIGHTS, SAFETENSORS, SAFETENSORS_INDEX, weight_files

UNTRAINED_PREFIX = "untrained:"
WEIGHTS_FOLDER = Path("resources/models")  # the workflow's; see `weights_folders`
WEIGHTS_VARIABLE = "SEQMILL_MODELS"
CONFIG, TOKENIZER = "config.json", "tokenizer.json"
UNTRAINED_TOKENIZER = Path(__file__).with_name("untrained_dnabert_s") / TOKENIZER

ESM2_MODELS = {
    "esm2_t6_8M_UR50D": Esm2Architecture(6, 320, 20),
    "esm2_t12_35M_UR50D": Esm2Architecture(12, 480, 20),
    "esm2_t30_150M_UR50D": Esm2Architecture(30, 640, 20),
    "esm2_t33_650M_UR50D": Esm2Architecture(33, 1280, 20),
    "esm2_t36_3B_UR50D": Esm2Architecture(36, 2560, 40),
    "esm2_t48_15B_UR50D": Esm2Architecture(48, 5120, 40),
}
ESMC_MODELS = {
    "esmc_300m": EsmcArchitecture(30, 960, 15),
    "esmc_600m": EsmcArchitecture(36, 1152, 18),
    "esmc_6b": EsmcArchitecture(80, 2560, 40),
}
T5_MODELS = {
    "prott5_xl_u50": T5Architecture(vocabulary=T5_VOCABULARIES[PROTT5]),
    "prostt5": T5Architecture(vocabulary=T5_VOCABULARIES[PROSTT5]),
}
DNABERT_MODELS = {"dnabert_s": DnabertArchitecture(), "dnabert_2": DnabertArchitecture()}
MODELS: dict[str, Architecture] = {**ESM2_MODELS, **ESMC_MODELS, **T5_MODELS, **DNABERT_MODELS}
NAMES = list(MODELS)
DEFAULT_MODEL = "esm2_t33_650M_UR50D"  # the usual choice
ESMC_OWNERS = ("evolutionaryscale", "biohub")  # of the first releases
# Their names on the Hugging Face Hub, in lower case: the Hub ignores case as well.
HUB_NAMES = {
    **{f"facebook/{name}".lower(): name for name in ESM2_MODELS},
    **{f"biohub/{name.replace('_', '-')}": name for name in ESMC_MODELS},
    **{f"{owner}/esmc-{size}-2024-12": f"esmc_{size}" for owner in ESMC_OWNERS for size in ("300m", "600m")},
    "rostlab/prot_t5_xl_half_uniref50-enc": "prott5_xl_u50",
    "rostlab/prot_t5_xl_uniref50": "prott5_xl_u50",
    "rostlab/prostt5": "prostt5",
    "rostlab/prostt5_fp16": "prostt5",
    "zhihan1996/dnabert-s": "dnabert_s",
    "zhihan1996/dnabert-2-117m": "dnabert_2",
}
CHECKPOINTS = {".pt": ESM2, ".pth": ESMC}
HUB_ID = re.compile(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}", re.ASCII)


@dataclass(frozen=True)
class ModelSource:
    """The origin of a model's weights.

    Its kind is "untrained" (seeded random weights), "released" (a name in `NAMES`; `seqmill fetch` fetches it),
    "checkpoint" (a fair-esm .pt file of ESM-2, an esm .pth file of ESM C) or "folder" (Hugging Face).
    """

    name: str  # as the user gave it
    kind: str
    architecture: Architecture | None  # known for `NAMES`; None if the file defines it
    path: Path | None  # the file or folder; None for untrained weights
    family: Family = ESM2

    @property
    def tokenizer(self) -> Path | None:
        """The tokenizer.json of a nucleotide model; protein models need none."""
        if self.family != DNABERT_S:
            return None
        return self.path / TOKENIZER if self.path else UNTRAINED_TOKENIZER

    @property
    def is_folder(self) -> bool:
        """Whether the model is a folder of files: a Hugging Face folder, or a released model but ESM-2."""
        return self.kind == "folder" or (self.kind == "released" and self.family != ESM2)

    @property
    def files(self) -> list[Path]:
        """All files of the model; none for untrained weights. A released model's files may be missing.

        Raise a SeqmillError if the weight index of a user's folder can't be read, or names a missing file.
        """
        if self.path is None:
            return []
        if not self.is_folder:
            return [self.path]
        weights: list[Path] = []
        try:
            weights = weight_files(self.path)
        except SeqmillError:
            if self.kind != "released":
                raise
        if self.kind == "released" and not weights:  # not on this disk, or not all of them
            return [self.path / file for file in release_of(self.name).files]
        return [self.path / CONFIG, *([self.tokenizer] if self.tokenizer else []), *weights]

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
    file = f"{name}.pt" if MODELS[name].family == ESM2 else name
    return [released_at(name, folder / file) for folder in folders]


def released_at(name: str, path: Path) -> ModelSource:
    """Return one of `NAMES` whose weights are at a path: a .pt file of ESM-2, else a folder."""
    return ModelSource(name, "released", MODELS[name], path, MODELS[name].family)


def find_model(name: str) -> ModelSource:
    """Resolve one of `NAMES` or `HUB_NAMES`, untrained:NAME, a file (`CHECKPOINTS`) or a Hugging Face folder.

    The files of a released model are those in `WEIGHTS_FOLDER` if all are there, else those in the user's folder if all
    are there, else those that the workflow will fetch to `WEIGHTS_FOLDER`.

    Raise a SeqmillError that lists the possibilities if `name` is neither a known name nor a usable path.
    """
    known = name.removeprefix(UNTRAINED_PREFIX)
    if known in NAMES:
        if known != name:
            return ModelSource(name, "untrained", MODELS[known], None, MODELS[known].family)
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
    if path.suffix in CHECKPOINTS and path.is_file():
        return ModelSource(name, "checkpoint", None, path, CHECKPOINTS[path.suffix])
    if name.lower() in HUB_NAMES:
        return find_model(HUB_NAMES[name.lower()])
    if is_hub_id(name):
        close = difflib.get_close_matches(name.lower(), HUB_NAMES, n=1)
        hint = f"; did you mean {HUB_NAMES[close[0]]}?" if close else "."
        raise SeqmillError(
            f"model {name}: no such folder{hint} If it is a model on the Hugging Face Hub, run "
            f"`{command('fetch', name)}` and give the folder that it prints"
        )
    if path.suffix in CHECKPOINTS or path.is_absolute():
        raise SeqmillError(f"model {path}: no such fair-esm .pt file, ESM C .pth file, or Hugging Face folder")
    raise SeqmillError(_unknown(name, NAMES))


def is_hub_id(name: str) -> bool:
    """Return whether a name can only be that of a model on the Hugging Face Hub which is not in `HUB_NAMES`."""
    is_shaped = bool(HUB_ID.fullmatch(name)) and not name.endswith(tuple(CHECKPOINTS))
    return is_shaped and name.lower() not in HUB_NAMES and not Path(name).exists()


def family_of_config(path: Path) -> Family:
    """Return the family of the model that a folder's config.json describes; raise a SeqmillError if it has none."""
    config_path = path / CONFIG
    if not config_path.is_file():
        titles = ", ".join(family.title for family in FAMILIES.values())
        raise SeqmillError(f"model {path}: the folder has no {CONFIG}; expected a Hugging Face folder of {titles}")
    config = read_json(config_path)
    model_type = config.get("model_type")
    if "transformers_weights" in config:  # transformers would read that file
        raise SeqmillError(f"{config_path}: names its weights in transformers_weights; seqmill reads {SAFETENSORS}")
    if model_type == "bert" and "alibi_starting_size" in config:  # MosaicBERT's
        return DNABERT_S
    if model_type == "t5":
        for family, vocabulary in T5_VOCABULARIES.items():
            if config.get("vocab_size") == vocabulary:
                return family
        sizes = " or ".join(f"{size} ({family.title})" for family, size in T5_VOCABULARIES.items())
        raise SeqmillError(f"{config_path}: vocab_size is {config.get('vocab_size')!r}; seqmill reads T5 with {sizes}")
    for family, name in ((ESM2, "esm"), (ESMC, "esmc")):
        if model_type == name:
            return family
    raise SeqmillError(
        f"{config_path}: model_type is {model_type!r}; seqmill reads 'esm' (ESM-2), 'esmc' (ESM C), "
        "'t5' (ProtT5, ProstT5), and 'bert' with ALiBi (DNABERT-S)"
    )


def _family_of_folder(path: Path) -> Family:
    family, weights = family_of_config(path), weight_files(path)
    reads_pickles = family not in (ESM2, ESMC)
    if not weights and reads_pickles:
        raise SeqmillError(f"model {path}: the folder has neither a .safetensors file nor {PICKLED_WEIGHTS}")
    if not reads_pickles and (not weights or weights[0].name == PICKLED_WEIGHTS):
        raise SeqmillError(
            f"model {path}: the folder has no .safetensors file ({SAFETENSORS}, or {SAFETENSORS_INDEX} and its files); "
            f"seqmill does not read pickled weights of {family.title}"
        )
    if family == DNABERT_S and not (path / TOKENIZER).is_file():
        raise SeqmillError(f"model {path}: the folder has no {TOKENIZER}; copy the one that came with the model")
    return family


def _unknown(name: str, known: list[str]) -> str:
    # Compare the last part, in lower case: users give names such as zhihan1996/DNABERT-S.
    keys = {model.lower(): model for model in known}
    typed = name.rpartition("/")[2].lower()
    begun = [model for model in keys if typed and model.startswith(typed)]  # prott5 is not prostt5
    close = begun if len(begun) == 1 else difflib.get_close_matches(typed, keys, n=1)
    hint = f"; did you mean {keys[close[0]]}?" if close else "."
    return (
        f"model {name!r} is not known{hint} "
        f"Give one of {', '.join(known)}, a checkpoint file (.pt, .pth) or a Hugging Face folder"
        + ("" if name.startswith(UNTRAINED_PREFIX) else f"; {UNTRAINED_PREFIX}NAME gives random weights for trials")
    )
