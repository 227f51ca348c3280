"""One dataset of a run: what is computed, its files, and what its jobs ask for."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from seqmill.errors import SeqmillError
from seqmill.report.colors import require_column
from seqmill.run import resources
from seqmill.run.datasets import Dataset
from seqmill.run.reuse_checks import known_settings, require_settings, reused_by
from seqmill.run.stale import Request, started_world_size
from seqmill.spec.lengths import LengthPolicy, choose_length_policy
from seqmill.spec.outputs import Outputs, dataset_name, residue_dataset
from seqmill.store.layout import status_path_of
from seqmill.store.reuse import Source

INDEX_THREADS = 8  # at most


@dataclass(frozen=True)
class DatasetRun(Dataset):
    """A dataset with the settings of its run."""

    settings: Mapping[str, Any]  # see `check_settings`
    policy: LengthPolicy
    outputs: Outputs  # layers below 0 count from the end
    world_size: int = 1  # the number of shards
    reused: Mapping[Path, str] = field(default_factory=dict)  # fingerprints of the earlier results to take vectors from
    use_gpu: bool = False  # for shards
    cores: int = 1  # that the run may use
    gpu_threads: int = 1  # CPU cores of a shard with a GPU

    @classmethod
    def of(cls, dataset: Dataset, settings: Mapping[str, Any]) -> "DatasetRun":
        """Choose what the settings leave to the model; raise a SeqmillError if they do not suit it or its dataset."""
        try:
            lengths = (settings[name] for name in ("long_sequences", "max_length", "window", "stride", "strand"))
            policy = choose_length_policy(dataset.model.family, *lengths)
            outputs = Outputs(tuple(settings["layers"]), tuple(settings["pooling"]), settings["per_residue"])
            outputs.require_family(dataset.model.family)
            dataset.model.family.require_precision(settings["precision"])
            whole = dataset.name, dataset.fasta, dataset.model
            run = cls(*whole, settings, policy, outputs, results=dataset.results, logs=dataset.logs)
            if "h5_residues" in settings["exports"] and not outputs.per_residue:
                raise SeqmillError("exports: h5_residues needs per_residue: float16 or float32")
            _ = run.layers  # raises if the model does not have them
            run._require_metadata()
        except SeqmillError as error:
            raise SeqmillError(f"dataset {dataset.name}, model {dataset.model.name}: {error}") from error
        return run

    def _require_metadata(self) -> None:
        """Raise if the report can't be colored as set: Snakemake deletes the old report when the job starts."""
        metadata, color = self.settings["metadata"], self.settings["color"]
        if bool(metadata) != bool(color):
            raise SeqmillError(
                "metadata and color go together: a table, and its column that colors the map; set both or neither"
            )
        path = metadata.replace("{dataset}", self.name).replace("{model}", self.model.slug)
        if "{" in path or "}" in path:
            raise SeqmillError(
                f"metadata {metadata}: Snakemake takes braces for wildcards, and the known ones are {{dataset}} and "
                "{model}; rename the file or link to it"
            )
        if path:
            require_column(Path(path), color)

    @property
    def shards(self) -> list[Path]:
        return self.folder.all_shards(self.world_size)

    @property
    def statuses(self) -> list[Path]:
        return list(map(status_path_of, self.shards))

    @property
    def exports(self) -> list[Path]:
        """The main file of each export."""
        outputs = replace(self.outputs, layers=self.layers)
        vectors = [dataset_name(*pair, pair == outputs.pairs[0]) for pair in outputs.pairs]
        residues = [residue_dataset(layer, layer == outputs.layers[0]) for layer in outputs.layers]
        return [
            export_path(self.folder.path, name, export_format)
            for export_format in self.settings["exports"]
            for name in (residues if export_format == "h5_residues" else vectors)
        ]

    @property
    def tokenizer(self) -> list[Path]:
        """The tokenizer, if it is an input: proteins need none, and seqmill has one for untrained weights."""
        return [self.model.tokenizer] if self.model.tokenizer and self.model.path else []

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers to read, counted from 0, so that -1 is the same as the last layer's number.

        Layers below 0 stay as set for a user's checkpoint or folder, whose number of layers is not known yet.
        """
        architecture = self.model.architecture
        return self.outputs.of(architecture.num_layers).layers if architecture else self.outputs.layers

    @property
    def length_options(self) -> str:
        """The options of `seqmill index` for long sequences and strands."""
        options = f"--long-sequences {self.policy.long_sequences}"
        if self.policy.max_length:
            options += f" --max-length {self.policy.max_length}"
        if self.policy.window:
            options += f" --window {self.policy.window} --stride {self.policy.stride}"
        return options + (" --strand both" if self.policy.strand == "both" else "")

    @property
    def request(self) -> Request:
        asked = {name: self.settings[name] for name in ("precision", "on_error", "on_invalid", "dtype")}
        reused = tuple(self.reused.values())
        return Request(self.fasta, self.model, self.policy, self.outputs, **asked, reused=reused)

    def known_world_size(self, is_edited: bool) -> int:
        """Return the number of shards that is set, or else that of the run before unless the FASTA was edited; or 0."""
        if self.settings["shards"] != "auto":
            return self.settings["shards"]
        return 0 if is_edited else started_world_size(self.folder.path)

    def split_for_cluster(self, threads: int, is_edited: bool) -> tuple[int, str]:
        """Return a number of shards that take about an hour each as cluster jobs, and a line that says why.

        Args:
            threads: CPU cores of a job; no matter if it has a GPU.
            is_edited: whether the FASTA was edited, so that an index does not count.
        """
        of_fasta = self.fasta, self.model.family, self.policy.copies
        count = (
            resources.estimated_tokens(*of_fasta) if is_edited else resources.tokens_in(self.folder.index, *of_fasta)
        )
        minutes = self._minutes_for(count, threads, attempt=1) - resources.BASE_MINUTES
        shards = min(max(math.ceil(minutes / resources.SHARD_MINUTES), 1), resources.MOST_SHARDS)
        size = f"about {count:,} tokens" if self.fasta.exists() else f"{self.fasta}, which is not made yet,"
        device = "a slow GPU" if self.use_gpu else "slow CPUs"
        return shards, (
            f"{self.folder.path}: shards: auto splits {size} into {shards} {'shard' if shards == 1 else 'shards'}, one "
            f"cluster job each, of at most {math.ceil(minutes / shards)} min on {device}; to set the number: "
            "--config shards=N"
        )

    def choose_reused(self, sources: Sequence[Source], is_edited: bool) -> dict[Path, str]:
        """Return those of `sources` to take vectors from, with their fingerprints; raise a SeqmillError if one differs.

        Without any source they are those of the run before, unless the FASTA was edited: vectors that were reused once
        are not computed when the setting is removed.
        """
        known = known_settings(self.model, self.policy, self.outputs, self.settings["precision"])
        own = [source for source in sources if source.family == self.model.family]
        for source in own:
            require_settings(source, self.model, known, self.settings["dtype"])
        if sources or is_edited:
            return {source.path: source.fingerprint.digest for source in own}
        return reused_by(self.folder.path, known)

    @property
    def index_threads(self) -> int:
        """The CPU cores of build_index: byte pairs are found on several, the letters of proteins on one."""
        return min(self.cores, INDEX_THREADS) if not self.model.family.is_protein else 1

    @property
    def shard_threads(self) -> int:
        """The CPU cores of embed_shard: a few with a GPU; without GPUs the shards take turns with all."""
        return self.gpu_threads if self.use_gpu else self.cores

    @property
    def index_minutes(self) -> int:
        """The time limit of build_index in minutes."""
        return resources.index_minutes(self.fasta, self.policy.copies)

    @property
    def index_memory(self) -> int:
        """The memory that build_index asks for, in MB."""
        return resources.index_mb(self.fasta)

    def shard_memory(self, threads: int, attempt: int) -> int:
        """Return the memory that embed_shard asks for, in MB."""
        family, is_residues = self.model.family, bool(self.outputs.per_residue)
        longest = resources.longest_segment(family, self.policy)
        kept = resources.kept_tokens(family, self.policy, len(self.outputs.layers), is_residues, self.use_gpu)
        return resources.memory_mb(self.model, longest, 0 if self.use_gpu else threads, attempt, kept)

    def shard_minutes(self, world_size: int, threads: int, attempt: int) -> int:
        """Return the time limit of embed_shard in minutes; Snakemake asks again once the index is built."""
        tokens = resources.tokens_in(self.folder.index, self.fasta, self.model.family, self.policy.copies)
        return self._minutes_for(-(-tokens // world_size), threads, attempt)

    def _minutes_for(self, num_tokens: int, threads: int, attempt: int) -> int:
        """Return the time limit of a job that computes so many tokens, in minutes."""
        longest, precision = resources.longest_segment(self.model.family, self.policy), self.settings["precision"]
        return resources.runtime_minutes(self.model, num_tokens, longest, precision, self.use_gpu, threads, attempt)


def export_path(results: Path, name: str, export_format: str) -> Path:
    """Return the main file of an export, or its folder for pt; `name` is a dataset's name in embeddings.h5."""
    ending = {"pt": "_pt", "h5_residues": ".h5"}.get(export_format, f".{export_format}")
    return results / "exports" / f"{name}{ending}"


def export_options(name: str) -> str:
    """Return the options of export.py that choose the output of a name, e.g. embeddings_6_mean."""
    _, *layer_and_pooling = name.split("_", 2)
    return " ".join(map(" ".join, zip(("--layer", "--pooling"), layer_and_pooling, strict=False)))
