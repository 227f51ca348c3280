"""What `seqmill plan` prints: the forecast of a run. Imports torch only after the settings are checked."""

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from seqmill.base.imports import importing_much
from seqmill.base.signals import Signals
from seqmill.base.words import time_in_words
from seqmill.embedding.lease import leased_gpu
from seqmill.errors import SeqmillError
from seqmill.index.build import build_index
from seqmill.run import forecast
from seqmill.run.reuse_checks import known_settings, require_settings
from seqmill.spec.lengths import LengthPolicy
from seqmill.spec.models import ModelSource, find_model
from seqmill.spec.task import ComputeSettings
from seqmill.store.index import Index, open_index
from seqmill.store.reuse import open_source


@dataclass(frozen=True)
class PlanOptions:
    """What to forecast for an input."""

    settings: ComputeSettings
    world_size: int  # number of shards
    dtype: str  # of the merged embeddings, float32 or float16
    seconds: float  # of calibration; 0 for none, and no forecast of the time
    on_invalid: str = "fail"  # or skip, for an index that is built


def plan_index(path: Path, model: str, options: PlanOptions) -> list[str]:
    """Return the forecast of a run with an existing index, in lines; without a model's name, that of the index.

    Raise a SeqmillError if the run would be refused, as far as is known before it starts.
    """
    index = open_index(path)
    with importing_much():
        from seqmill.embedding.job import model_of  # imports torch

    source = model_of(index, model)
    policy = LengthPolicy(**{name: index.attributes[name] for name in LengthPolicy.__dataclass_fields__})
    _require_possible(options, source, policy, [Path(note["path"]) for note in index.reuse])
    return _forecast(options, index, source, str(path), path.absolute().parent)


def plan_fasta(
    fasta: Path, model: str, policy: LengthPolicy, reuse: list[Path], results: Path | None, options: PlanOptions
) -> list[str]:
    """As `plan_index`, with an index in a temporary folder: in `results`, whose disk is judged, or in TMPDIR."""
    source = find_model(model)
    _require_possible(options, source, policy, reuse)
    with tempfile.TemporaryDirectory(prefix="seqmill-plan-", dir=results) as folder:
        _exit_on_signals(Path(folder))
        path = Path(folder) / "index.h5"
        if options.settings.threads:
            os.environ["RAYON_NUM_THREADS"] = str(options.settings.threads)  # of the tokenizers library
        began = time.perf_counter()
        build_index(fasta, path, model, policy, reuse, options.on_invalid)
        took = time_in_words(time.perf_counter() - began)
        origin = f"built in {took} for this plan alone; a run that has none yet builds its own"
        return _forecast(options, open_index(path), source, origin, (results or Path()).absolute())


def _exit_on_signals(folder: Path) -> None:
    """Let a signal that ends the program remove a folder and exit at once.

    An exception would wait for threads that compute a pack, and can be lost while torch is imported.
    """

    def stop(number: int, frame: object) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(128 + number)

    for number in Signals.NUMBERS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, stop)


def _require_possible(options: PlanOptions, source: ModelSource, policy: LengthPolicy, reused: Iterable[Path]) -> None:
    outputs = options.settings.outputs
    outputs.require_family(source.family)
    source.family.require_precision(options.settings.precision)
    known = known_settings(source, policy, outputs, options.settings.precision)
    for path in reused:
        if not path.exists():
            raise SeqmillError(
                f"{path}: no such file, and its vectors are to be reused; bring it back, or take it out of reuse"
            )
        require_settings(open_source(path), source, known, options.dtype)


def _forecast(options: PlanOptions, index: Index, source: ModelSource, origin: str, folder: Path) -> list[str]:
    """Forecast a run, in lines; `origin` is where its index comes from, `folder` is on the disk of its results."""
    settings, world_size = options.settings, options.world_size
    needs_gpu = options.seconds and settings.device != "cpu"
    with leased_gpu() if needs_gpu else nullcontext():  # as a worker does: a shared GPU would be slower
        from seqmill.model.weights import open_weights
        from seqmill.run.calibration import calibrate, describe_calibration

        architecture = source.architecture or open_weights(source)[0]
        outputs = settings.outputs.of(architecture.num_layers)
        shares = forecast.share_work(index, world_size, architecture)
        lines = [*forecast.describe_index(index, source.name, origin), *forecast.describe_shares(shares)]
        if options.seconds and index.num_computed:
            lines += describe_calibration(calibrate(index, source, settings, options.seconds), shares)
        disk = forecast.disk_needed(index, world_size, architecture.hidden_dim, outputs, options.dtype)
        return lines + forecast.describe_disk(disk, folder)
