# Configuration, checked, and the functions that the rules take their inputs from.

import json
import os
import re
import shlex
import sys
from pathlib import Path

import yaml
from snakemake.utils import validate

REPOSITORY = Path(workflow.basedir)
SCHEMA = REPOSITORY / "config/schemas/config.schema.yaml"

sys.path.insert(0, str(REPOSITORY / "scripts"))
# Rules call `python`: let it be the interpreter that runs Snakemake, whether or not its environment
# is activated. A rule's conda environment still comes first.
os.environ.update(PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.getenv('PATH', '')}")
# A rule's shell becomes its program: a signal that ends a cluster's job would end the shell first, and
# Snakemake then what runs below it, before a worker has saved its packs.
shell.prefix("set -euo pipefail; exec ")

from seqmill.base import input_files
from seqmill.run.datasets import dataset_of_file, read_datasets, refuse_shared_folders
from seqmill.base.machine import visible_gpus
from seqmill.errors import SeqmillError
from seqmill.spec.lengths import choose_length_policy
from seqmill.spec.models import DNABERT_S, MODELS
from seqmill.run.orphans import cancel_orphans, claim_folder
from seqmill.spec.outputs import Outputs
from seqmill.spec.packing import MAX_PACK_TOKENS
from seqmill.report.colors import require_column
from seqmill.run.reuse import known_settings, require_ready, require_settings, reused_by
from seqmill.store.reuse import open_source
from seqmill.run.rerun import mark_stale
from seqmill.run.resources import (
    index_minutes,
    memory_mb,
    rewriting_minutes,
    runtime_minutes,
    tokens_in,
    tokens_of,
)
from seqmill.run.settings import wrong_settings
from seqmill.run.stale import Request, find_fasta_edit, stale_results
from seqmill.run.stale import started_world_size


def check_config():
    """Set defaults; stop with one line a wrong key. The schema documents every key."""
    for key, value in config.items():
        if (
            isinstance(value, float) and value.is_integer()
        ):  # 1e3, which JSON Schema takes for an integer
            config[key] = int(value)
    if isinstance(config.get("layers"), list):  # on the command line Snakemake leaves them text
        config["layers"] = [
            int(layer) if re.fullmatch(r"-?\d+", str(layer)) else layer
            for layer in config["layers"]
        ]
    if config.get("per_residue") in ("true", "True", "false", "False"):  # likewise
        config["per_residue"] = config["per_residue"].lower() == "true"
    if wrong := wrong_settings(config, yaml.safe_load(SCHEMA.read_text())):
        files = ", ".join(map(str, workflow.configfiles))
        wrong.append(f"settings come from {files} and from --config")
        sys.exit("\n".join(f"seqmill: {line}" for line in wrong))
    validate(config, str(SCHEMA))
    config["per_residue"] = {True: "float16", False: ""}.get(
        config["per_residue"], config["per_residue"]
    )
    for key in ("layers", "pooling", "reuse"):
        if not isinstance(config[key], list):
            config[key] = [config[key]]


def read_all_datasets():
    """The datasets by name and model slug: config's `fasta`, or else the rows of the table."""
    folders = [Path(), REPOSITORY]
    try:
        if config["fasta"]:
            datasets = [dataset_of_file(config["fasta"], config["model"], folders)]
        else:
            table = Path(config["datasets"])
            if not table.exists() and (REPOSITORY / table).exists():
                table = REPOSITORY / table
            datasets = read_datasets(table, config["model"], folders)
        for dataset in datasets:
            for path in (dataset.fasta, dataset.model.path or ""):
                if "{" in str(path) or "}" in str(path):
                    raise SeqmillError(
                        f"{path}: Snakemake takes braces for wildcards; rename the file or link to it"
                    )
            try:
                length_policy(dataset)
                require_outputs(dataset)
                require_metadata(dataset)
            except SeqmillError as error:
                raise SeqmillError(f"dataset {dataset.name}, model {dataset.model.name}: {error}")
        refuse_shared_folders([Path("results", d.name, d.model.slug) for d in datasets])
    except (SeqmillError, OSError) as error:
        sys.exit(f"seqmill: {error}")
    return {(dataset.name, dataset.model.slug): dataset for dataset in datasets}


def length_policy(dataset):
    """What becomes of long sequences, by the settings and by what suits the model."""
    settings = (config[key] for key in ("long_sequences", "max_length", "window", "stride"))
    return choose_length_policy(dataset.model.family, *settings, config["strand"])


