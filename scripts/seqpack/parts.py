"""Part files: finished packs, saved while a shard is computed, so that a crash loses a minute at most.

A part lies in the folder `parts` beside the shards. It serves every attempt of the same computation,
of whatever world size: what counts is its fingerprint and the numbers of its packs.
Layout of a part: `seqpack.part_file`.
"""

from __future__ import annotations

import glob
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from seqpack.errors import SeqpackError
from seqpack.fingerprint import Fingerprint
from seqpack.index import Index, residue_offsets
from seqpack.part_file import PackResult, PackSource, Part, open_part
from seqpack.part_names import may_hold, may_hold_only, shard_of
from seqpack.shard_lock import lock_holder

log = logging.getLogger(__name__)


class Parts:
    """The packs that are done, by number, and the files that hold them."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._places: dict[int, tuple[PackSource, int]] = {}

    def add(self, part: PackSource, packs: set[int] | range, with_quarantined: bool = True) -> None:
        """Take those of the part's packs that are in `packs` and of which nothing better is known.

        Without `with_quarantined` packs with quarantined sequences count as not done: another attempt,
        perhaps on another GPU, may do better.
        """
        for place, pack in enumerate(part.packs.tolist()):
            clean = not len(part.quarantined(place))
            if pack in packs and (clean or (with_quarantined and pack not in self._places)):
                self._places[pack] = part, place

    def __contains__(self, pack: int) -> bool:
        return pack in self._places

    def __len__(self) -> int:
        return len(self._places)

    def embedding(self, row: int) -> np.ndarray:
        """Return the embedding of one sequence that is not quarantined, float32 (hidden_dim,)."""
        result, place = self._result_of(row)
        return result.embeddings[place]

    def residues(self, row: int) -> np.ndarray:
        """Return the vectors of its residues, (num_residues, number of layers * hidden_dim), where they are kept."""
        result, place = self._result_of(row)
        offsets = residue_offsets(self._index, result.index_rows)
        return result.residues[offsets[place] : offsets[place + 1]]

    def _result_of(self, row: int) -> tuple[PackResult, int]:
        pack = int(np.searchsorted(self._index.pack_offsets, row, side="right")) - 1
        (result,) = self.results([pack])
        return result, int(np.searchsorted(result.index_rows, row))

    def quarantined(self, packs: range) -> list[int]:
        """Return the quarantined rows of these packs."""
        places = (self._places[pack] for pack in packs)
        return [row for part, place in places for row in part.quarantined(place).tolist()]

    def computed_by(self, packs: range) -> list[str]:
        """Return the kinds of device and kernels that computed these packs; more than one may differ by rounding."""
        return sorted({kind for pack in packs for kind in self._places[pack][0].computed_by.split("; ")})

    def results(self, packs: range | list[int]) -> Iterator[PackResult]:
        """Yield what came of these packs, in order, each checked as it is read.

        Raises:
            SeqpackError: a file was damaged since it was written; a part has been set aside.
        """
        for pack in packs:
            part, place = self._places[pack]
            try:
                result = part.result(place, self._index)
            except SeqpackError as error:
                aside = f"it is now {_set_aside(part.path).name}, and " if isinstance(part, Part) else ""
                raise SeqpackError(
                    f"{part.path}: damaged since it was written: {error}; {aside}running again computes its packs anew"
                ) from None
            yield result


def parts_folder(shard: Path) -> Path:
    """Return where the parts of a shard lie; its sister shards share the folder."""
    return shard.parent / "parts"


def find_parts(folder: Path, index: Index, fingerprint: Fingerprint, packs: range, with_quarantined: bool) -> Parts:
    """Return the sound parts of this computation that hold any of `packs`; see `Parts`.

    Those that can't hold any, by their names, are not opened: of other shards under way there may be thousands. A
    damaged part is set aside and its packs count as not done; a part of another computation is left where it is and
    the log says why it is not used.

    Raises:
        OSError: a part can't be read, which says nothing of what is in it.
    """
    found = Parts(index)
    refused: dict[str, int] = {}
    for path in sorted(path for path in folder.glob("*.part.h5") if may_hold(path, packs)):
        try:
            part = open_part(path)
            if difference := part.fingerprint.difference(fingerprint):
                refused[difference] = refused.get(difference, 0) + 1
                continue
            held = part.packs.tolist()
            if not all(0 <= pack < index.num_packs for pack in held):
                raise SeqpackError("it has packs that the index has not")
            for place, pack in enumerate(held):
                if pack in packs:
                    part.result(place, index)
        except (SeqpackError, ValueError, KeyError, IndexError, RuntimeError, TypeError) as error:
            if not path.exists():  # a sister shard is complete and has removed it
                continue
            path.read_bytes()  # raises if the trouble is with reading, as with a lack of file handles
            log.warning("%s is damaged (%s): set aside as %s", path, error, _set_aside(path).name)
            continue
        except FileNotFoundError:
            continue
        found.add(part, packs, with_quarantined)
    for difference, number in refused.items():
        log.warning("%d part files in %s are of another computation and not used: %s", number, folder, difference)
    return found


def remove_parts(folder: Path, fingerprint: Fingerprint, packs: range, own: str = "") -> None:
    """Remove the parts of a computation that hold none but these packs.

    What another worker has saved that is still at work stays; `own` is the name of the caller's shard.
    """
    done = set(packs)
    for path in folder.glob("*.part.h5"):
        if not may_hold_only(path, packs):
            continue
        shard = shard_of(path)
        if shard not in ("", own) and lock_holder(folder.parent / shard):
            continue
        try:
            part = open_part(path)
        except (SeqpackError, OSError, IndexError):
            continue
        if not part.fingerprint.difference(fingerprint) and done.issuperset(part.packs.tolist()):
            path.unlink(missing_ok=True)


def remove_set_aside(folder: Path) -> None:
    """Remove the damaged parts that were set aside; for when nothing depends on parts any more."""
    for path in folder.glob("*.part.h5.damaged"):
        path.unlink(missing_ok=True)


def remove_unfinished(shard: Path) -> None:
    """Remove what killed workers of a shard, on any machine, have left half-written; its lock must be held."""
    parts = [path for path in parts_folder(shard).glob(".*.part.h5.*.tmp") if shard_of(path) == shard.name]
    for path in (*shard.parent.glob(f".{glob.escape(shard.name)}.*.tmp"), *parts):
        path.unlink(missing_ok=True)


def _set_aside(path: Path) -> Path:
    return path.replace(path.with_name(path.name + ".damaged"))
