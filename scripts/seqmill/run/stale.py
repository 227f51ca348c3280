"""Which results are stale, and why: their metadata compared with the input and the settings of this run.

Modification times decide nothing here. An index, a shard or a merged result is up to date if it was made from the
bytes of this FASTA and of these weights with these settings. Otherwise it is made again; if the input is another file,
the run is refused.
"""

import json
from collections import Counter
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
from seqmill.store.layout import SHARD, RunFolder, status_path_of
from seqmill.store.status import COMPLETE, RunFacts, read_status

DAMAGED = (SeqmillError, OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError)


class Refusal(SeqmillError):
    """Results were made from another file than the input of this run."""


@dataclass(frozen=True)
class Request:
    """What the settings ask for one dataset."""

    fasta: Path
    model: ModelSource
    policy: LengthPolicy
    outputs: Outputs  # layers below 0 count from the end
    precision: str = "auto"
    on_error: str = "fail"  # or skip
    on_invalid: str = "fail"  # or skip
    dtype: str = "float32"  # of embeddings.h5
    reused: tuple[str, ...] = ()  # fingerprints of the earlier results to take vectors from, in their order


def stale_results(results: Path, request: Request, shards: Iterable[Path], digests: KnownDigests) -> dict[Path, str]:
    """Return the stale files of a results folder: the index, `shards` and embeddings.h5, each with the reason.

    Nothing in the folder need exist. `digests` are those of input files that were read before. Raise a Refusal, which
    names both, if a result was made from another FASTA or other weights, which no edit explains.
    """
    folder = RunFolder(results)
    index, merged = read_facts(folder.index), _merged_facts(folder)
    judge, reasons = _Judge(results, request, digests), dict[Path, str]()
    if index:
        reasons[folder.index] = _first(judge.index(index))
    pending = f"{folder.index} is made again" if reasons.get(folder.index) else ""
    for shard in filter(Path.exists, shards):
        reasons[shard] = pending or _first(judge.shard(shard, index))
    if merged:
        reasons[folder.embeddings] = pending or _first(judge.merged(merged, index))
    return {path: reason for path, reason in reasons.items() if reason}


def find_fasta_edit(results: Path, fasta: Path, digests: KnownDigests) -> str:
    """Return how a FASTA was edited since a folder's index, or else its merged result, was made; else "".

    Raise a Refusal, which names both, if it is another file.
    """
    facts = read_facts(RunFolder(results).index) or _merged_facts(RunFolder(results))
    try:
        return _compare_fasta(results, facts, fasta, digests) if facts else ""
    except (KeyError, TypeError, ValueError):  # damaged, as `stale_results` reports
        return ""


def find_changed_inputs(results: Path, root: Path, digests: KnownDigests) -> list[Change]:
    """Return how the FASTA and the weights differ from the ones that a folder's results, if any, were made from.

    Relative paths start at `root`, the working directory of the workflow.
    """
    merged, changes = _merged_facts(RunFolder(results)), []
    for facts in (read_facts(RunFolder(results).index), merged):
        with suppress(*DAMAGED):  # absent, or damaged, as `stale_results` reports
            fasta = InputFile.fasta_of(facts or {})
            changes.append(find_change([fasta], [root / fasta.path], digests.sha256))
    with suppress(*DAMAGED):
        weights = [msgspec.convert(noted, InputFile) for noted in (merged or {}).get("weights") or []]
        changes.append(find_change(weights, [root / file.path for file in weights], digests.sha256))
    return list(dict.fromkeys(change for change in changes if change))


def started_world_size(results: Path) -> int:
    """Return the number of shards that a folder's results were begun with; 0 if they were not begun.

    So a run uses the shards it has, whatever the number of visible GPUs. Shards of another index do not count; a
    complete set is preferred to a partial one.
    """
    index = (read_facts(RunFolder(results).index) or {}).get("index_digest")
    made = Counter[int]()
    for shard in RunFolder(results).shards.glob("shard_*-of-*.h5"):
        if match := SHARD.fullmatch(shard.name):
            try:
                status = json.loads(status_path_of(shard).read_text(encoding="utf-8"))
                is_other = index is not None and status["fingerprint"]["index_digest"] != index
            except DAMAGED:  # killed before it knew the index; or another job removes the shard just now
                is_other = index is None or not shard.exists()
            made[int(match["world_size"])] += not is_other
    return max(+made, key=lambda size: (made[size] == size, made[size], size), default=0)


def read_facts(path: Path) -> dict[str, Any] | None:
    """Return the attributes of an HDF5 file; None if there is none, `unreadable` with the reason if damaged."""
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


def _merged_facts(folder: RunFolder) -> dict[str, Any] | None:
    """Return the attributes of embeddings.h5 with those that manifest.json adds; see `read_facts`."""
    facts, path = read_facts(folder.embeddings), folder.manifest
    if facts is None or "unreadable" in facts:
        return facts
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["fingerprint"]["fingerprint"] != facts["fingerprint"]:
            return {"unreadable": f"{path} belongs to another result"}
        facts["source_stamp"] = manifest["fasta"].get("stamp", "")
        facts["weights"] = manifest.get("weights")
        facts["reuse"] = json.dumps(manifest["reuse"])
        facts["runs"] = [msgspec.convert(shard["run"], RunFacts) for shard in manifest["shards"]]
    except DAMAGED as error:
        return {"unreadable": f"{path}: {error}"}
    return facts