def require_outputs(dataset):
    """Raise if the model does not give what the settings name."""
    outputs = Outputs(tuple(config["layers"]), tuple(config["pooling"]), config["per_residue"])
    outputs.require_family(dataset.model.family)
    if "h5_residues" in config["exports"] and not config["per_residue"]:
        raise SeqmillError("exports: h5_residues needs per_residue: float16 or float32")
    if dataset.model.architecture:
        outputs.of(dataset.model.architecture.num_layers)


def require_metadata(dataset):
    """Raise if the report can't be colored as the settings ask: its job would begin by losing the report before."""
    metadata, color = config["metadata"], config["color"]
    if bool(metadata) != bool(color):
        raise SeqmillError(
            "metadata and color go together: a table, and the column of it that colors the map; set both or neither"
        )
    path = metadata.replace("{dataset}", dataset.name).replace("{model}", dataset.model.slug)
    if "{" in path or "}" in path:
        raise SeqmillError(
            f"metadata {metadata}: Snakemake takes braces for wildcards, of which there are {{dataset}} and {{model}}; "
            "rename the file or link to it"
        )
    if path:
        require_column(Path(path), color)


def read_reused():
    """By dataset the files that vectors are reused from, and their fingerprints: those of `reuse` of its family.

    If `reuse` is empty, those that were reused before: what was reused once is not computed when it is taken out.
    """
    reused = {}
    try:
        sources = [open_source(reusable(path)) for path in config["reuse"]]
        for key, dataset in DATASETS.items():
            outputs = Outputs(
                tuple(config["layers"]), tuple(config["pooling"]), config["per_residue"]
            )
            settings = (dataset.model, length_policy(dataset), outputs, config["precision"])
            known = known_settings(*settings)
            own = [source for source in sources if source.family == dataset.model.family]
            for source in own:
                require_settings(source, dataset.model, known, config["dtype"])
            reused[key] = {source.path: source.fingerprint.digest for source in own}
            if not sources and not FASTA_EDITS[key]:
                reused[key] = reused_by(Path("results", *key), known)
        for source in sources:
            if not any(source.path in paths for paths in reused.values()):
                raise SeqmillError(
                    f"{source.path}: can't be reused: it is of {source.attributes['model']}, and no dataset has a "
                    "model of that family; take it out of reuse"
                )
    except (SeqmillError, OSError) as error:
        sys.exit(f"seqmill: {error}")
    return reused


def reusable(name):
    """The path of a file in `reuse`, once it is known to be no result of this run."""
    path = Path(name).expanduser()
    if "{" in name or "}" in name:
        raise SeqmillError(
            f"{name}: Snakemake takes braces for wildcards; rename the file or link to it"
        )
    if not path.exists():
        raise SeqmillError(
            f"{name}: no such file; take it out of reuse: results that are finished do not need it"
        )
    if path.resolve() in [Path(result).resolve() for result in EMBEDDINGS]:
        raise SeqmillError(
            f"{name}: can't be reused: this run would replace it; move its folder, or copy it and its manifest.json, "
            "to where no dataset's results go, and name that file in reuse"
        )
    return path


def world_size_of(name, slug):
    """Shards of a dataset: as configured; if auto, as begun before; else one a GPU."""
    if config["shards"] != "auto":
        return config["shards"]
    started = 0 if FASTA_EDITS[name, slug] else started_world_size(Path("results", name, slug))
    return started or max(len(GPUS), 1)


def shards_in(key):
    folder, world_size = Path("results", *key, "shards"), WORLD_SIZES[key]
    return [f"{folder}/shard_{rank}-of-{world_size}.h5" for rank in range(world_size)]


def find_fasta_edits():
    """By dataset how its FASTA was edited since its results were made; "" if it was not."""
    try:
        return {
            key: find_fasta_edit(Path("results", *key), dataset.fasta, DIGESTS)
            for key, dataset in DATASETS.items()
        }
    except (SeqmillError, OSError) as error:
        sys.exit(f"seqmill: {error}")


def find_stale():
    """What exists and is not what is asked for, by path with the reason.

    Only the process that plans the run judges: a job's own process sees results that are half replaced.
    """
    if not workflow.is_main_process:
        return {}
    stale = {}
    try:
        for key, dataset in DATASETS.items():
            settings = [config[name] for name in ("precision", "on_error", "dtype")]
            outputs = Outputs(
                tuple(config["layers"]), tuple(config["pooling"]), config["per_residue"]
            )
            reused = tuple(REUSED[key].values())
            request = Request(
                dataset.fasta, dataset.model, length_policy(dataset), outputs, *settings, reused
            )
            results = Path("results", *key)
            reasons = stale_results(results, request, map(Path, shards_in(key)), DIGESTS)
            if reasons:
                print(
                    f"seqmill: {results} will be computed again: {next(iter(reasons.values()))}",
                    file=sys.stderr,
                )
            stale |= reasons
        names = ("index.h5", "embeddings.h5", "records.tsv.gz", "manifest.json")
        made = [Path("results", *key, name) for key in DATASETS for name in names]
        mark_stale(Path(MARK), stale, [*made, *map(Path, SHARDS)])
        DIGESTS.save()
    except (SeqmillError, OSError) as error:
        sys.exit(f"seqmill: {error}")
    return stale


