"""The index of sequences in memory, as `build_index` writes it for a file: for embedding without files."""

import io
import zlib
from collections.abc import Iterator
from dataclasses import asdict
from itertools import chain
from pathlib import Path

import numpy as np

from seqmill.errors import SeqmillError
from seqmill.index.arrange import arrange, token_blocks
from seqmill.index.fasta import FastaRecord
from seqmill.index.spill import Records, Spill
from seqmill.index.tokens import RecordTokenizer
from seqmill.spec.lengths import LengthPolicy
from seqmill.spec.models import ModelSource
from seqmill.store.index import Index


def index_in_memory(
    blocks: Iterator[list[FastaRecord]],
    name: str,
    source: ModelSource,
    tokenizer: RecordTokenizer,
    policy: LengthPolicy,
) -> Index:
    """Return an index of records, with the same packs as `build_index` plans for them.

    Args:
        blocks: at least one record, with numbers that go on from the first.
        name: of the input, for messages.
        source, tokenizer, policy: as for `build_index`.

    Raises:
        SeqmillError: records are invalid; the message has the numbers and ids of the first 20.
    """
    records = Records(Spill(io.BytesIO()), Spill(io.BytesIO()), Spill(io.BytesIO()))
    first = next(blocks)
    invalid = records.read(chain([first], blocks), name, tokenizer)
    if invalid.count:
        raise SeqmillError(invalid.refusal(name))
    arranged = arrange(records, policy, [])
    tokens = list(token_blocks(records.tokens.mapped(tokenizer.dtype), arranged))
    attributes = {
        "model": source.name,
        "family": source.family.name,
        **asdict(policy),
        "pack_tokens": arranged.pack_tokens,
        **arranged.totals,
    }
    return Index(
        path=Path(name),
        attributes=attributes,
        record_ids=records.ids.mapped(),
        record_id_offsets=records.ids.offsets(),
        record_descriptions=records.descriptions.mapped(),
        record_description_offsets=records.descriptions.offsets(),
        tokens=np.frombuffer(b"".join(tokens), tokenizer.dtype),
        pack_checksums=np.array([zlib.crc32(block) for block in tokens], np.uint32),
        **arranged.columns,
        first_number=first[0].number,
    )
