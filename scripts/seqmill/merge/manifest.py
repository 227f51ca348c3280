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
        "model": _credits_of(verified.fingerprint.model),
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


def _credits_of(model: str) -> dict[str, Any]:
    """Return a model's name, and for a released one its license and the publication to cite."""
    release = read_releases().get(model)
    if release is None:
        return {"name": model}
    citation = release.citation.text if release.citation else None
    return {"name": model, "license": msgspec.to_builtins(release.license), "citation": citation}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
