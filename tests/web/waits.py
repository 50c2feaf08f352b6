"""How long readers wait: each browser test adds what it measured to one table, screenshots/latencies.md."""

import fcntl
from pathlib import Path

SCREENSHOTS = Path(__file__).resolve().parents[2] / "screenshots"
SLIDES = {"phantom": "phantom, untrained model", "real": "real slide, shipped model"}  # columns


def note_wait(what: str, slide: str, seconds: float, limit: float | None = None) -> None:
    """Note how long something took of one of SLIDES, in place of an earlier run's, and hold it to its limit, s."""
    unit = f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    path = SCREENSHOTS / "latencies.md"
    with path.open("a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # test files may run beside each other
        file.seek(0)
        rows = {row[0]: row[1:] for row in map(_cells, file.read().splitlines()[2:])}
        rows.setdefault(what, [""] * len(SLIDES))[list(SLIDES).index(slide)] = unit + (
            f" (limit {limit:g} s)" if limit else ""
        )
        file.truncate(0)
        file.write(f"| wait for | {' | '.join(SLIDES.values())} |\n|---|{'---|' * len(SLIDES)}\n")
        file.writelines(f"| {' | '.join([what, *took])} |\n" for what, took in rows.items())
    assert limit is None or seconds <= limit, f"{what}: {unit}"


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]
