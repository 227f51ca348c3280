"""The downloads of weights that have failed: their logs tell why."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from seqmill.run.findings import Finding, Remedy, shown
from seqmill.run.walk import FoundRun, last_error, results_in
from seqmill.spec.models import NAMES, released_sources
from seqmill.store.layout import fetch_log, status_path_of


def weights_finding(root: Path, model: str) -> Finding | None:
    """Return why a released model's weights were not fetched; None if they are on this disk, or no download failed.

    `root` is the working directory of the workflow.
    """
    log = fetch_log(root, model)
    error = last_error(log) if model in NAMES else ""
    if not error:
        return None
    sources = (replace(source, path=root / (source.path or "")) for source in released_sources(model))
    if any(source.is_on_disk for source in sources):
        return None
    return Finding(f"weights: not fetched{error}\n    see {shown(log)}", Remedy.REPAIR, "fix what the error says")


def missing_weights(run: FoundRun) -> Iterator[Finding]:
    """Yield the finding on the weights of a run, if it has computed nothing since the download failed."""
    finding = weights_finding(run.root, run.path.name)
    if finding:
        failed = fetch_log(run.root, run.path.name).stat().st_mtime_ns
        shards = [path for size in run.world_sizes() for path in run.all_shards(size)]
        if all(run.time_of(status_path_of(path)) < failed for path in shards):
            yield finding


def other_downloads(results: Path, runs: Iterable[FoundRun]) -> Iterator[tuple[Path, str, Finding]]:
    """Yield the downloads that failed before anything of their model's runs was made: root, model, and finding.

    `results` is a folder of all results; a dataset's folder has none.
    """
    results = results_in(results)
    models = {run.path.name for run in runs}
    for model in NAMES if results.name == "results" else ():
        if model not in models and (finding := weights_finding(results.parent, model)):
            yield results.parent, model, finding
