"""A worker's job: its part of the index, the device, and the model, loaded and ready."""

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from seqmill.base.files import refuse_shared, sha256_of_file
from seqmill.base.input_files import note_file, require_unchanged
from seqmill.embedding import device as devices
from seqmill.embedding.embedder import PackEmbedder
from seqmill.embedding.readout import Readout
from seqmill.errors import SeqmillError
from seqmill.model.encoder import Encoder, make_encoder
from seqmill.model.out_of_memory import is_out_of_memory
from seqmill.model.weights import Weights, load_weights
from seqmill.spec.fingerprint import Fingerprint
from seqmill.spec.models import ModelSource, find_model
from seqmill.spec.outputs import Outputs
from seqmill.spec.packing import packs_of_rank, rows_of_rank
from seqmill.spec.task import AUTO, ShardTask
from seqmill.store.index import Index, embedded_lengths, open_index
from seqmill.store.layout import parts_folder
from seqmill.store.parts import PartStore
from seqmill.store.reuse import require_computation
from seqmill.store.status import RunFacts, ShardStatus, stage, write_status

UNTRAINED_WARNING = "UNTRAINED WEIGHTS: these embeddings are random projections and have no biological meaning"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """What a worker knows once the model is loaded."""

    task: ShardTask
    status: ShardStatus  # the figures so far
    index: Index
    rows: np.ndarray  # int64, the index rows of the rank's sequences
    source: ModelSource
    weights: Weights  # without the tensors, which are in the model alone
    outputs: Outputs  # with layers from 0 on
    device: torch.device
    precision: str  # of the matrix products; not auto

    @property
    def packs(self) -> range:
        """The numbers of the rank's packs."""
        return packs_of_rank(self.index.num_packs, self.task.rank, self.task.world_size)

    @property
    def fingerprint(self) -> Fingerprint:
        return Fingerprint(
            index_digest=self.index.digest,
            model=self.source.name,
            model_digest=self.weights.digest,
            layers=",".join(map(str, self.outputs.layers)),
            pooling=",".join(self.outputs.poolings),
            precision=self.precision,
            per_residue=self.outputs.per_residue,
        )

    @property
    def store(self) -> PartStore:
        return PartStore(parts_folder(self.task.shard), self.index, self.fingerprint)

    @property
    def width(self) -> int:
        """Numbers in an embedding, all outputs together."""
        return len(self.outputs.pairs) * self.weights.architecture.hidden_dim

    @property
    def residue_dim(self) -> int:
        """Numbers in the vector of a residue, all layers together; 0 if they are not kept."""
        return len(self.outputs.layers) * self.weights.architecture.hidden_dim if self.outputs.per_residue else 0

    def make_model(self, device: torch.device, dtype: torch.dtype) -> Encoder:
        """Load the weights again, for another device or dtype."""
        return make_encoder(load_weights(self.source), dtype, self.index.max_tokens, device, AUTO)


