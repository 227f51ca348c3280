"""The audit accepts correct embeddings, catches planted defects, and stays within its time and memory."""

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import esm
import numpy as np
import pytest
import torch
from transformers import EsmConfig, EsmForMaskedLM

from pipeline import SCRIPTS
from reference import ALPHABET, fair_esm_model, save_checkpoint
from seqmill.base.machine import available_memory
from seqmill.embedding import audit as audit_module
from seqmill.embedding.audit import MOST_SEQUENCES, StoredVectors, audit_embeddings, judge
from seqmill.embedding.pooling import mean_over_residues
from seqmill.index.build import build_index
from seqmill.index.letters import ESM2_LETTERS
from seqmill.model.esm2 import ESM2
from seqmill.model.pack import Pack
from seqmill.model.weights import Weights, load_weights
from seqmill.spec.families import DNABERT_S
from seqmill.spec.lengths import LengthPolicy
from seqmill.spec.models import ESM2 as ESM2_FAMILY
from seqmill.spec.models import MODELS, ModelSource, find_model
from seqmill.spec.outputs import Outputs
from seqmill.store.index import Index, open_index
from seqmill.store.status import AuditFacts
from sequences import random_sequences

NAME = "esm2_t6_8M_UR50D"
LENGTHS = [600, 400, 200, 200, 128, 64, 64, 64, 40, 33, 17, 3, 2, 1]
AMPLE = 600.0  # seconds: more than a slow machine needs
LAST = Outputs((6,))


def write_index(folder: Path, sequences: list[str], model: str, max_length: int = 1022) -> Index:
    fasta = folder / "in.faa"
    fasta.write_text("".join(f">s{n}\n{sequence}\n" for n, sequence in enumerate(sequences)))
    build_index(fasta, folder / "index.h5", model, LengthPolicy("truncate", max_length))
    return open_index(folder / "index.h5")


def compute(index: Index, model: ESM2) -> np.ndarray:
    """Return the embeddings of all sequences, pack by pack, as a worker computes them."""
    packs = [Pack.from_tokens(index.pack_tokens(n), index.pack_lengths(n)) for n in range(index.num_packs)]
    return np.concatenate([mean_over_residues(model(pack), pack).numpy() for pack in packs])


def load_model(weights: Weights, dtype: torch.dtype = torch.float32) -> ESM2:
    return ESM2(weights.architecture, weights.tensors, dtype, max(LENGTHS) + 2)


@dataclass(frozen=True)
class Case:
    """A model and its correct embeddings."""

    index: Index
    source: ModelSource
    weights: Weights
    embeddings: np.ndarray

    @property
    def rows(self) -> np.ndarray:
        return np.arange(self.index.num_sequences)

    def audit(self, embeddings: np.ndarray, seconds: float = AMPLE) -> AuditFacts:
        return audit_embeddings(
            StoredVectors(self.index, LAST, embeddings.__getitem__), self.source, self.rows, seconds
        )


