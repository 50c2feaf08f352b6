"""What is said of every slide: OUT/report/<rank>.jsonl as they are done, and OUT/report.csv, the last line of each."""

import csv
import io
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path

from sparsewsi.files import append_line, inert_cell, read_lines, write_bytes


@dataclass(frozen=True)
class Row:
    """What the report says of one slide. outcome: "done" | "empty" (no tissue) | "failed" (warnings say why)."""

    slide: str
    outcome: str
    patches: int = 0
    slide_mpp: float | None = None
    mpp_source: str = ""
    seconds: float = 0.0
    resumed_at: int = 0  # patches that an earlier run had done
    warnings: str = ""
    unreadable: list[list[int]] = field(default_factory=list)  # (x, y) of patches left out, level-0 px
    time: str = ""


class Report:
    """OUT/report/<rank>.jsonl, one line per slide worked on, and OUT/report.csv, the last line of every slide."""

    def __init__(self, out: Path, rank: int):
        self._folder, self._table = out / "report", out / "report.csv"
        self._path = self._folder / f"{rank}.jsonl"
        self._unwritten: list[Row] = []
        self.rows = self.read()

    def read(self) -> dict[str, Row]:
        """The latest row of every slide, of all ranks and runs."""
        rows: list[Row] = []
        for path in sorted(self._folder.glob("*.jsonl")):
            for record in read_lines(path):
                with suppress(TypeError):  # a row of another program
                    rows.append(Row(**record))
        return {row.slide: row for row in sorted(rows, key=lambda row: row.time)}

    def add(self, row: Row) -> None:
        """Put a row on disk; if the disk is full, together with a later one."""
        row = replace(row, time=datetime.now(UTC).isoformat(timespec="milliseconds"))
        self.rows[row.slide] = row
        self._unwritten.append(row)
        try:
            self._folder.mkdir(exist_ok=True)
            while self._unwritten:
                append_line(self._path, asdict(self._unwritten[0]))
                self._unwritten.pop(0)
        except OSError as error:
            print(f"The report cannot be written: {error.strerror}.", file=sys.stderr)

    def add_if_new(self, row: Row) -> None:
        """Add a row of a slide that was worked on, or whose row says something else than the last."""
        known = self.rows.get(row.slide)
        if row.seconds or known is None or (known.outcome, known.warnings) != (row.outcome, row.warnings):
            self.add(row)

    def finish(self) -> None:
        """Write the table of all slides so far. Every rank does so; the last one to end writes the complete one."""
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, [column.name for column in fields(Row)])
        writer.writeheader()
        for row in sorted(self.read().values(), key=lambda row: row.slide):
            cells = asdict(row) | {"unreadable": len(row.unreadable)}
            writer.writerow({name: inert_cell(cell) for name, cell in cells.items()})
        try:
            write_bytes(self._table, text.getvalue().encode("utf-8", "backslashreplace"))
        except OSError as error:
            print(f"report.csv cannot be written: {error.strerror}.", file=sys.stderr)