@dataclass(frozen=True)
class _Judge:
    """Compares the metadata of results with a request. It yields reasons; "" stands for no difference."""

    results: Path
    request: Request
    digests: KnownDigests

    def index(self, facts: dict[str, Any]) -> Iterator[str]:
        yield facts.get("unreadable", "")
        yield _difference("index_format", facts.get("index_format"), INDEX_FORMAT)
        yield _compare_fasta(self.results, facts, self.request.fasta, self.digests)
        yield from self._policies(facts)
        yield self._invalid(facts)
        yield _difference("family", facts["family"], self.request.model.family.name)
        tokenizer = self.request.model.tokenizer
        if tokenizer and tokenizer.exists() and sha256_of_file(tokenizer) not in facts["tokenizer"]:
            yield f"the tokenizer {tokenizer} has changed"
        yield self._reuse(facts)

    def shard(self, path: Path, index: dict[str, Any] | None) -> Iterator[str]:
        status = read_status(status_path_of(path))
        if status.status != COMPLETE or status.shard_bytes != path.stat().st_size:
            yield f"{path.name} is not complete"
        made = Fingerprint.from_attributes(status.fingerprint)
        yield _difference("shard_format", made.shard_format, SHARD_FORMAT)
        yield _of_index(made, index)
        yield self._weights(status.weights, made.model)
        yield from self._computation(made, [status.run])
        yield self._quarantined(status.quarantined.num_sequences)

    def merged(self, facts: dict[str, Any], index: dict[str, Any] | None) -> Iterator[str]:
        yield facts.get("unreadable", "")
        yield _difference("embeddings_format", facts.get("embeddings_format"), EMBEDDINGS_FORMAT)
        made = Fingerprint.from_attributes(facts)
        yield _of_index(made, index)
        yield _compare_fasta(self.results, facts, self.request.fasta, self.digests)
        yield self._weights(facts["weights"], made.model)
        yield from self._policies(facts)
        yield self._invalid(facts)
        yield from self._computation(made, facts["runs"])
        yield self._reuse(facts)
        yield self._quarantined(json.loads(facts["fate_counts"])["quarantined"])
        yield _difference("dtype", facts["dtype"], self.request.dtype)

    def _weights(self, noted: list[dict[str, Any]] | None, name: str) -> str:
        """Compare the files of the model with the ones that a result was computed with."""
        model = self.request.model
        if noted is None:  # from an earlier version
            return "" if name == model.name else f"the model was {name} and is {model.name} now"
        files = msgspec.convert(noted, list[InputFile])
        return _compare(self.results, files, model.files, (name, model.name), self.digests)

    def _policies(self, facts: Mapping[str, Any]) -> Iterator[str]:
        for name, value in asdict(self.request.policy).items():
            yield _difference(name, facts[name], value)

    def _invalid(self, facts: Mapping[str, Any]) -> str:
        number = facts.get("num_invalid", 0)  # older results have none
        if number and self.request.on_invalid == "fail":
            return f"invalid records were left out ({number}): on_invalid was skip and is fail now"
        return ""

    def _computation(self, made: Fingerprint, runs: list[RunFacts]) -> Iterator[str]:
        outputs, num_layers = self.request.outputs, runs[0].num_layers
        if min(outputs.layers) >= 0 or num_layers is not None:
            layers = outputs.of(num_layers).layers if num_layers is not None else outputs.layers
            yield _difference("layers", made.layers, ",".join(map(str, layers)))
        yield _difference("pooling", made.pooling, ",".join(outputs.poolings))
        yield _difference("per_residue", made.per_residue or "false", outputs.per_residue or "false")
        for run in runs:
            # auto keeps the precision of the results: another device is no reason to compute again.
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
    """Compare a FASTA with the one that an index or a merged result was made from."""
    noted = InputFile.fasta_of(facts)
    if not fasta.exists() and noted.path != shown_path(fasta):  # another rule may make it, but not from these results
        raise Refusal(
            f"{results} holds the results of {noted.path}, and {fasta} does not exist (yet): correct the path, rename "
            "its dataset, or move that folder away"
        )
    return _compare(results, [noted], [fasta], (noted.path, shown_path(fasta)), digests)


def _compare(
    results: Path, noted: list[InputFile], paths: list[Path], names: tuple[str, str], digests: KnownDigests
) -> str:
    """Return how an input was edited; raise a Refusal if it is another file. `names` are those before and now."""
    change = find_change(noted, paths, digests.sha256)
    if change is None:
        return ""
    if change.is_edit:
        return f"the input was {change.before} and is {change.now} now"
    before, now = names
    if before == now:
        raise Refusal(
            f"{results} holds the results of {change.before}, and in its place is now another file that is not newer: "
            f"{change.now}; rename its dataset in the table of datasets, or move that folder away; if it is an edit, "
            f"`touch` it, and everything is computed again"
        )
    raise Refusal(
        f"{results} holds the results of {before}; to embed {now}, rename its dataset in the table of datasets, or "
        f"move that folder away ({change.before} is not {change.now})"
    )


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
