"""Invalid records: those with a letter that is not allowed, or without a sequence."""

from dataclasses import dataclass, field

from seqmill.errors import SeqmillError
from seqmill.index.fasta import SHOWN_ID, FastaRecord

SHOWN = 20  # invalid records that a message names


@dataclass
class InvalidRecords:
    """The invalid records of an input so far. Only the first are kept, as there may be millions."""

    count: int = 0
    lines: list[str] = field(default_factory=list)  # number, id and reason of the first `SHOWN`

    def add(self, record: FastaRecord, reason: SeqmillError) -> None:
        self.count += 1
        if len(self.lines) < SHOWN:
            self.lines.append(f"record {record.number} ({record.id[:SHOWN_ID]!r}): {reason}")

    def refusal(self, name: str, instead: str = "") -> str:
        """Return the error for an input, `name`; `instead` says how to leave out the records, if that is possible."""
        if self.count == 1:
            return f"{name}: {self.lines[0]}" + (f"; or {instead}" if instead else "")
        return self._listed(f"{name}: {self.count:,} records are invalid; mend them, or {instead or 'leave them out'}:")

    def warning(self, name: str) -> str:
        """Return the warning that the records were left out."""
        number = "1 record is" if self.count == 1 else f"{self.count:,} records are"
        return self._listed(f"{name}: {number} invalid and left out (on_invalid: skip):")

    def _listed(self, head: str) -> str:
        more = [f"and {self.count - SHOWN:,} more"] if self.count > SHOWN else []
        return "\n  ".join([head, *self.lines, *more])
