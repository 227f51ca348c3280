"""How a result's vectors came about, by what the shards and the reused results say of it."""

from __future__ import annotations

from typing import Any

from seqpack.reused_vectors import ReusedVectors
from seqpack.verify import VerifiedShard


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
