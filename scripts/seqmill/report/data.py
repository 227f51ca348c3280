"""Collects the report's data from the results; missing sources are skipped."""

import json
import math
import zlib
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from seqmill.base.files import name_errors
from seqmill.errors import SeqmillError
from seqmill.report.colors import column_scale, number_scale
from seqmill.report.map import MAX_SHOWN, draw_maps, shown_rows
from seqmill.report.throughput import read_points, speeds
from seqmill.spec.families import ESM2, family_of_tokenizer
from seqmill.store.embeddings import EmbeddingsFile
from seqmill.store.index import open_index
from seqmill.store.index_format import Fate
from seqmill.store.status import read_status

RECORDS_BLOCK = 65536  # rows
MAX_BINS = 60
LEFT_OUT = ("rejected", "quarantined")
# Of a shard's `run` in the manifest or in its status JSON; see `seqmill.store.status.RunFacts`.
RUN_WORDS = ("device", "precision", "attention", "torch")
RUN_NUMBERS = (
    "threads",
    "num_tokens",
    "num_residues",
    "pack_fill",
    "tokens_per_second",
    "peak_host_bytes",
    "model_flop_utilization",
    "gpu_utilization_mean",
    "gpu_memory_bytes_max",
    "gpu_power_watts_mean",
    "out_of_memory_splits",
    "sequences_on_cpu",
    "recomputed_float32",
)
# Raised when JSON holds unexpected values.
WRONG_JSON = (ValueError, KeyError, TypeError, AttributeError, OverflowError)


@dataclass(frozen=True)
class Sources:
    """The files that a report is made from; only the first is required."""

    embeddings: Path
    records: Path | None = None  # records.tsv.gz of the same result
    manifest: Path | None = None  # manifest.json of the same result
    index: Path | None = None  # index.h5 of the same result
    statuses: list[Path] = field(default_factory=list)  # of the shards, used if there is no manifest
    metadata: Path | None = None  # the user's table
    color: str = ""  # its column that colors the map


def gather(sources: Sources) -> dict[str, Any]:
    """Return all data of the report as JSON types. The report shows the first output.

    Memory holds the lengths (8 bytes per record) and the points shown, but not all embeddings. Raise a SeqmillError if
    a file is missing, damaged, or belongs to another result than the embeddings.
    """
    embeddings = EmbeddingsFile(sources.embeddings)
    attributes = embeddings.attrs
    manifest = _read_manifest(sources.manifest, embeddings) if sources.manifest else {}
    shards = manifest["shards"] if manifest else _read_statuses(sources.statuses, embeddings)
    records = _read_records(sources.records, embeddings, bool(sources.metadata)) if sources.records else {}
    left_out, lengths = records.pop("left_out", set()), records.pop("lengths", embeddings.lengths)
    fates = json.loads(attributes.get("fate_counts", "{}")) or records.get("fates", {})
    unit = "residues" if family_of_tokenizer(str(attributes.get("tokenizer", ESM2.name))).is_protein else "bases"
    rows = shown_rows(len(embeddings), MAX_SHOWN)
    shards = sorted(shards, key=lambda shard: shard["rank"])
    scales = [number_scale(f"Length ({unit})", embeddings.lengths[rows].astype(np.float64), is_log=True)]
    if sources.metadata:
        scales.insert(0, column_scale(sources.metadata, sources.color, embeddings, rows, left_out))
    return {
        "attributes": {name: value for name, value in attributes.items() if value == value},  # JSON has no NaN
        "created": manifest.get("created", ""),
        "fasta": manifest.get("fasta") or attributes.get("source_path", ""),
        "layer": embeddings.layer,
        "pooling": embeddings.pooling,
        "outputs": len(embeddings.outputs),
        "unit": unit,
        "counts": {
            "records": attributes.get("num_records", records.get("records")),
            "sequences": attributes.get("num_sequences"),
            "embeddings": len(embeddings),
            "dimensions": embeddings.array.shape[1],
            "embedded": records.get("embedded"),
            "windows": records.get("windows"),
            "tokens": manifest.get("tokens"),
            "packs": manifest.get("packs"),
        },
        "fates": fates,
        "letters": json.loads(attributes.get("letter_counts", "{}")),
        "lengths": _length_histogram(lengths, bool(sources.records)),
        "shards": [{name: value for name, value in shard.items() if name != "points"} for shard in shards],
        "throughput": speeds(shards),
        "merge_seconds": manifest.get("seconds", {}),
        "versions": manifest.get("versions", {}),
        "packs": _pack_fill(sources.index, embeddings) if sources.index else {},
        "audit": {name.removeprefix("audit_"): attributes[name] for name in attributes if name.startswith("audit_")},
        "points": {**draw_maps(embeddings), "unit": unit, "scales": scales},
    }