def load_job(task: ShardTask, status: ShardStatus) -> tuple[Job, PackEmbedder]:
    """Open the index, choose the device and load the model; note both in the status.

    Raise a SeqmillError if the task can't be done with this index, device, model or memory.
    """
    if not 0 <= task.rank < task.world_size:
        raise SeqmillError(f"rank must be 0 to world size - 1; got rank {task.rank} of world size {task.world_size}")
    refuse_shared([task.shard], [task.index])
    index, settings = open_index(task.index), task.settings
    index.family.require_precision(settings.precision)
    settings.outputs.require_family(index.family)
    device = devices.choose_device(settings.device)
    precision = devices.choose_precision(settings.precision, device)
    threads = settings.threads or torch.get_num_threads()
    rows = rows_of_rank(index.pack_offsets, task.rank, task.world_size)
    status.num_sequences = len(rows)
    status.num_packs = len(packs_of_rank(index.num_packs, task.rank, task.world_size))
    described = devices.describe_device(device)
    status.run = RunFacts(
        device=described["device"],
        device_uuid=described["device_uuid"],
        precision=precision,
        precision_asked=settings.precision,
        threads=threads,
        torch=str(torch.__version__),
        **_describe_packs(index, task, rows),
    )
    num_tokens = status.run.num_tokens
    log.info("rank %d of %d: %d sequences, %d tokens", task.rank, task.world_size, len(rows), num_tokens)
    log.info("device %s (%s), precision %s", device, status.run.device, precision)

    with stage(status, "load"):
        source = model_of(index, task.model)
        weights = _load_noted(source, status)
        outputs = settings.outputs.of(weights.architecture.num_layers)
        readout = Readout(source.family, outputs)
        with memory_explained(f"{source.name} in {precision}", device):
            model = make_encoder(weights, devices.dtype_of(precision), index.max_tokens, device, settings.attention)
        for file, noted in zip(source.files, status.weights or [], strict=True):
            require_unchanged(file, noted["stamp"])
        weights.tensors.clear()  # or a reduced-precision run would hold them twice
    status.run.num_layers = weights.architecture.num_layers
    status.run.attention = model.attention
    status.run.elementwise = model.elementwise
    log.info("%s, attention %s, elementwise %s", source.name, model.attention, status.run.elementwise)
    if not weights.trained:
        status.warning = UNTRAINED_WARNING
        log.warning(UNTRAINED_WARNING)
    job = Job(task, status, index, rows, source, weights, outputs, device, precision)
    require_computation(index, job.fingerprint)
    status.fingerprint = job.fingerprint.attributes()
    write_status(task.status, status)
    return job, PackEmbedder(model, readout, lambda: job.make_model(torch.device("cpu"), devices.dtype_of(precision)))


def _describe_packs(index: Index, task: ShardTask, rows: np.ndarray) -> dict[str, Any]:
    num_tokens = int((index.token_offsets[rows + 1] - index.token_offsets[rows]).sum())
    pack_sizes = np.diff(index.token_offsets[index.pack_offsets])[task.rank :: task.world_size]
    # A sequence longer than pack_tokens fills a pack of its own.
    capacity = int(np.maximum(pack_sizes, index.attributes["pack_tokens"]).sum())
    return {
        "num_tokens": num_tokens,
        "num_residues": int(embedded_lengths(index, index.sequence_records[rows]).sum()),
        "pack_fill": round(num_tokens / capacity, 4) if capacity else 0.0,
    }


def model_of(index: Index, name: str) -> ModelSource:
    """Return the model of that name (empty for the one the index was built for).

    Raise a SeqmillError if there is none, or if it does not read the index's tokens.
    """
    source = find_model(name or index.attributes["model"])
    made_for, advice = f"{index.path}: made for {index.attributes['model']}", "build the index again for this model"
    if source.family != index.family:
        families = f"a model of {index.family.title}, and {source.name} is one of {source.family.title}"
        raise SeqmillError(f"{made_for}, {families}; {advice}")
    tokenizer = source.tokenizer
    if tokenizer and tokenizer.exists() and sha256_of_file(tokenizer) not in index.attributes["tokenizer"]:
        raise SeqmillError(f"{made_for}, with another tokenizer than {tokenizer}; {advice}")
    return source


def _load_noted(source: ModelSource, status: ShardStatus) -> Weights:
    """Load the weights; at the same time digest their files for the status."""
    with ThreadPoolExecutor(1) as thread:
        noting = thread.submit(lambda: [asdict(note_file(file)) for file in source.files])
        weights = load_weights(source)
        status.weights = noting.result()
    return weights


@contextmanager
def memory_explained(model: str, device: torch.device) -> Iterator[None]:
    """Turn a failed allocation into a SeqmillError that names the model and the remedy."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if device.type == "cpu":
            raise SeqmillError(
                f"{model} does not fit the memory; use a machine with more, or a smaller model"
            ) from error
        free, total = (size / 1e9 for size in torch.cuda.mem_get_info(device))
        raise SeqmillError(
            f"{model} does not fit {torch.cuda.get_device_name(device)}: {free:.1f} of its {total:.1f} GB are free; "
            "is another process on it? Otherwise use precision bfloat16, a larger GPU or a smaller model"
        ) from error
