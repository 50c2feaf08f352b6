"""What a reader waits for, as the browser tests measured it, beside what is on record: nothing may be a fifth slower.

    pytest tests/web/test_browser.py tests/web/test_browser_cases.py    # writes screenshots/latencies.md
    python -m benchmarks.waits
    python -m benchmarks.waits NEW.md ... --before OLD.md     # the same of an earlier commit, from the same machine

Prints both, their ratio and, at the end, how many are slower by more than a fifth; the exit status is 1 if any is. Of
several tables the median counts.
Waits below 50 ms are shown and not judged: a frame more or less is a fifth of them.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

RECORD, SECTION = Path("docs/benchmarks.md"), "## The page"
MOST, LEAST = 1.2, 0.05  # ratio that is slower; s from which it is judged


def read_waits(text: str) -> dict[tuple[str, str], float]:
    """Seconds, by what was waited for and of which slide, of the first table in Markdown."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    _, *slides = _cells(lines[0])
    waits = {}
    for line in lines[2:]:
        what, *took = _cells(line)
        for slide, told in zip(slides, took):
            if found := re.match(r"([0-9.]+) (m?)s\b", told):
                waits[what, slide] = float(found[1]) / (1000 if found[2] else 1)
    return waits


def median_waits(tables: Sequence[Path]) -> dict[tuple[str, str], float]:
    """What read_waits gives of several tables: the median of those that have it."""
    read = [read_waits(path.read_text(encoding="utf-8")) for path in tables]
    return {key: median(waits[key] for waits in read if key in waits) for waits in read for key in waits}


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("new", type=Path, nargs="*", default=[Path("screenshots/latencies.md")])
    parser.add_argument("--before", type=Path, action="append", help="compare with this, may be repeated")
    given = parser.parse_args()
    if given.before:
        old = median_waits(given.before)
    else:
        _, _, section = RECORD.read_text(encoding="utf-8").partition(f"{SECTION}\n")
        old = read_waits(section.partition("\n## ")[0])
    new = median_waits(given.new)
    slower = 0
    print("| wait for | slide | before | now | ratio | |\n|---|---|---|---|---|---|")
    for what, slide in new | old:
        before, now = old.get((what, slide)), new.get((what, slide))
        told = [f"{one:.3g} s" if one is not None else "" for one in (before, now)]
        ratio = now / before if before and now is not None else None
        worse = ratio is not None and ratio > MOST and max(before or 0, now or 0) >= LEAST
        slower += worse
        share = "" if ratio is None else f"{ratio:.2f}"
        print(f"| {what} | {slide.split(',')[0]} | {told[0]} | {told[1]} | {share} | {'slower' if worse else ''} |")
    print(f"\n{slower} slower by more than a fifth.")
    sys.exit(min(slower, 1))


if __name__ == "__main__":
    main()
