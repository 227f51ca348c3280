"""The index of sequences in memory, as `build_index` writes it for a file: for embedding without files."""

import io
import zlib
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import numpy as np

from seqmill.index.arrange import arrange, token_blocks
from seqmill.index.fasta import FastaRecord
from seqmill.index.spill import Records, Spill
from seqmill.index.tokens import RecordTokenizer
from seqmill.spec.lengths import LengthPolicy
from seqmill.spec.models import ModelSource
from seqmill.store.index import Index


def index_in_memory(
    blocks: Iterable[list[FastaRecord]],
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
        SeqmillError: a record is unusable; the message has its number and its id.
    """
    records = Records(Spill(io.BytesIO()), Spill(io.BytesIO()), Spill(io.BytesIO()))
    first_number = 0
    for block in blocks:
        first_number = first_number or block[0].number
        records.append(block, tokenizer(block, name))
    arranged = arrange(records, policy, [])
    tokens = list(token_blocks(records.tokens.mapped(tokenizer.dtype), arranged))
    attributes = {
        "model": source.name,
        "family": source.family,
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
        first_number=first_number,
    )
