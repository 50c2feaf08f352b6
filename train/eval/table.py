"""Tables in Markdown: what every command of train/ prints its figures with."""

from collections.abc import Iterable, Sequence

from train.eval.statistics import Estimate


def write_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; an empty cell for None."""
    lines = [list(head), ["---"] * len(head), *([("" if cell is None else str(cell)) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def write_percent(share: float | None, digits: int = 0) -> str:
    """0.713 -> "71 %"; nothing for None."""
    return "" if share is None else f"{100 * share:.{digits}f} %"


def write_points(estimate: Estimate | None, sign: str = "") -> str:
    """An estimate in percent or in points, with its interval: "71.3 (68.0 to 74.1)". sign "+": of a difference."""
    return "" if estimate is None else "{:{s}.1f} ({:{s}.1f} to {:{s}.1f})".format(*(100 * v for v in estimate), s=sign)