def unless_current(file, *outputs):
    """An input that has its outputs made again when it changes, but not while they are what is asked for.

    Snakemake would go by times of modification, and by which jobs run before: `find_stale` knows better.
    """

    def choose(wildcards):
        path, made = file.format(**wildcards), [Path(name.format(**wildcards)) for name in outputs]
        is_current = all(output.exists() and output not in STALE for output in made)
        return ancient(path) if is_current else path

    return choose


def profile_asks_for_gpus():
    """Whether jobs get GPUs that this machine need not have: a cluster's login node."""
    resources = workflow.resource_settings.overwrite_resources.get("embed_shard", {})
    return config["device"] != "cpu" and "gpu" in resources and resources["gpu"] != 0


check_config()
DIGESTS = input_files.KnownDigests(Path(input_files.DIGESTS))
MARK = ".snakemake/seqmill.stale"
INDEX = "results/{dataset}/{model}/index.h5"
SHARD = "results/{dataset}/{model}/shards/shard_{rank}-of-{world_size}.h5"
MERGED = [
    f"results/{{dataset}}/{{model}}/{name}"
    for name in ("embeddings.h5", "records.tsv.gz", "manifest.json")
]
DATASETS = read_all_datasets()
FASTA_EDITS = find_fasta_edits()
GPUS = [] if config["device"] == "cpu" else visible_gpus()
CORES = workflow.resource_settings.cores or 1
USE_GPU = config["device"] == "cuda" or bool(GPUS) or profile_asks_for_gpus()
WORLD_SIZES = {key: world_size_of(*key) for key in DATASETS}
EMBEDDINGS = [f"results/{name}/{slug}/embeddings.h5" for name, slug in DATASETS]
REUSED = read_reused()
SHARDS = [shard for key in DATASETS for shard in shards_in(key)]
STALE = find_stale()
WEIGHTS = sorted(
    {str(path) for d in DATASETS.values() if d.model.kind == "released" for path in d.model.files}
)


wildcard_constraints:
    dataset=r"[^/]+",
    model=r"[^/]+",
    rank=r"\d+",
    world_size=r"\d+",


def dataset_of(wildcards):
    return DATASETS[wildcards.dataset, wildcards.model]


def fasta_of(wildcards):
    return ancient(str(dataset_of(wildcards).fasta))


def model_of(wildcards):
    return dataset_of(wildcards).model.name


def outputs_of(dataset):
    """What is read of a dataset's model, its layers counted from 0 so that -1 and the last one's number are the same.

    Of a model that is a file of the user's, whose layers are not counted yet, a layer below 0 stays so.
    """
    outputs = Outputs(tuple(config["layers"]), tuple(config["pooling"]))
    if dataset.model.architecture:
        outputs = outputs.of(dataset.model.architecture.num_layers)
    return outputs


def layers_of(wildcards):
    return outputs_of(dataset_of(wildcards)).layers


def weights_of(wildcards):
    """The files of the model's weights; none for untrained ones."""
    return [ancient(str(path)) for path in dataset_of(wildcards).model.files]


def tokenizer_of(wildcards):
    """The file of the model's tokenizer; none for proteins, nor for untrained weights, whose tokenizer is ours."""
    model = dataset_of(wildcards).model
    return ancient(str(model.tokenizer)) if model.tokenizer and model.path else []


def reused_of(wildcards):
    """The earlier results that vectors are taken from."""
    return list(map(str, REUSED[wildcards.dataset, wildcards.model]))


def reused_fingerprints_of(wildcards):
    """Their fingerprints, so that the index is built anew where they are others."""
    return list(REUSED[wildcards.dataset, wildcards.model].values())


