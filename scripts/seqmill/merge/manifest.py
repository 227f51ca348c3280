"""manifest.json: what was made, from what, by what."""

from __future__ import annotations

import json
import platform
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import msgspec

from seqmill.merge.reused import ReusedVectors
from seqmill.store.index import Index
from seqmill.store.shard_checks import VerifiedShard
from seqmill.version import __version__

COUNTS = ("num_records", "num_sequences", "num_reused", "num_tokens", "num_packs")
PACKAGES = ("torch", "numpy", "h5py", "snakemake", "safetensors")


def manifest_of(
    index: Index, shards: list[VerifiedShard], reused: ReusedVectors, fate_counts: dict[str, int]
) -> dict[str, Any]:
    """Return the manifest but for the digests of the results and the merge's own time."""
    attributes = index.attributes
    status = shards[0].status
    return {
        "seqmill_version": __version__,
        "created": datetime.now().astimezone().isoformat(timespec="seconds"),
        "warning": status.warning,
        "fasta": {
            "path": attributes["source_path"],
            "bytes": attributes["source_size"],
            "sha256": attributes["source_sha256"],
            "stamp": attributes.get("source_stamp", ""),
        },
        "weights": status.weights,
        "fingerprint": shards[0].shard.fingerprint.attributes(),
        "counts": {
            **{name: attributes[name] for name in COUNTS},
            "fates": fate_counts,
            "letters": json.loads(attributes["letter_counts"]),
        },
        "audit": worst_audit(shards, reused),
        "reuse": reused.summary(),
        "shards": [
            {
                "rank": verified.status.rank,
                "path": str(verified.shard.path),
                "sha256": verified.status.shard_sha256,
                "num_sequences": verified.status.num_sequences,
                "attempt": verified.status.attempt,
                "started": verified.status.started,
                "ended": verified.status.ended,
                "resumed_packs": verified.status.resumed_packs,
                "audit": msgspec.to_builtins(verified.status.audit),
                "run": msgspec.to_builtins(verified.status.run),
                "seconds": verified.status.seconds,
            }
            for verified in shards
        ],
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def computed_by(shards: list[VerifiedShard], reused: ReusedVectors) -> list[str]:
    """Return the kinds of device and kernels that computed them, sorted."""
    return sorted(reused.computed_by.union(*(verified.shard.computed_by for verified in shards)))


def worst_audit(shards: list[VerifiedShard], reused: ReusedVectors) -> dict[str, Any]:
    """Return what the audits of the shards and of reused results found, as attributes: of the errors the worst."""
    found = [verified.shard.audit for verified in shards if verified.status.num_sequences]
    found += [source.attributes for source in reused.used]
    audits = [audit for audit in found if audit["audit_sequences"]]
    references = sorted({text for audit in found for text in audit["audit_reference"].split("; ")})
    result: dict[str, Any] = {
        "audit_sequences": sum(audit["audit_sequences"] for audit in audits),
        "audit_reference": "; ".join(references),
    }
    if audits:
        result["audit_worst_cosine"] = min(audit["audit_worst_cosine"] for audit in audits)
        result["audit_worst_relative_error"] = max(audit["audit_worst_relative_error"] for audit in audits)
    return result
