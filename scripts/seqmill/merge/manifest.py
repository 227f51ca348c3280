"""manifest.json: the results, their inputs, and the software that made them."""

import json
import platform
from dataclasses import asdict
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import msgspec

from seqmill.base.input_files import InputFile
from seqmill.merge.verify import VerifiedSet
from seqmill.spec.released import read_releases
from seqmill.version import __version__

COUNTS = ("num_records", "num_sequences", "num_reused", "num_tokens", "num_packs")
PACKAGES = ("torch", "numpy", "h5py", "snakemake", "safetensors")
TERMS = ("license", "citation")
STATUS_FIELDS = ("num_sequences", "attempt", "started", "ended", "resumed_packs", "audit", "run", "seconds")


def manifest_of(verified: VerifiedSet) -> dict[str, Any]:
    """Return the manifest without the digests of the results and the merge's own time."""
    attributes = verified.index.attributes
    return {
        "seqmill_version": __version__,
        "created": datetime.now().astimezone().isoformat(timespec="seconds"),
        "warning": verified.warning,
        "fasta": asdict(InputFile.fasta_of(attributes)),
        "weights": verified.statuses[0].weights,
        **license_and_citation(verified.fingerprint.model),
        "fingerprint": verified.fingerprint.attributes(),
        "counts": {
            **{name: attributes[name] for name in COUNTS},
            "num_invalid": verified.index.num_invalid,
            "fates": verified.fate_counts,
            "letters": json.loads(attributes["letter_counts"]),
        },
        "audit": verified.audit,
        "reuse": verified.reused.summary(),
        "shards": [
            {
                "rank": status.rank,
                "path": str(shard.path),
                "sha256": status.shard_sha256,
                **{name: msgspec.to_builtins(getattr(status, name)) for name in STATUS_FIELDS},
            }
            for shard, status in zip(verified.shards, verified.statuses, strict=True)
        ],
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
    }


def license_and_citation(model: str) -> dict[str, Any]:
    """Return both for a released model, by its name; nothing for other weights, whose origin is unknown."""
    release = read_releases().get(model)
    return {name: msgspec.to_builtins(getattr(release, name)) for name in TERMS} if release else {}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