def make_case(folder: Path, model: str) -> Case:
    index = write_index(folder, random_sequences(LENGTHS), model)
    source = find_model(model)
    weights = load_weights(source)
    return Case(index, source, weights, compute(index, load_model(weights)))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Seeded weights with attention sharp enough for positions to matter, as they do in a trained model."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model = fair_esm_model(MODELS[NAME])
    with torch.no_grad():
        for layer in model.layers:
            layer.self_attn.q_proj.weight.mul_(2)
            layer.self_attn.k_proj.weight.mul_(2)
    return make_case(folder, str(save_checkpoint(model, folder / "model.pt")))


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("untrained"), f"untrained:{NAME}")


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A folder as transformers saves it, with its own weights."""
    folder = tmp_path_factory.mktemp("hugging_face")
    architecture = MODELS[NAME]
    torch.manual_seed(3)
    config = EsmConfig(
        vocab_size=architecture.vocabulary,
        pad_token_id=ALPHABET.padding_idx,
        mask_token_id=ALPHABET.mask_idx,
        num_hidden_layers=architecture.num_layers,
        hidden_size=architecture.hidden_dim,
        num_attention_heads=architecture.num_heads,
        intermediate_size=architecture.ffn_dim,
        initializer_range=0.05,  # so that layers matter: with 0.02, a lost layer is hardly visible
        layer_norm_eps=1e-5,
        position_embedding_type="rotary",
        token_dropout=True,
    )
    EsmForMaskedLM(config).save_pretrained(folder / "model")
    return make_case(folder, str(folder / "model"))


@pytest.fixture(params=["checkpoint", "untrained", "hugging_face"])
def case(request: pytest.FixtureRequest) -> Case:
    return request.getfixturevalue(request.param)


def test_right_embeddings_pass(case: Case) -> None:
    audit = case.audit(case.embeddings)
    print(audit)
    assert audit.sequences == MOST_SEQUENCES
    assert audit.worst_relative_error < 1e-5
    assert audit.worst_cosine > 1 - 1e-9
    assert audit.reference == f"fair-esm {esm.__version__} float32"
    assert audit.longest_included
    assert judge(audit, "float32", ESM2_FAMILY)[0] == "ok"


def test_one_layer_perturbed_is_caught(case: Case) -> None:
    tensors = dict(case.weights.tensors)
    name = "layers.3.fc1.weight"
    noise = torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(1))
    tensors[name] = tensors[name] + 0.05 * tensors[name].std() * noise
    audit = case.audit(compute(case.index, load_model(replace(case.weights, tensors=tensors))))
    print(audit)
    verdict, message = judge(audit, "float32", ESM2_FAMILY)
    assert verdict in ("warn", "fail")
    assert audit.worst_sequence in message


def test_swapped_rows_are_caught(case: Case) -> None:
    """The two longest, one of which is always checked; they differ least, because random proteins average out."""
    swapped = case.embeddings.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    audit = case.audit(swapped)
    print(audit)
    assert audit.worst_sequence in ("s0", "s1")
    assert judge(audit, "float32", ESM2_FAMILY)[0] == "fail"
    assert judge(audit, "bfloat16", ESM2_FAMILY)[0] in ("warn", "fail")


def test_a_sum_in_place_of_the_mean_is_caught_at_16_bits(checkpoint: Case) -> None:
    """The cosine doesn't show it."""
    residues = np.diff(checkpoint.index.token_offsets)[:, None] - 2
    audit = checkpoint.audit((checkpoint.embeddings * residues).astype(np.float32))
    assert audit.worst_cosine > 0.999
    assert judge(audit, "bfloat16", ESM2_FAMILY)[0] == "fail"


def test_cls_embeddings_are_compared_with_cls(checkpoint: Case) -> None:
    index, model = checkpoint.index, load_model(checkpoint.weights)
    packs = [Pack.from_tokens(index.pack_tokens(n), index.pack_lengths(n)) for n in range(index.num_packs)]
    embeddings = np.concatenate([model(pack)[pack.cu_seqlens[:-1].long()].numpy() for pack in packs])
    for pooling, stored, verdict in (
        ("cls", embeddings, "ok"),
        ("cls", checkpoint.embeddings, "fail"),
        ("mean", embeddings, "fail"),
    ):
        vectors = StoredVectors(index, Outputs((6,), (pooling,)), stored.__getitem__)
        found = audit_embeddings(vectors, checkpoint.source, checkpoint.rows, AMPLE)
        assert judge(found, "float32", ESM2_FAMILY)[0] == verdict


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0])
def test_embeddings_without_a_direction_fail(checkpoint: Case, value: float) -> None:
    embeddings = checkpoint.embeddings.copy()
    embeddings[0] = value
    audit = checkpoint.audit(embeddings)
    assert judge(audit, "float32", ESM2_FAMILY)[0] == judge(audit, "bfloat16", ESM2_FAMILY)[0] == "fail"


def test_bfloat16_passes(case: Case) -> None:
    audit = case.audit(compute(case.index, load_model(case.weights, torch.bfloat16)))
    print(audit)
    assert judge(audit, "bfloat16", ESM2_FAMILY)[0] == "ok"
    assert judge(audit, "float32", ESM2_FAMILY)[0] != "ok"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_tables_in_bfloat16_are_caught(checkpoint: Case, dtype: torch.dtype) -> None:
    """As after converting the whole model: the angles are rounded, not only their cosines."""
    model = load_model(checkpoint.weights, dtype)
    head_dim = checkpoint.weights.architecture.head_dim
    frequencies = (1 / 10000 ** (torch.arange(0, head_dim, 2).float() / head_dim)).bfloat16()
    angles = torch.outer(torch.arange(len(model.cos)).bfloat16(), frequencies).repeat(1, 2)
    model.cos, model.sin = angles.cos().float(), angles.sin().float()
    audit = checkpoint.audit(compute(checkpoint.index, model))
    print(audit)
    assert judge(audit, str(dtype).removeprefix("torch."), ESM2_FAMILY)[0] in ("warn", "fail")


def rows_looked_at(case: Case, rows: np.ndarray, index: Index | None = None) -> list[int]:
    seen: list[int] = []

    def embedding_of(row: int) -> np.ndarray:
        seen.append(row)
        return case.embeddings[row]

    audit_embeddings(StoredVectors(index or case.index, LAST, embedding_of), case.source, rows, AMPLE)
    return seen


