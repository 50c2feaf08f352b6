"""Results as Markdown: every script here leaves OUT/<name>.json, and docs/benchmarks.md is made of these.

python -m benchmarks.tables [--out runs/benchmarks]
"""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

OUT = Path("runs/benchmarks")
# In the order of docs/benchmarks.md.
NAMES = ("reading", "tissue", "end_to_end", "soft_topk", "selection", "chat", "feature_map")


@dataclass(frozen=True)
class Table:
    """One script's result, every cell a text."""

    name: str  # of the script, and of the file
    columns: list[str]
    rows: list[list[str]]
    note: str  # what was measured, on what, with which versions


def report(table: Table, folder: Path) -> None:
    """Print a table and keep it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{table.name}.json").write_text(json.dumps(asdict(table), indent=1, ensure_ascii=False) + "\n")
    print(markdown(table), flush=True)


def markdown(table: Table) -> str:
    rows = [table.columns, ["---"] * len(table.columns), *table.rows]
    return f"{table.note}\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    folder = parser.parse_args().out
    for path in (folder / f"{name}.json" for name in NAMES):
        if path.exists():
            print(markdown(Table(**json.loads(path.read_text()))))


if __name__ == "__main__":
    main()
