"""Tests trained weights: our encoder, in float32 on the CPU, must compute published numbers.

The tolerances are in spec/released.json with the numbers; docs/explanation/accuracy.md explains them.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from seqmill.base.commands import command
from seqmill.base.files import sha256_of_file
from seqmill.base.machine import available_memory
from seqmill.embedding.pooling import poolings_of
from seqmill.errors import SeqmillError
from seqmill.index.bpe import BpeTokenizer
from seqmill.index.letters import ALPHABETS, ProteinLetters
from seqmill.model.encoder import Encoder, make_encoder
from seqmill.model.pack import Pack
from seqmill.model.weights import Weights, load_weights
from seqmill.model.weights_record import read_record
from seqmill.spec.models import CONFIG, ModelSource, released_sources
from seqmill.spec.released import RELEASED, Case, Published, Release, read_releases, why_not_as_published

MEMORY_FACTOR = 1.3  # of the float32 model, whose q, k and v are joined in memory


def self_test(source: ModelSource, weights: Weights, published: Published | None) -> str:
    """Compute the published sequences and compare; return the result in words, or why nothing was compared.

    A nucleotide model's tokenizer is tested as well. Raise a SeqmillError if a number differs by more than allowed.
    """
    if published is None:
        return "no numbers of its trained weights are published to test it with"
    needed = int(MEMORY_FACTOR * 4 * sum(tensor.numel() for tensor in weights.tensors.values()))
    if (free := available_memory()) < needed:
        return (
            f"not tested: that needs {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} are free; run "
            f"`{command('doctor', '--weights')}` where there is more"
        )
    tokens = [_tokens(source, weights, case) for case in published.cases]
    model = make_encoder(weights, torch.float32, max(map(len, tokens)), torch.device("cpu"), "sdpa")
    deviations = [_deviation(source, model, *case) for case in zip(tokens, published.cases, strict=True)]
    for case, deviation in zip(published.cases, deviations, strict=True):
        if not deviation <= published.tolerance:  # also NaN
            raise SeqmillError(
                f"{source.path}: not the trained weights of {source.name}: what they compute for "
                f"{_short(case.sequence)} differs by {deviation:.2g} from the published numbers ({published.origin}), "
                f"and at most {published.tolerance:g} is allowed"
            )
    return f"computes the published numbers ({published.origin}) to {max(deviations):.1g}"


def _tokens(source: ModelSource, weights: Weights, case: Case) -> np.ndarray:
    if not source.family.is_protein:
        assert source.tokenizer is not None
        tokenizer = BpeTokenizer.from_file(source.tokenizer, weights.architecture.vocabulary)
        tokens, _ = tokenizer.encode([case.sequence.encode()])
    else:
        alphabet = ALPHABETS[source.family]
        residues = ProteinLetters(alphabet).tokens(case.sequence.encode())
        tokens = np.frombuffer(alphabet.before + residues + alphabet.after, np.uint8)
    if case.tokens is not None and tokens.tolist() != case.tokens:
        raise SeqmillError(f"{source.name}: {_short(case.sequence)} is the tokens {tokens.tolist()}, not {case.tokens}")
    return tokens


def _deviation(source: ModelSource, model: Encoder, tokens: np.ndarray, case: Case) -> float:
    """Return the largest difference from a case's published numbers; NaN if there is one."""
    pack = Pack.from_tokens(tokens, np.array([len(tokens)], np.int64))
    hidden = model(pack)
    pairs = list(zip(hidden[case.first_token :], case.hidden or [], strict=False))
    if case.mean is not None:
        pool = poolings_of(source.family)["mean"].of_segment
        pairs.append((pool(hidden, pack)[0], case.mean))
    differences = [(row[: len(expected)] - torch.tensor(expected)).abs().max() for row, expected in pairs]
    return float(torch.stack([torch.zeros(()), *differences]).max())


def _short(sequence: str) -> str:
    return sequence if len(sequence) <= 12 else f"{sequence[:12]}... ({len(sequence)} letters)"


def check_weights(facts: Path = RELEASED) -> Iterator[tuple[str, bool]]:
    """Yield what is found on each released model on this disk, and whether it may be used; reads all bytes.

    Files must have the published digests, tensors that of their record; the model must compute the published numbers.
    """
    for name, release in read_releases(facts).items():
        for source in released_sources(name):
            assert source.path is not None
            if source.path.exists():
                try:
                    yield f"{name}: {source.path}: {_check(source, release)}", True
                except (SeqmillError, OSError) as error:
                    yield f"{name}: {error}", False


def _check(source: ModelSource, release: Release) -> str:
    record = read_record(source)
    for file in source.files:  # as published, or as recorded if it was converted from another file
        fact = release.files.get(file.name)
        wrong = why_not_as_published(file, fact) if fact else "no file of this name is published"
        if record is not None and (wrong or (fact and not fact.is_pinned)):
            known, digest = record["files"].get(file.name, {}).get("sha256"), sha256_of_file(file)
            wrong = "" if digest == known else wrong or f"its SHA256 is {digest}, not {known} as fetched"
        if wrong:
            raise SeqmillError(f"{file}: not that of {source.name} as published: {wrong}; remove it and fetch it again")
    tested = self_test(source, load_weights(source), release.published)
    recorded = f"fetched from {record['source']}" if record else "put there by hand, without a record of its tensors"
    unpinned = [name for name, fact in release.files.items() if name != CONFIG and not fact.is_pinned]
    if unpinned and record is None:
        return f"{recorded}; no public page states a digest of {' or '.join(unpinned)} to compare with; {tested}"
    return f"{recorded}; files and tensors are right; {tested}"
