"""From answers to numbers: what a generated text chose, shares with their intervals, tables and pictures.

A record is a dict of one item: number, slide, family, answer, options, n (patches), and per row of the table what it
chose (text of an option, or None where it chose none); "<row> text" is what it wrote, "<row> recall" the share of
needle patches it kept, "<row> kinds" the share of needle kinds of which it kept one. A row is a selector, or
"selector@K", "all" or "text-only"; "<row>, strict" and "<row>, lenient" are readings of what the row wrote.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from string import ascii_uppercase

import numpy as np

from train.data.mosaic import FAMILIES
from train.data.questions import same_text

# ---- what a text chose; the right answer is never looked at


def strict_choice(text: str, options: Sequence[str]) -> str | None:
    """The option a text states and nothing else: its letter, its whole text, or both; else None."""
    plain, found = same_text(text), set()
    for letter, option in zip(ascii_uppercase, options):
        if option.strip():
            letters = (letter, f"{letter}.", f"{letter})", f"({letter})", f"{letter}:")
            if text.strip() in letters or plain in (same_text(option), *(same_text(f"{m} {option}") for m in letters)):
                found.add(option)
    return found.pop() if len(found) == 1 else None


# A number with what changes its meaning (<50 %, 3+, 2.5), or a word with a sign behind it (HER2-, but not well-known).
_WORD = re.compile(r"(?:[<>≤≥]=?\s*)?\d+(?:\.\d+)*(?:\s*%|[+-]+(?!\w))?|\w+(?:[+-]+(?!\w))?")
# A letter on its own; "A" and "I" not where they are words ("the answer is A biopsy", but "option A is right").
_LETTER = r"(?:[B-HJ-Z](?![\w'’-])|[AI](?![\w'’-])(?!\s+(?!is\b|was\b|because\b)[a-z]))"
_ALONE = r"(?:[A-Za-z](?=\s*(?:[.):,;]|$)))"  # a letter of either case with nothing but punctuation behind it
_ANNOUNCED = re.compile(
    rf"(?i:\b(?:answer|option|choice)(?:\s+is)?|\bit(?:['’]s|\s+is))\s*[:\s]\s*\(?({_LETTER}|{_ALONE})"
)
_OPENING = re.compile(r"\s*\(?([A-Z])\)?\s*(?:[.):,;]|$|(?=is\b))")  # not the article in "A biopsy shows ..."
_LISTED = re.compile(r"(?:^|\n|,|\band\b|\bor\b)\s*\(?([A-Z])(?=[.):,;]|\s*(?:$|\n|and\b|or\b))")
_NEGATIONS = (" not", " no", " without")


def lenient_choice(text: str, options: Sequence[str]) -> str | None:
    """The option a text can be read to mean, or None where it means none or more than one.

    In this order: what strict_choice reads; the only letter that is all of the text, follows "answer", "option",
    "choice" or "it is", or opens the text set off by punctuation, unless the text of another option occurs as well; the
    only option whose text occurs and is not negated (an option inside another's text counts only by itself).
    """
    found = strict_choice(text, options)
    if found is not None:
        return found
    plain = re.sub(r"\\boxed\s*\{([^}]*)\}", r"\1", text)
    plain = re.sub(r"[*`\"“”\[\]]", "", plain).strip()
    letters = _letters(plain)
    contained = _contained(plain, options)
    if len(letters) > 1:
        return None
    for letter in letters:
        number = ascii_uppercase.index(letter)
        if number < len(options) and options[number].strip():
            return options[number] if contained <= {options[number]} else None
    return contained.pop() if len(contained) == 1 else None


def _letters(text: str) -> set[str]:
    """The letters that a text names as its answer, upper case."""
    if re.fullmatch(r"\(?[A-Za-z]\)?[.:]?", text):
        return {text.strip("().:").upper()}
    found = {letter.upper() for letter in _ANNOUNCED.findall(text)}
    opening, listed = _OPENING.match(text), set(_LISTED.findall(text))
    if opening:
        found |= {opening[1], *listed}
    return found | listed if len(listed) > 1 else found


def _contained(text: str, options: Sequence[str]) -> set[str]:
    """The options whose words occur in a text, unless two have the same words or the word before says "not"."""
    rest, found = _words(text), set()
    words = {option: _words(option) for option in options if option.strip()}
    for option in sorted(words, key=len, reverse=True):  # the longer first, so that it hides those inside it
        if words[option].strip() and words[option] in rest and list(words.values()).count(words[option]) == 1:
            if not any(negation + words[option] in rest for negation in _NEGATIONS):
                found.add(option)
            rest = rest.replace(words[option], " | ")
    return found


def _words(text: str) -> str:
    """The words of a text, with a space around each."""
    words = ("".join(word.split()) for word in _WORD.findall(text.casefold()))
    return f" {' '.join(words)} "


READINGS = {"strict": strict_choice, "lenient": lenient_choice}


def add_readings(records: list[dict], rows: Iterable[str]) -> list[str]:
    """Read what each row wrote, add the readings to the records, and return the names of the rows that this gives."""
    added = []
    for row in rows:
        written = [record for record in records if f"{row} text" in record]
        for reading, choice in READINGS.items():
            for record in written:
                record[f"{row}, {reading}"] = choice(record[f"{row} text"], record["options"])
            added += [f"{row}, {reading}"] * bool(written)
    return added


def majority(records: list[dict], letters: bool = False) -> None:
    """Add the most frequent answer of the record's family as the row "majority".

    letters: the most frequent letter instead, in families where that is right more often; in a file where every
    question has its own options it is.
    """
    answers: dict[str, Counter] = defaultdict(Counter)
    places: dict[str, Counter] = defaultdict(Counter)
    for record in records:
        answers[record["family"]][record["answer"]] += 1
        if letters:
            places[record["family"]][record["options"].index(record["answer"])] += 1
    for record in records:
        [(record["majority"], count)] = answers[record["family"]].most_common(1)
        for place, right in places[record["family"]].most_common(1):
            if right > count:
                record["majority"] = record["options"][place] if place < len(record["options"]) else None


# ---- shares and intervals


def wilson(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson score interval of a share (Wilson 1927)."""
    if n == 0:
        return 0.0, 1.0
    p, centre = right / n, (right / n + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def slide_interval(records: list[dict], row: str, draws: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval of the accuracy that resamples slides, not questions (seed 0)."""
    by_slide = defaultdict(list)
    for record in records:
        by_slide[record["slide"]].append(record[row] == record["answer"])
    right = np.array([sum(v) for v in by_slide.values()])
    n = np.array([len(v) for v in by_slide.values()])
    pick = np.random.default_rng(0).integers(0, len(n), (draws, len(n)))
    low, high = np.quantile(right[pick].sum(1) / n[pick].sum(1), [0.025, 0.975])
    return float(low), float(high)


def stated_interval(entry: dict) -> tuple[float, float]:
    """What a table states: the wider of Wilson's interval, of questions, and the bootstrap's, of slides.

    The bootstrap of few slides, or of answers that are all right, is too narrow; Wilson's takes the questions about one
    slide for independent.
    """
    lows, highs = zip(entry["wilson"], entry.get("slide_bootstrap", entry["wilson"]))
    return min(lows), max(highs)


def interval_of(n: int) -> str:
    """The interval of N, [2^i, 2^(i + 1)), that a slide of n patches falls into."""
    low = 1 << (n.bit_length() - 1)
    return f"{low:,} to {2 * low - 1:,}"


def summary(records: list[dict], rows: Sequence[str]) -> dict[str, dict]:
    """Accuracy with its interval per row: overall, per family, per interval of N; and mean needle recall.

    A row counts the items that it was asked: n tells where a slow row was asked fewer.
    """
    seen = {record["family"] for record in records}
    families = [*(f for f in FAMILIES if f in seen), *sorted(seen - set(FAMILIES))]
    table = {}
    for row in (*rows, "majority"):
        asked = [record for record in records if row in record]
        right = [record for record in asked if record[row] == record["answer"]]
        entry: dict = {"right": len(right), "n": len(asked), "wilson": wilson(len(right), len(asked))}
        entry["accuracy"] = len(right) / max(1, len(asked))
        slides = {record["slide"] for record in asked}
        if 1 < len(slides) < len(asked):
            entry |= {"slides": len(slides), "slide_bootstrap": slide_interval(asked, row)}
        recall = [record[f"{row} recall"] for record in asked if f"{row} recall" in record]
        if recall:
            entry["needle_recall"] = float(np.mean(recall))
        kinds = [record[f"{row} kinds"] for record in asked if f"{row} kinds" in record]
        if kinds:
            entry["kind_recall"] = float(np.mean(kinds))
        entry["families"] = {
            family: [sum(r["family"] == family for r in right), sum(r["family"] == family for r in asked)]
            for family in families
        }
        details = sorted({r["detail"] for r in asked if r.get("detail")})
        if details:
            entry["details"] = {
                detail: [sum(r["detail"] == detail for r in right), sum(r["detail"] == detail for r in asked)]
                for detail in details
            }
        by_n: dict[str, list[int]] = {}
        for record in sorted(asked, key=lambda r: r["n"]):
            if record["n"]:
                counts = by_n.setdefault(interval_of(record["n"]), [0, 0])
                counts[0] += record[row] == record["answer"]
                counts[1] += 1
        entry["by_n"] = by_n
        table[row] = entry
    return table


# ---- for people


def markdown(table: dict[str, dict]) -> str:
    """The summary as a Markdown table, and a second one per interval of N where there are several."""
    families = list(next(iter(table.values()))["families"]) if table else []
    lines = [
        "| row | accuracy | 95 % interval | n | needle recall | "
        + " | ".join(name or "all" for name in families)
        + " |",
        "|" + "---|" * (5 + len(families)),
    ]
    for row, entry in table.items():
        low, high = stated_interval(entry)
        recall = f"{100 * entry['needle_recall']:.0f} %" if "needle_recall" in entry else ""
        shares = " | ".join(f"{right}/{n}" for right, n in entry["families"].values())
        accuracy = f"{100 * entry['accuracy']:.1f} % | {100 * low:.1f} to {100 * high:.1f}"
        lines.append(f"| {row} | {accuracy} | {entry['n']} | {recall} | {shares} |")
    intervals = intervals_of(table)
    if len(intervals) > 1:
        lines += ["", "| N | " + " | ".join(table) + " |", "|" + "---|" * (1 + len(table))]
        for interval in intervals:
            cells = (entry["by_n"].get(interval) for entry in table.values())
            shares = [f"{100 * cell[0] / cell[1]:.1f} % ({cell[0]}/{cell[1]})" if cell else "" for cell in cells]
            lines.append(f"| {interval} | " + " | ".join(shares) + " |")
    return "\n".join(lines)


def intervals_of(table: dict[str, dict]) -> list[str]:
    """The intervals of N that occur in a summary, from small to large."""
    return sorted({name for entry in table.values() for name in entry["by_n"]}, key=_low)


def _low(interval: str) -> int:
    return int(interval.split()[0].replace(",", ""))


def picture(table: dict[str, dict], k: int, path: Path) -> None:
    """Draw accuracy against the number of tokens K and against the number of patches N, with Wilson intervals.

    k: K of the rows that name none. Rows without a K of their own ("all", "text-only", "majority") are dashed lines.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    by_k, by_n = figure.subplots(1, 2, sharey=True)
    curves: dict[str, list[tuple[int, dict]]] = defaultdict(list)
    colours: dict[str, str] = {}
    for row, entry in table.items():
        selector, _, tokens = row.partition("@")
        tokens = tokens.partition(",")[0]
        base = re.sub(r"@\d+", "", row)
        colours.setdefault(base, f"C{len(colours) % 10}")
        if selector.split(",")[0] in ("all", "text-only", "majority"):
            by_k.axhline(100 * entry["accuracy"], color=colours[base], linestyle="--", linewidth=1, label=base)
        else:
            curves[base].append((int(tokens) if tokens else k, entry))
    for base, points in curves.items():
        points.sort(key=lambda point: point[0])
        _with_errors(by_k, [x for x, _ in points], [(e["right"], e["n"]) for _, e in points], base, colours[base])
    intervals = intervals_of(table)
    for number, (row, entry) in enumerate(table.items()):
        if "@" not in row and entry["by_n"]:
            shift = 0.3 * (number / len(table) - 0.5)  # so that intervals at the same N lie side by side
            places = [intervals.index(interval) + shift for interval in entry["by_n"]]
            _with_errors(by_n, places, list(entry["by_n"].values()), row, colours[row])
    by_k.set(xlabel="tokens K the language model sees", ylabel="accuracy, %", xscale="log")
    ticks = sorted({x for points in curves.values() for x, _ in points})
    by_k.set_xticks(ticks, [str(tick) for tick in ticks])
    by_k.minorticks_off()
    by_n.set(xlabel="patches N of the slide")
    by_n.set_xticks(range(len(intervals)), intervals, rotation=30, ha="right")
    for axes in (by_k, by_n):
        axes.grid(alpha=0.3)
    figure.legend(*by_k.get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8)
    figure.savefig(path)


def _with_errors(axes, x: Sequence[float], counts: list, label: str, colour: str) -> None:
    """A curve of shares in % with Wilson intervals."""
    share = np.array([right / max(1, n) for right, n in counts])
    ends = np.array([wilson(right, n) for right, n in counts])
    errors = np.abs(ends.T - share) * 100
    axes.errorbar(x, 100 * share, yerr=errors, marker="o", markersize=4, capsize=2, label=label, color=colour)