def require_reused():
    """Stop if a job of this run needs an earlier result that is not as it was, or that another job would replace.

    Before any job runs, as Snakemake removes the results of the merge when it starts one.
    """
    jobs = list(workflow.dag.needrun_jobs())
    replaced = {Path(output).resolve() for job in jobs for output in job.output}
    for key in DATASETS:
        results = Path("results", *key)
        rules = {
            job.rule.name
            for job in jobs
            if (job.wildcards.get("dataset"), job.wildcards.get("model")) == key
        }
        if not rules & {"build_index", "merge_shards"}:
            continue
        try:
            for path in REUSED[key]:
                if path.resolve() in replaced:
                    raise SeqmillError(
                        f"{path}: this run would replace it, and {results} takes vectors from it: run dataset "
                        f"{key[0]} by itself first"
                    )
            is_built = "build_index" not in rules
            require_ready(results / "index.h5", REUSED[key], config["dtype"], is_built)
        except (SeqmillError, OSError) as error:
            sys.exit(f"seqmill: {error}")


def length_policy_of(wildcards):
    """The options of build_index.py that say what becomes of long sequences."""
    dataset = dataset_of(wildcards)
    policy = length_policy(dataset)
    options = f"--long-sequences {policy.long_sequences}"
    if policy.max_length:
        options += f" --max-length {policy.max_length}"
    if policy.window:
        options += f" --window {policy.window} --stride {policy.stride}"
    return options + (" --strand both" if policy.strand == "both" else "")


def shards_of(wildcards):
    shards = shards_in((wildcards.dataset, wildcards.model))
    return [unless_current(shard, *MERGED)(wildcards) for shard in shards]


def statuses_of(wildcards):
    shards = shards_in((wildcards.dataset, wildcards.model))
    names = [shard.removesuffix(".h5") + ".status.json" for shard in shards]
    return [unless_current(name, *MERGED)(wildcards) for name in names]


def unrecorded(value):
    """A param that Snakemake uses but does not record: it records no function of `threads`.

    So that results are not computed again when the repository moves or another device is chosen.
    """
    return lambda wildcards, threads: value


def fasta_to_merge(wildcards, threads):
    """The FASTA as a param that is not recorded: under another name it is no reason to merge again."""
    return str(dataset_of(wildcards).fasta)


def script(name):
    """The path of a program in scripts/, quoted for the shell."""
    return unrecorded(shlex.quote(str(REPOSITORY / "scripts" / name)))


def stop_orphans():
    """Cancel what an earlier run that was killed has left in SLURM, so that no shard is computed twice.

    Returns a file that is to stay open: it tells later runs in this folder that this one is alive.
    """
    try:
        in_use, alone = claim_folder(Path())
        jobs = cancel_orphans(Path()) if alone else []
    except SeqmillError as error:
        sys.exit(f"seqmill: {error}")
    if jobs:
        print(
            f"Cancelled SLURM jobs of an earlier run in this folder: {' '.join(jobs)}",
            file=sys.stderr,
        )
    return in_use


def quarantined_in(results):
    """How many records a merge has left out, by its manifest."""
    try:
        manifest = json.loads(Path(results).with_name("manifest.json").read_text())
        return manifest["counts"]["fates"]["quarantined"]
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def results_message():
    """Where the results are and how to read them, for those that exist."""
    done = [
        (dataset, path)
        for dataset, path in zip(DATASETS.values(), EMBEDDINGS)
        if Path(path).exists()
    ]
    lines = []
    for dataset, path in done:
        lines.append(f"\n{dataset.name}: {path}")
        lines.append(f"    what became of each record: {Path(path).with_name('records.tsv.gz')}")
        lines.append(f"    how it was made:            {Path(path).with_name('manifest.json')}")
        lines.append(f"    at a glance:                {Path(path).with_name('report.html')}")
    if done:
        lines.append("\nIn Python:")
        lines.append(f"    import seqmill; e = seqmill.open_embeddings({str(done[0][1])!r})")
        lines.append("    e.ids, e[0], e[e.ids[0]], e.to_pandas()")
    for dataset, path in done:
        if number := quarantined_in(path):
            lines.append(
                f"\nQUARANTINED: {number} records of {dataset.name} have no finite embedding and were left out; "
                f"{Path(path).with_name('records.tsv.gz')} names them"
            )
    for dataset, _ in done:
        if dataset.model.kind == "untrained":
            trained = "dnabert_s" if dataset.model.family == DNABERT_S else "esm2_t33_650M_UR50D"
            lines.append(
                f"\nUNTRAINED WEIGHTS: the embeddings of {dataset.name} are random projections without any "
                "biological meaning.\nFor real ones give a trained model, e.g. "
                f"snakemake --cores all --config fasta={shlex.quote(str(dataset.fasta))} model={trained}"
            )
    return "\n".join(lines)