def _read_manifest(path: Path, embeddings: EmbeddingsFile) -> dict[str, Any]:
    """Return what the report shows from the manifest, after checking that it belongs to the embeddings."""
    try:
        with name_errors(path):
            manifest = json.loads(path.read_text(encoding="utf-8"))
        found = {
            "created": str(manifest["created"]),
            "fasta": str(manifest["fasta"]["path"]),
            "tokens": int(manifest["counts"]["num_tokens"]),
            "packs": int(manifest["counts"]["num_packs"]),
            "seconds": _numbers(manifest["seconds"]),
            "versions": {str(name): str(version) for name, version in manifest["versions"].items()},
            "shards": [_shard(shard) for shard in manifest["shards"]],
        }
        fingerprint = manifest["fingerprint"]["fingerprint"]
    except FileNotFoundError:
        raise SeqmillError(f"{path}: no such manifest") from None
    except (*WRONG_JSON, RecursionError) as error:
        raise SeqmillError(f"{path}: not a seqmill manifest, or damaged: {error}; merge the shards again") from error
    if fingerprint != embeddings.attrs.get("fingerprint"):
        raise SeqmillError(f"{path}: belongs to another result than {embeddings.path}; name its own manifest")
    return found


def _read_statuses(paths: list[Path], embeddings: EmbeddingsFile) -> list[dict[str, Any]]:
    shards = []
    for path in paths:
        status = read_status(path)
        try:
            shards.append(_shard(msgspec.to_builtins(status)))
        except WRONG_JSON as error:
            raise SeqmillError(f"{path}: not a seqmill status JSON, or damaged: {error}") from error
        if status.fingerprint.get("fingerprint") != embeddings.attrs.get("fingerprint"):
            raise SeqmillError(
                f"{path}: belongs to another result than {embeddings.path}; name its shards' status JSONs"
            )
    return shards


def _shard(shard: dict[str, Any]) -> dict[str, Any]:
    """Return a shard's data from a manifest or a status JSON; missing values are None."""
    run = shard["run"]
    return {
        **_numbers({name: shard.get(name) for name in ("rank", "num_sequences", "attempt", "resumed_packs")}),
        **_numbers({name: run.get(name) for name in RUN_NUMBERS}),
        **{name: str(run[name]) if name in run else None for name in RUN_WORDS},
        **{name: _time(shard.get(name)) for name in ("started", "ended")},
        "seconds": _numbers(shard["seconds"]),
        "points": read_points(run.get("throughput")),
        "audit": dict(shard["audit"]),
    }


