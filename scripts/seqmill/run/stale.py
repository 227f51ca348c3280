"""What results say of themselves, against what is asked for now: which of them are stale, and why. No torch.

Times of modification decide nothing here. An index, a shard or a merged result is up to date if it was made from the
bytes of this FASTA and of these weights by these settings; else it is made again, or, if the input is another file,
the run is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec

from seqmill.base.files import sha256_of_file
from seqmill.base.hdf5 import open_hdf5, read_attributes
from seqmill.base.input_files import Change, InputFile, KnownDigests, find_change, shown_path
from seqmill.errors import SeqmillError
from seqmill.spec.fingerprint import SHARD_FORMAT, Fingerprint
from seqmill.spec.lengths import LengthPolicy
from seqmill.spec.models import ModelSource
from seqmill.spec.outputs import Outputs
from seqmill.store.embeddings import EMBEDDINGS_FORMAT
from seqmill.store.index_format import INDEX_FORMAT
from seqmill.store.layout import SHARD, status_path_of
from seqmill.store.status import COMPLETE, RunFacts, read_status

DAMAGED = (SeqmillError, OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError)


class Refusal(SeqmillError):
    """Results were made from another file than the one that is asked for."""


@dataclass(frozen=True)
class Request:
    """What the settings ask of one dataset.

    Attributes:
        fasta, model: the input.
        policy, outputs: as for the programs; layers below 0 count from the end.
        precision: auto, or that of the matrix products.
        on_error: fail or skip.
        dtype: of embeddings.h5.
        reused: fingerprints of the earlier results to take vectors from, in their order.
    """

    fasta: Path
    model: ModelSource
    policy: LengthPolicy
    outputs: Outputs
    precision: str = "auto"
    on_error: str = "fail"
    dtype: str = "float32"
    reused: tuple[str, ...] = ()


def stale_results(results: Path, request: Request, shards: Iterable[Path], digests: KnownDigests) -> dict[Path, str]:
    """Return which of the files in a folder of results are not what is asked for, and why.

    Args:
        results: the folder of index.h5, shards/ and embeddings.h5; nothing in it need exist.
        request: what is asked for.
        shards: paths of the shards that are asked for.
        digests: of input files that were read before.

    Returns:
        By path the reason in words; of index.h5, the shards and embeddings.h5 those that exist and are stale.

    Raises:
        Refusal: a result was made from another file than the FASTA or the weights that are asked for, and no edit
            explains it; names both.
    """
    index, merged = read_facts(results / "index.h5"), _merged_facts(results)
    judge = _Judge(results, request, digests)
    reasons = {results / "index.h5": judge.index(index)}
    pending = f"{results / 'index.h5'} is made again" if reasons[results / "index.h5"] else ""
    reasons |= {shard: pending or judge.shard(shard, index) for shard in shards if shard.exists()}
    if merged:
        reasons[results / "embeddings.h5"] = pending or judge.merged(merged, index)
    return {path: reason for path, reason in reasons.items() if reason}


def find_fasta_edit(results: Path, fasta: Path, digests: KnownDigests) -> str:
    """Return how a FASTA differs from the one that a folder's index, or else its merged result, was made from.

    Raises:
        Refusal: it is another file; names both.
    """
    facts = read_facts(results / "index.h5") or _merged_facts(results)
    try:
        return _compare_fasta(results, facts, fasta, digests) if facts else ""
    except (KeyError, TypeError, ValueError):  # damaged: its judge will say so
        return ""


def find_changed_inputs(results: Path, root: Path, digests: KnownDigests) -> list[Change]:
    """Return how the FASTA and the weights differ from those that a folder's results were made from, if they exist.

    Args:
        results: the folder.
        root: the working directory of its workflow, from which relative paths count.
        digests: of input files that were read before.
    """
    merged, changes = _merged_facts(results), []
    for facts in (read_facts(results / "index.h5"), merged):
        with suppress(*DAMAGED):  # absent or damaged: its judge will say so
            fasta = InputFile.fasta_of(facts or {})
            changes.append(find_change([fasta], [root / fasta.path], digests.sha256))
    with suppress(*DAMAGED):
        weights = [InputFile.from_json(noted) for noted in (merged or {}).get("weights") or []]
        changes.append(find_change(weights, [root / file.path for file in weights], digests.sha256))
    return list(dict.fromkeys(change for change in changes if change))


def started_world_size(results: Path) -> int:
    """Return the number of shards in which a folder's results were begun; 0 if they were not.

    Shards of another index than the one that is there do not count; a whole set counts before a begun one. So a run
    goes on with the shards it has where another number of GPUs is visible, or none.
    """
    index = (read_facts(results / "index.h5") or {}).get("index_digest")
    made: dict[int, int] = {}
    for shard in (results / "shards").glob("shard_*-of-*.h5"):
        if match := SHARD.fullmatch(shard.name):
            try:
                status = json.loads(status_path_of(shard).read_text(encoding="utf-8"))
                other = index is not None and status["fingerprint"]["index_digest"] != index
            except DAMAGED:  # killed before it knew; or another job removes it at this moment
                other = index is None or not shard.exists()
            if not other:
                size = int(match["world_size"])
                made[size] = made.get(size, 0) + 1
    return max(made, key=lambda size: (made[size] == size, made[size], size), default=0)


def read_facts(path: Path) -> dict[str, Any] | None:
    """Return the attributes of an HDF5 file; None if there is none, `unreadable` with the reason if it is damaged."""
    if not path.exists():
        return None
    try:
        with open_hdf5(path, path.name) as file:
            facts = read_attributes(file)
            if "embeddings" in file:
                facts["dtype"] = str(file["embeddings"].dtype)
            return facts
    except DAMAGED as error:
        return {"unreadable": str(error)}


def _merged_facts(results: Path) -> dict[str, Any] | None:
    """Return the attributes of embeddings.h5 and what manifest.json adds to them."""
    facts = read_facts(results / "embeddings.h5")
    if facts is None or "unreadable" in facts:
        return facts
    path = results / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["fingerprint"]["fingerprint"] != facts["fingerprint"]:
            return {"unreadable": f"{path} is of another result"}
        facts["source_stamp"] = manifest["fasta"].get("stamp", "")
        facts["weights"] = manifest.get("weights")
        facts["reuse"] = json.dumps(manifest["reuse"])
        facts["runs"] = [msgspec.convert(shard["run"], RunFacts) for shard in manifest["shards"]]
    except DAMAGED as error:
        return {"unreadable": f"{path}: {error}"}
    return facts


class _Judge:
    """Compares what results say of themselves with a request; gives a reason, or "" for what is up to date."""

    def __init__(self, results: Path, request: Request, digests: KnownDigests) -> None:
        self.results, self.request, self.digests = results, request, digests

    def index(self, facts: dict[str, Any] | None) -> str:
        return _first(self._index_reasons(facts)) if facts else ""

    def shard(self, path: Path, index: dict[str, Any] | None) -> str:
        return _first(self._shard_reasons(path, index))

    def merged(self, facts: dict[str, Any] | None, index: dict[str, Any] | None) -> str:
        return _first(self._merged_reasons(facts, index)) if facts else ""

    def _index_reasons(self, facts: dict[str, Any]) -> Iterator[str]:
        yield facts.get("unreadable", "")
        yield _difference("index_format", facts.get("index_format"), INDEX_FORMAT)
        yield self._fasta(facts)
        yield from self._policies(facts)
        yield _difference("family", facts["family"], self.request.model.family)
        tokenizer = self.request.model.tokenizer
        if tokenizer and tokenizer.exists() and sha256_of_file(tokenizer) not in facts["tokenizer"]:
            yield f"the tokenizer {tokenizer} is another"
        yield self._reuse(facts)

    def _shard_reasons(self, path: Path, index: dict[str, Any] | None) -> Iterator[str]:
        status = read_status(status_path_of(path))
        if status.status != COMPLETE or status.shard_bytes != path.stat().st_size:
            yield f"{path.name} is not complete"
        made = Fingerprint.from_attributes(status.fingerprint)
        yield _difference("shard_format", made.shard_format, SHARD_FORMAT)
        yield _of_index(made, index)
        yield self._weights(status.weights, made.model)
        yield from self._computation(made, [status.run])
        yield self._quarantined(status.quarantined.num_sequences)

    def _merged_reasons(self, facts: dict[str, Any], index: dict[str, Any] | None) -> Iterator[str]:
        yield facts.get("unreadable", "")
        yield _difference("embeddings_format", facts.get("embeddings_format"), EMBEDDINGS_FORMAT)
        made = Fingerprint.from_attributes(facts)
        yield _of_index(made, index)
        yield self._fasta(facts)
        yield self._weights(facts["weights"], made.model)
        yield from self._policies(facts)
        yield from self._computation(made, facts["runs"])
        yield self._reuse(facts)
        yield self._quarantined(json.loads(facts["fate_counts"])["quarantined"])
        yield _difference("dtype", facts["dtype"], self.request.dtype)

    def _fasta(self, facts: Mapping[str, Any]) -> str:
        return _compare_fasta(self.results, facts, self.request.fasta, self.digests)

    def _weights(self, noted: list[dict[str, Any]] | None, name: str) -> str:
        """Compare the files of the model with those that a result was computed with."""
        model = self.request.model
        if noted is None:  # by an earlier version
            return "" if name == model.name else f"the model was {name} and is {model.name} now"
        files = list(map(InputFile.from_json, noted))
        return _compare(self.results, files, model.files, (name, model.name), self.digests)

    def _policies(self, facts: Mapping[str, Any]) -> Iterator[str]:
        for name, value in asdict(self.request.policy).items():
            yield _difference(name, facts[name], value)

    def _computation(self, made: Fingerprint, runs: list[RunFacts]) -> Iterator[str]:
        outputs, num_layers = self.request.outputs, runs[0].num_layers
        if min(outputs.layers) >= 0 or num_layers is not None:
            layers = outputs.of(num_layers).layers if num_layers is not None else outputs.layers
            yield _difference("layers", made.layers, ",".join(map(str, layers)))
        yield _difference("pooling", made.pooling, ",".join(outputs.poolings))
        yield _difference("per_residue", made.per_residue or "false", outputs.per_residue or "false")
        for run in runs:
            # Another device alone computes nothing again, so auto stays what it was.
            asked = run.precision_asked or "auto"
            if self.request.precision not in (asked, made.precision):
                yield _difference("precision", asked, self.request.precision)

    def _quarantined(self, number: int) -> str:
        if number and self.request.on_error == "fail":
            return f"sequences were quarantined ({number}): on_error was skip and is fail now"
        return ""

    def _reuse(self, facts: Mapping[str, Any]) -> str:
        made = [note["fingerprint"] for note in json.loads(facts["reuse"])]
        return "" if made == list(self.request.reused) else "reuse names other results than before"


def _compare_fasta(results: Path, facts: Mapping[str, Any], fasta: Path, digests: KnownDigests) -> str:
    """Compare a FASTA with the one that the attributes of an index or a merged result tell of."""
    noted = InputFile.fasta_of(facts)
    return _compare(results, [noted], [fasta], (noted.path, shown_path(fasta)), digests)


def _compare(
    results: Path, noted: list[InputFile], paths: list[Path], names: tuple[str, str], digests: KnownDigests
) -> str:
    """Return how an input was edited; raise a SeqmillError if it is another file. `names`: as given before and now."""
    change = find_change(noted, paths, digests.sha256)
    if change and not change.is_edit:
        raise _refusal(results, change, *names)
    return f"the input was {change.before} and is {change.now} now" if change else ""


def _first(reasons: Iterator[str]) -> str:
    try:
        return next(filter(None, reasons), "")
    except Refusal:
        raise
    except DAMAGED as error:
        return str(error) if isinstance(error, SeqmillError) else f"it is damaged, or of an earlier version ({error!r})"


def _of_index(made: Fingerprint, index: dict[str, Any] | None) -> str:
    return "it was made from another index" if index and index.get("index_digest") != made.index_digest else ""


def _difference(name: str, made: object, asked: object) -> str:
    return "" if made == asked else f"{name} was {made} and is {asked} now"


def _refusal(results: Path, change: Change, before: str, now: str) -> Refusal:
    if before == now:
        return Refusal(
            f"{results} holds the results of {change.before}, and in its place is now another file that is not newer: "
            f"{change.now}; name its dataset otherwise in the table of datasets, or move that folder away; if it is an "
            f"edit, `touch` it, and everything is computed again"
        )
    return Refusal(
        f"{results} holds the results of {before}; to embed {now}, name its dataset otherwise in the table of "
        f"datasets, or move that folder away ({change.before} is not {change.now})"
    )
