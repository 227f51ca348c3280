"""Results in Python: an embeddings file with what a notebook needs."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas

from seqmill.base.extras import optional_packages
from seqmill.errors import SeqmillError
from seqmill.export.names import unique_names
from seqmill.neighbors import search
from seqmill.store.embeddings import EmbeddingsFile, read_blocks

if TYPE_CHECKING:
    import anndata
    import torch


def open_embeddings(path: str | Path, layer: int | None = None, pooling: str | None = None) -> "Embeddings":
    """Open an `embeddings.h5`; the vectors stay on disk and are read when they are needed.

    Args:
        layer: of the output, if the file has several. A negative one counts from the end, -1 being the model's last.
        pooling: of the output. Of several outputs that fit, the first is taken (`Embeddings.outputs` lists them).

    Raises:
        SeqmillError: the file is missing, truncated or not written by seqmill's merge, or has no such output.
    """
    return Embeddings(path, layer, pooling)


class Embeddings(EmbeddingsFile):
    """The embeddings of a FASTA file, in its order.

    `e[3]` and `e[-1]` are vectors (hidden_dim,) in float32, or float16 if so stored; `e[10:20]` and `e[[1, 5]]` are
    arrays (n, hidden_dim). `e["id"]` is the vector of that record; if several records have the id, it is an array
    (n, hidden_dim) of all of them, in the order of the FASTA. `e[["a", "b"]]` are the vectors of several ids.
    `with seqmill.open_embeddings(path) as e:` closes the file at the end of the block.
    """

    def __enter__(self) -> "Embeddings":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the file, so that it can be replaced or its disk taken away."""
        for name in ("array", "_residues"):
            self.__dict__.pop(name, None)

    def __repr__(self) -> str:
        return super().__repr__() if "array" in self.__dict__ else f"<Embeddings {self.path}, closed>"

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        if name in ("array", "_residues"):
            raise SeqmillError(f"{self.path}: is closed; open it again")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def shape(self) -> tuple[int, int]:
        """Records and dimensions."""
        return self.array.shape[0], self.array.shape[1]

    def blocks(self) -> Iterator[tuple[list[str], np.ndarray]]:
        """Yield ids and vectors (n, hidden_dim) of all records in order, 32 MB of vectors at a time."""
        return ((block.ids, block.vectors) for block in read_blocks(self))

    def nearest(self, key: str | int, k: int = 10) -> pandas.DataFrame:
        """Return the `k` records nearest to one of the records by cosine, the nearest first, without itself.

        Args:
            key: the record's id, or its row.

        Returns:
            Columns `id`, `row`, and `score` (the cosine).

        Raises:
            SeqmillError: several records have the id and different vectors, or a vector is not finite.
            KeyError, IndexError: there is no such record.
        """
        if isinstance(key, np.ndarray):
            raise SeqmillError("nearest takes a record's id or row; seqmill.search takes vectors")
        rows = self._rows_of(key) if isinstance(key, str) else [range(len(self))[key]]
        if (self.array[rows] != self.array[rows[0]]).any():
            raise SeqmillError(f"several sequences have the id {key!r}: use a row instead, one of {rows}")
        row = rows[0]
        found = search(self[row], self, k + (k > 0))  # one more, for the record itself
        others = found[found["row"] != row].head(k)
        return others[["id", "row", "score"]].reset_index(drop=True)

    def to_pandas(self) -> pandas.DataFrame:
        """Return all vectors as a DataFrame with one row per record, indexed by id."""
        return pandas.DataFrame(np.array(self.array), index=pandas.Index(self.ids, name="id"))

    def to_torch(self) -> "torch.Tensor":
        """Return all vectors as a tensor (records, hidden_dim) on the CPU."""
        with optional_packages():
            import torch
        return torch.from_numpy(np.array(self.array))

    def to_anndata(self) -> "anndata.AnnData":
        """Return all vectors as an AnnData, for scanpy: `X`, `obs` (`id`, `length`), `uns` (the file's attributes).

        `obs_names` are the ids, made unique: `a`, `a-1`, `a-2`.
        """
        with optional_packages():
            import anndata
        names = pandas.Index(unique_names(lambda: self.ids))
        obs = pandas.DataFrame({"id": self.ids, "length": self.lengths}, index=names)
        return anndata.AnnData(np.array(self.array), obs=obs, uns=dict(self.attrs))