def _numbers(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values; raise a TypeError if one is neither a finite number nor None."""
    for name, value in values.items():
        if value is not None and not (type(value) in (int, float) and math.isfinite(value)):
            raise TypeError(f"{name} is no number")
    return dict(values)


def _time(text: str | None) -> float | None:
    """Return an ISO 8601 time in seconds since 1970; None if there is none."""
    return datetime.fromisoformat(text).timestamp() if text else None


def _read_records(path: Path, embeddings: EmbeddingsFile, with_left_out: bool) -> dict[str, Any]:
    """Return what the report shows from the table of fates, after checking that it belongs to the embeddings."""
    import pandas

    lengths, fates = [np.empty(0, np.int32)], {fate.name.lower(): 0 for fate in Fate}
    left_out: set[str] = set()
    embedded = windows = 0
    columns: dict[str, Any] = {
        "id": str,
        "length": "int32",
        "embedded_length": "int64",
        "windows": "int64",
        "fate": str,
    }
    try:
        with pandas.read_csv(
            path, sep="\t", usecols=list(columns), dtype=columns, keep_default_na=False, chunksize=RECORDS_BLOCK
        ) as blocks:
            for block in blocks:
                lengths.append(block["length"][block["length"] > 0].to_numpy())  # it is 0 if the record is invalid
                computed = block[~block["fate"].isin(("duplicate", "reused", *LEFT_OUT))]
                embedded += int(computed["embedded_length"].sum())
                windows += int(computed["windows"].sum())
                for fate, number in block["fate"].value_counts().items():
                    fates[str(fate)] += number
                if with_left_out:
                    left_out.update(block["id"][block["fate"].isin(LEFT_OUT)])
    except FileNotFoundError:
        raise SeqmillError(f"{path}: no such table of records") from None
    except (OSError, EOFError, zlib.error, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise SeqmillError(f"{path}: not a table of records, or damaged: {reason}; merge the shards again") from error
    records = sum(fates.values())
    expected = json.loads(embeddings.attrs.get("fate_counts", "{}"))
    if records - sum(fates[fate] for fate in LEFT_OUT) != len(embeddings) or (expected and expected != fates):
        raise SeqmillError(f"{path}: its records are not those of {embeddings.path}; name the table of that result")
    counts = {"records": records, "fates": fates, "embedded": embedded, "windows": windows}
    return {"lengths": np.concatenate(lengths), "left_out": left_out, **counts}


def _length_histogram(lengths: np.ndarray, of_all: bool) -> dict[str, Any]:
    """Return the distribution of lengths: bin k holds lengths from edges[k] to edges[k + 1] - 1.

    Edges are integers, evenly spaced on a logarithmic scale, or on a linear one if the lengths differ little.
    """
    if not len(lengths):
        return {}
    low, high = int(lengths.min()), int(lengths.max())
    is_log = high >= 5 * low
    bins = int(min(MAX_BINS, 2 * np.sqrt(len(lengths)) + 1))
    spaced = (np.geomspace if is_log else np.linspace)(low, high + 1, bins + 1)
    edges = np.unique(np.round(spaced).astype(np.int64))
    return {
        "of": "records" if of_all else "embeddings",
        "min": low,
        "median": float(np.median(lengths)),
        "mean": float(lengths.mean(dtype=np.float64)),
        "max": high,
        "log": is_log,
        "edges": edges.tolist(),
        "counts": np.histogram(lengths, edges)[0].tolist(),
    }


def _pack_fill(path: Path, embeddings: EmbeddingsFile) -> dict[str, Any]:
    """Return how full the packs are: tokens divided by pack_tokens, or 1 for a pack of one longer sequence."""
    index = open_index(path)
    if index.digest != embeddings.attrs.get("index_digest"):
        raise SeqmillError(f"{path}: not the index of {embeddings.path}; name that one, or none")
    tokens = np.diff(index.token_offsets[index.pack_offsets])
    capacity = np.maximum(tokens, index.attributes["pack_tokens"])
    edges = np.linspace(0, 1, 41)
    return {
        "number": len(tokens),
        "pack_tokens": int(index.attributes["pack_tokens"]),
        "fill": float(tokens.sum() / capacity.sum()) if len(tokens) else 0.0,
        "edges": edges.tolist(),
        "counts": np.histogram(tokens / capacity, edges)[0].tolist(),
    }
