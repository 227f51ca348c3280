"""Starts the workflow in any folder: reads what is asked for, and returns the command of Snakemake that does it."""

import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seqmill.base.commands import command
from seqmill.base.extras import require_modules
from seqmill.errors import SeqmillError
from seqmill.run.datasets import Dataset, dataset_of_file, datasets_of_mapping, read_datasets
from seqmill.run.workflow_files import workflow_folder
from seqmill.spec.models import NAMES
from seqmill.spec.outputs import POOLINGS, Outputs
from seqmill.spec.task import PRECISIONS

CONFIG_FILE = Path("config/config.yaml")  # in the working directory
PATHS = ("fasta", "datasets", "metadata", "container")  # settings that name one file
READ = ("fasta", "datasets", "model", "precision", "pooling")
DEFAULT_PROFILE = "default"
# Options of Snakemake that `Launch.command` gives, with what to give instead. Snakemake would take the last one alone.
GIVEN = {
    ("--config", "-C"): "--config before --",
    ("--cores", "-c"): "--cores before --",
    ("--directory", "-d"): "--output before --",
    ("--workflow-profile", ""): "--profile before --",
    ("--snakefile", "-s"): "options for seqmill's own Snakefile only",
}
SHORTEST = len("--di")  # an abbreviation
# With these options workers may run in another environment.
ELSEWHERE = ("--sdm", "--software-deployment-method", "--use-", "--executor", "-e")


