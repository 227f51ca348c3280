"""The model of an index: one that reads the tokens in it."""

from __future__ import annotations

from seqpack.errors import SeqpackError
from seqpack.files import sha256_of_file
from seqpack.index import Index
from seqpack.models.registry import ModelSource, find_model


def model_of(index: Index, name: str) -> ModelSource:
    """Return the model of that name, empty for the index's own, once it is known to read the index's tokens.

    Raises:
        SeqpackError: no such model, one of another family, or with another tokenizer.
    """
    source = find_model(name or index.attributes["model"])
    made_for = f"{index.path}: made for {index.attributes['model']}"
    if source.family != index.attributes["family"]:
        raise SeqpackError(
            f"{made_for}, whose tokens are not those of {source.name}; build the index again for this model"
        )
    tokenizer = source.tokenizer
    if tokenizer and tokenizer.exists() and sha256_of_file(tokenizer) not in index.attributes["tokenizer"]:
        raise SeqpackError(f"{made_for}, by another tokenizer than {tokenizer}; build the index again for this model")
    return source