def test_the_choice_depends_only_on_the_index_and_the_rows(checkpoint: Case) -> None:
    rows = checkpoint.rows
    seen = rows_looked_at(checkpoint, rows)
    assert len(set(seen)) == len(seen) == MOST_SEQUENCES
    assert seen[1] == 0  # the longest
    assert LENGTHS[seen[0]] == 64  # the short one: the index has the lengths in this order
    assert rows_looked_at(checkpoint, rows[::-1]) == seen
    other = replace(checkpoint.index, attributes={**checkpoint.index.attributes, "index_digest": "1" * 64})
    assert rows_looked_at(checkpoint, rows, other) != seen
    few = np.array([4, 9, 2], np.int64)
    assert sorted(rows_looked_at(checkpoint, few)) == [2, 4, 9]


def test_tokens_of_the_index_are_those_of_fair_esm(tmp_path: Path) -> None:
    index = write_index(tmp_path, [ESM2_LETTERS], NAME)
    assert index.tokens.tolist() == [ALPHABET.cls_idx, *ALPHABET.encode(ESM2_LETTERS), ALPHABET.eos_idx]


def refuse(row: int) -> np.ndarray:
    raise AssertionError(f"row {row} was looked at")


def assert_nothing(audit: AuditFacts, reason: str) -> None:
    assert audit.sequences == 0
    assert math.isnan(audit.worst_cosine)
    assert math.isnan(audit.worst_relative_error)
    assert not audit.longest_included
    assert reason in audit.reference
    verdict, message = judge(audit, "float32", ESM2_FAMILY)
    assert verdict == "none"
    assert reason in message


@pytest.mark.parametrize(
    ("model", "seconds", "reason"),
    [("", 0.0, "0 s are allowed"), ("untrained:esm2_t48_15B_UR50D", 10.0, "loading the weights may take")],
)
def test_without_time_nothing_is_loaded(checkpoint: Case, model: str, seconds: float, reason: str) -> None:
    source = find_model(model) if model else checkpoint.source
    stored = StoredVectors(checkpoint.index, LAST, refuse)
    assert_nothing(audit_embeddings(stored, source, checkpoint.rows, seconds), reason)


def test_without_memory_nothing_is_loaded(untrained: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_module, "available_memory", lambda: 10_000_000)
    audit = audit_embeddings(StoredVectors(untrained.index, LAST, refuse), untrained.source, untrained.rows, AMPLE)
    assert_nothing(audit, "GB of memory")


def test_without_rows_nothing_is_loaded(checkpoint: Case) -> None:
    audit = audit_embeddings(
        StoredVectors(checkpoint.index, LAST, refuse), checkpoint.source, np.empty(0, np.int64), AMPLE
    )
    assert_nothing(audit, "no sequences")


def test_a_sequence_too_long_for_time_or_memory_is_left_out(tmp_path: Path, untrained: Case) -> None:
    """Its attention scores alone would take 5 TB in fair-esm."""
    lengths = [150_000, 80, 20]
    index = write_index(tmp_path, random_sequences(lengths), untrained.source.name, 200_000)
    seen = []

    def embedding_of(row: int) -> np.ndarray:
        seen.append(row)
        return np.ones(MODELS[NAME].hidden_dim, np.float32)

    audit = audit_embeddings(StoredVectors(index, LAST, embedding_of), untrained.source, np.arange(3), AMPLE)
    assert sorted(seen) == [1, 2]
    assert audit.sequences == 2
    assert not audit.longest_included


def test_threads_and_random_numbers_do_not_change(checkpoint: Case) -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    checkpoint.audit(checkpoint.embeddings)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


WITHOUT_FAIR_ESM = """
import json, sys
from pathlib import Path
from msgspec.structs import asdict
import numpy as np
from seqmill.embedding.audit import StoredVectors, audit_embeddings
from seqmill.store.index import open_index
from seqmill.spec.models import find_model
from seqmill.spec.outputs import Outputs

index, embeddings, model = sys.argv[1:]
index, embeddings, source = open_index(Path(index)), np.load(embeddings), find_model(model)
rows = np.arange(len(embeddings))
swapped = embeddings.copy()
swapped[[0, 1]] = embeddings[[1, 0]]
stored = [StoredVectors(index, Outputs((6,)), vectors.__getitem__) for vectors in (embeddings, swapped)]
audits = [audit_embeddings(vectors, source, rows, 600.0) for vectors in stored]
print(json.dumps([asdict(audit) for audit in audits]))
"""