@dataclass(frozen=True)
class Launch:
    """A run as it was asked for on the command line; paths are relative to the current directory."""

    settings: Mapping[str, str]  # of --config, with fasta, model and shards
    output: Path  # the run's working directory
    profile: str = DEFAULT_PROFILE  # one of the workflow's, or a folder
    cores: str = ""  # a number or all; empty: as the profile says
    gpus: int = 0  # shards that run at a time, each on one GPU; 0: no limit
    options: Sequence[str] = ()  # of Snakemake

    def datasets(self) -> list[Dataset]:
        """Return what the workflow will embed; raise a SeqmillError if there is nothing, or a file is unusable."""
        own, folders = self.output / CONFIG_FILE, [self.output, workflow_folder()]
        if not own.exists() and not {"fasta", "datasets"} & self.settings.keys():
            raise SeqmillError(f"nothing to embed: give a FASTA file, --config datasets=TABLE, or settings in {own}")
        asked = self._asked()
        if asked["fasta"]:
            return [dataset_of_file(asked["fasta"], asked["model"], [Path()] if "fasta" in self.settings else folders)]
        if isinstance(asked["datasets"], Mapping):
            return datasets_of_mapping(asked["datasets"], asked["model"], folders)
        table = os.path.expanduser(asked["datasets"])  # noqa: PTH111  (Path's raises an error for ~nobody)
        tables = [folder / table for folder in ([Path()] if "datasets" in self.settings else folders)]
        return read_datasets(next(filter(Path.exists, tables), tables[0]), asked["model"], folders)

    def require_possible(self, datasets: Iterable[Dataset]) -> None:
        """Raise a SeqmillError if a model has no such precision or pooling: before a long download.

        The workflow itself checks all settings.
        """
        asked = self._asked()
        poolings = tuple(name for name in POOLINGS if name in re.findall(r"\w+", asked["pooling"]))
        for dataset in datasets:
            try:
                if asked["precision"] in PRECISIONS:
                    dataset.model.family.require_precision(asked["precision"])
                Outputs(poolings=poolings or ("mean",)).require_family(dataset.model.family)
            except SeqmillError as error:
                raise SeqmillError(f"dataset {dataset.name}, model {dataset.model.name}: {error}") from error

    def _asked(self) -> dict[str, Any]:
        own = self.output / CONFIG_FILE
        return _read_settings(own if own.exists() else workflow_folder() / CONFIG_FILE) | dict(self.settings)

    def command(self) -> list[str]:
        """Return Snakemake's command line.

        Raise a SeqmillError if there is no such profile, a package is missing, or `options` has one of `GIVEN`.
        """
        self._refuse_given()
        profile = self._profile_folder()
        self._require_packages(profile)
        # -P: the current folder may hold modules with the names of packages.
        command = [sys.executable, "-P", "-m", "snakemake", *self.options]
        command += ["--snakefile", str(workflow_folder() / "Snakefile"), "--workflow-profile", str(profile)]
        command += ["--directory", str(self.output)] if self._is_elsewhere else []
        command += ["--cores", self.cores] if self.cores else []
        command += ["--resources", f"gpu={self.gpus}"] if self.gpus else []
        settings = [f"{key}={self._as_seen_from_output(key, value)}" for key, value in self.settings.items()]
        return [*command, "--config", *settings] if settings else command

    @property
    def _is_elsewhere(self) -> bool:
        return self.output.resolve() != Path.cwd()

    def _refuse_given(self) -> None:
        given = GIVEN | ({("--resources", "--res"): "all of --resources after --, and no --gpus"} if self.gpus else {})
        for option in self.options:
            name = option.partition("=")[0]
            for (long, short), instead in given.items():
                if (len(name) >= SHORTEST and long.startswith(name)) or (short and re.match(rf"{short}(?!-)", option)):
                    raise SeqmillError(f"{name} cannot be given after --: give {instead}")

    def _profile_folder(self) -> Path:
        profiles = workflow_folder() / "profiles"
        for folder in (Path(self.profile).expanduser(), profiles / self.profile):
            if any(folder.glob("*.yaml")):
                return folder.absolute()
        names = " or ".join(sorted(folder.name for folder in profiles.iterdir()))
        raise SeqmillError(
            f"profile {self.profile}: no such folder with a profile.yaml; give {names}, or a folder of your own "
            f"(`{command('run', '--write-profile', self.profile)}` writes one for SLURM)"
        )

    def _require_packages(self, profile: Path) -> None:
        needed = ["snakemake"]
        if any(re.search(r"^executor: *slurm\b", path.read_text(), re.MULTILINE) for path in profile.glob("*.yaml")):
            needed.append("snakemake_executor_plugin_slurm")
        elif not any(option.startswith(ELSEWHERE) for option in self.options):
            needed.append("torch")
        require_modules(*needed)

    def _as_seen_from_output(self, key: str, value: str) -> str:
        """Return a setting for the run's working directory: paths in it become absolute if that is another one."""
        if not self._is_elsewhere:
            return _quoted(value) if key == "fasta" else value
        if key == "reuse":
            names = value.removeprefix("[").removesuffix("]").split(",")
            return f"[{','.join(_quoted(_absolute(name.strip())) for name in names if name.strip())}]"
        if (key in PATHS and value) or (key == "model" and value not in NAMES and Path(value).expanduser().exists()):
            return _quoted(_absolute(value))
        return value


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())


def _quoted(path: str) -> str:
    """Quote a path if Snakemake would take it for a number, or YAML for something else than text.

    Spaces go around the quotes, because Snakemake removes quotes at the ends before it parses YAML. YAML can't hold
    bytes that are not UTF-8; Snakemake then takes the text as it is.
    """
    if re.fullmatch(r"[\w./+-]*[./][A-Za-z_][\w./+-]*", path) or not path.isprintable():
        return path
    return " '" + path.replace("'", "''") + "' "


def _read_settings(path: Path) -> dict[str, Any]:
    """Return the settings `READ` of a configuration file, or their defaults."""
    import yaml  # here, so that a missing Snakemake is named first

    schema = yaml.safe_load((workflow_folder() / "config/schemas/config.schema.yaml").read_text(encoding="utf-8"))
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise SeqmillError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise SeqmillError(f"{path}: holds no settings; a line is KEY: VALUE")
    properties = schema["properties"]
    asked = {key: found.get(key, properties[key]["default"]) for key in READ}
    return {key: value if isinstance(value, Mapping) else str(value) for key, value in asked.items()}