def audits_without_fair_esm(case: Case, folder: Path, content: str) -> list[AuditFacts]:
    """Audit the correct and the swapped embeddings in a process whose package esm has only this content."""
    (folder / "esm").mkdir()
    (folder / "esm/__init__.py").write_text(content + "\n")
    np.save(folder / "embeddings.npy", case.embeddings)
    arguments = [case.index.path, folder / "embeddings.npy", case.source.name]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_FAIR_ESM, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": f"{folder}:{SCRIPTS}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [AuditFacts(**audit) for audit in json.loads(done.stdout)]


def test_without_fair_esm_our_own_forward_is_the_reference(checkpoint: Case, tmp_path: Path) -> None:
    """The tensors of its queries, keys, and values are separate in the file."""
    right, wrong = audits_without_fair_esm(checkpoint, tmp_path, "raise ImportError('not here')")
    assert right.reference == "seqmill float32, one sequence at a time"
    assert right.worst_relative_error < 1e-5
    assert judge(right, "float32", ESM2_FAMILY)[0] == "ok"
    assert judge(wrong, "float32", ESM2_FAMILY)[0] == "fail"


@pytest.mark.parametrize("content", ["raise ValueError('broken')", "version = 3"])
def test_a_broken_or_unrelated_esm_package_is_not_used(checkpoint: Case, tmp_path: Path, content: str) -> None:
    right, _ = audits_without_fair_esm(checkpoint, tmp_path, content)
    assert right.reference == "seqmill float32, one sequence at a time"
    assert right.worst_relative_error < 1e-5


def audit_of(cosine: float, error: float) -> AuditFacts:
    return AuditFacts(5, cosine, error, "here", "fair-esm", 1.0, True)


@pytest.mark.parametrize(
    ("precision", "cosine", "error", "verdict", "of_nucleotides"),
    [
        ("float32", 1.0, 9e-5, "ok", "ok"),
        ("float32", 1.0, 2e-4, "warn", "warn"),
        ("float32", 0.9999, 2e-2, "fail", "fail"),
        ("bfloat16", 0.9995, 0.03, "ok", "ok"),
        ("bfloat16", 0.9985, 0.05, "warn", "ok"),
        ("bfloat16", 0.9985, 0.07, "warn", "warn"),
        ("float16", 0.991, 0.13, "warn", "warn"),
        ("bfloat16", 0.989, 0.148, "fail", "fail"),
        ("float16", math.nan, math.nan, "fail", "fail"),
        ("float8", 0.993, 0.12, "ok", "ok"),
        ("float8", 0.9915, 0.12, "warn", "warn"),
        ("float8", 0.993, 0.14, "warn", "warn"),
        ("float8", 0.989, 0.148, "fail", "fail"),
        ("float8", 0.991, 0.16, "fail", "fail"),
        ("float8", math.nan, math.nan, "fail", "fail"),
    ],
)
def test_thresholds(precision: str, cosine: float, error: float, verdict: str, of_nucleotides: str) -> None:
    assert judge(audit_of(cosine, error), precision, DNABERT_S)[0] == of_nucleotides
    found, message = judge(audit_of(cosine, error), precision, ESM2_FAMILY)
    assert found == verdict
    assert "here" in message


def write_files(folder: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


MEMINFO = "MemTotal: 9000 kB\nMemAvailable: 8000 kB\n"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")),
        ({"proc/meminfo": MEMINFO}, 8000 * 1024),
        (  # version 2, limited two levels up; part of the used memory is page cache
            {
                "proc/meminfo": MEMINFO,
                "proc/self/cgroup": "0::/job/step/task\n",
                "cgroup/job/memory.max": "5000000\n",
                "cgroup/job/memory.current": "3000000\n",
                "cgroup/job/memory.stat": "anon 1\ninactive_file 1000000\n",
                "cgroup/job/step/memory.max": "max\n",
                "cgroup/job/step/memory.current": "3000000\n",
                "cgroup/job/step/memory.stat": "inactive_file 0\n",
            },
            3_000_000,
        ),
        (  # version 1, in a container that sees the path on its host
            {
                "proc/meminfo": MEMINFO,
                "proc/self/cgroup": "5:cpu,cpuacct:/\n4:memory:/docker/abc\n0::/\n",
                "cgroup/memory/memory.limit_in_bytes": "4000000\n",
                "cgroup/memory/memory.usage_in_bytes": "1000000\n",
                "cgroup/memory/memory.stat": "total_inactive_file 500000\n",
            },
            3_500_000,
        ),
    ],
    ids=["none", "machine", "version 2", "version 1"],
)
def test_available_memory(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    write_files(tmp_path, files)
    assert available_memory(tmp_path / "proc", tmp_path / "cgroup") == expected


def test_available_memory_of_this_machine() -> None:
    assert 0 < available_memory() < sys.maxsize
