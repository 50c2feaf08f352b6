"""Files of questions about slides, as benchmarks and training sets come, and whether they can be used as they are.

    python -m train.data.questions check SlideBench-VQA-TCGA.csv --features features/ --model my-model

A row becomes a Record or a BadRow with the reason; no row stops the others. Formats, told by what a row holds:

Names of columns and keys may be written in any case; NaN is no text.
- SlideBench CSV: Slide, Question, A, B, C, D, Answer (a letter), and Broad Category, Narrow Category or Task
- SlideChat and WSI-Bench JSON: image (a name, or a list of names of slides that belong together) and conversations;
  options inline, `A) ... B) ...`, or a line each, `A. ...`; where the answer is one of the marks, or the text behind
  one, also `a) ...`, `A: ...`, `A - ...` and `1. ...`; each pair of turns is one question
- WSI-VQA JSON: Id, Question, Choice (absent for open questions), Answer (a text)
- ours, JSON or JSON lines: {"slide": name or list of names, "question": str, "options": [str, ...], "answer": the text
  of one of them, "category": str}; without options the question is open
"""

import csv
import io
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_letters, ascii_uppercase
from typing import Any

from tqdm import tqdm

from sparsewsi.bags.bag import UNKNOWN_ENCODER
from sparsewsi.files import as_path, parse_json
from sparsewsi.model.config import SparseWSIConfig
from train.data.example import Question, Record
from train.data.slides import FeatureFolder, SlideVQADataset, slide_name
from train.flags import make_parser, run_command

YES_NO = ("Yes", "No")
NO_TEXT = ("nan", "n/a", "#n/a", "<na>", "null")  # what programs write where there is nothing; "none" may be an answer
LETTERS = "abcdefgh"  # columns of options
MORE = "(more)"  # cells of a row of a CSV that is longer than the header
LONGEST = 500  # characters of a reason; what is longer quotes the file


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used. Row 0 is the file as a whole."""

    file: str
    row: int
    reason: str
    slide: str = ""  # where the reason is this slide's features

    def __str__(self) -> str:
        reason = self.reason if len(self.reason) <= LONGEST else f"{self.reason[:LONGEST]} ..."
        return f"{self.file}{f', row {self.row}' if self.row else ''}: {reason}"


@dataclass(frozen=True)
class Benchmark:
    """A published set of closed questions."""

    questions: int
    what: str
    published: tuple[tuple[str, float], ...] = ()  # accuracies in % that others state for it


BENCHMARKS = {
    "tcga-1473": Benchmark(
        1473,
        "SlideBench-VQA (TCGA) as the SparseLearn paper counts it",
        (("SparseLearn (paper)", 73.32), ("GPT-4o", 57.91), ("LLaVA-Med", 42.00), ("random", 25.02)),
    ),
    "tcga-1494": Benchmark(1494, "SlideBench-VQA (TCGA) as first released", (("SlideChat (public weights)", 75.23),)),
    "tcga-3176": Benchmark(3176, "SlideBench-VQA (TCGA) as released later", (("SlideChat (public weights)", 74.12),)),
    "bcnb-7274": Benchmark(
        7274,
        "SlideBench-VQA (BCNB), 7 tasks on 1,058 slides",
        (("SparseLearn (paper)", 56.89), ("SlideChat (paper)", 54.14), ("GPT-4o", 41.43), ("random", 24.40)),
    ),
    "wsivqa-79": Benchmark(
        79,
        "WSI-VQA*, probably these closed questions",
        (("SparseLearn (paper)", 60.76), ("SlideChat (paper)", 60.18), ("GPT-4o", 30.41), ("random", 24.14)),
    ),
    "wsivqa-390": Benchmark(390, "the closed questions of WSI-VQA's test set"),
    "wsi-bench": Benchmark(1336, "the closed questions of WSI-Bench's test files"),
}


# ---- reading


def read(paths: Iterable[str | Path]) -> tuple[list[Record], list[BadRow]]:
    """The records of files of questions, and the rows that are none; a folder stands for the files in it."""
    records: list[Record] = []
    bad: list[BadRow] = []
    for path in map(as_path, paths):
        files = [path]
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.suffix.lower() in (".csv", ".json", ".jsonl"))
            if not files:
                bad.append(BadRow(path.name, 0, "the folder holds no .csv, .json or .jsonl file."))
        for file in files:
            number = 0
            try:
                for number, row in enumerate(_rows(file), 1):
                    try:
                        records += _records(row, file, number)
                    except ValueError as error:
                        bad.append(BadRow(file.name, number, str(error)))
            except (OSError, ValueError, csv.Error, RecursionError) as error:
                number = 1  # a file that cannot be read may hold rows: "no row" would be a second, wrong reason
                reason = f"cannot be read ({error})."
                if isinstance(error, UnicodeError):
                    reason = "is no text in UTF-8: save it as such (in Excel: CSV UTF-8)."
                bad.append(BadRow(file.name, 0, f"the file {reason}"))
            if not number:
                bad.append(BadRow(file.name, 0, "the file holds no row."))
    return records, bad


def report_repeated(records: Sequence[Record]) -> Iterator[BadRow]:
    """A row of the report for each question that stands in the files again, as it would count again."""
    first: dict[tuple, Record] = {}
    for record in records:
        question = record.question
        before = first.setdefault((record.slides, question.question, question.options), record)
        if before is not record:
            where = f"row {before.row}" if before.file == record.file else f"{before.file}, row {before.row}"
            yield BadRow(record.file, record.row, f"the same question about the same slide as {where}.")


def _rows(path: Path) -> Iterator[Any]:
    """The rows of a CSV, of a JSON list or of JSON lines; a line that is no JSON is handed on as its text."""
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix.lower() == ".csv":
        yield from _csv_rows(text)
    elif text.lstrip().startswith("["):
        yield from parse_json(text)
    elif (whole := _object(text)) is not None:
        lists = [value for value in whole.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
        if len(lists) == 1 and not {"conversations", "question"} & set(_fold_keys(whole)):  # {"data": [...]}
            yield from lists[0]
        else:
            yield whole
    else:
        for line in filter(str.strip, text.split("\n")):  # splitlines would also split at a U+2028 inside a string
            try:
                yield parse_json(line)
            except (ValueError, RecursionError):
                yield line


def _csv_rows(text: str) -> Iterator[dict[str, str]]:
    """Rows of a CSV with a header. Raises ValueError where a quotation mark is not closed: it would swallow rows."""
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, restkey=MORE)
    while True:
        line = reader.line_num + 1
        try:
            if line == 1:
                line += bool(reader.fieldnames)  # reads the header
                names = Counter(map(_fold, reader.fieldnames or ()))
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(
                f"a quotation mark opened in line {line} is not closed as it should be; no row from there on was read"
            ) from error
        twice = [name for name, count in names.items() if name and count > 1]
        if twice:
            raise ValueError(f"the header has two columns {twice[0]}: rename or remove one")
        yield row


def _object(text: str) -> dict | None:
    """What the text is if it is one JSON object, not one a line."""
    try:
        whole = parse_json(text)
    except (ValueError, RecursionError):
        return None
    return whole if isinstance(whole, dict) else None


def _fold_keys(row: dict) -> dict[str, Any]:
    """A row with its keys in lower case. Raises ValueError where two of them are then the same but not their values."""
    named: dict[str, Any] = {}
    for key, value in row.items():
        if str(named.setdefault(_fold(str(key)), value)) != str(value):
            raise ValueError(f"the row has two values under {_fold(str(key))}. Rename or remove one.")
    return named


def _fold(name: str) -> str:
    """The name of a column without case, spaces around it and marks that cannot be seen."""
    return " ".join(name.replace("\u200b", "").replace("\ufeff", "").split()).casefold()


def _records(row: Any, file: Path, number: int) -> list[Record]:
    """The records of one row. Raises ValueError with the reason why it is none."""
    if not isinstance(row, dict):
        raise ValueError(f"the row is no JSON object, or one with a key twice: {str(row)[:40]!r}.")
    if any(map(str.strip, row.pop(MORE, ()))):
        raise ValueError("the row has more cells than the header: a text with a comma in it needs quotation marks.")
    detail, named = "", _fold_keys(row)
    if "conversations" in named:
        slides, asked = _slides(named.get("image")), _conversation(named["conversations"], _category(file))
    elif {"slide", "question", "a", "b", "answer"} <= set(named):
        options = tuple(_text(named[letter]) for letter in LETTERS if letter in named)
        category = _text(named.get("broad category")) or _text(named.get("task"))
        slides, detail = _slides(named["slide"]), _text(named.get("narrow category"))
        asked = [_question(named["question"], options, named["answer"], category, lettered=True)]
    elif {"question", "answer"} <= set(named) and ("slide" in named or "id" in named):
        options, lettered = _options(named)
        category = _text(named.get("category")) if "slide" in named else "closed" if options else "open"
        slides = _slides(named["slide"] if "slide" in named else named["id"])
        asked = [_question(named["question"], options, named["answer"], category, lettered)]
    else:
        keys = ", ".join(str(key) for key in row)
        mark = next((name for sign, name in ((";", "semicolons"), ("\t", "tabs")) if sign in keys), "")
        hint = f" The columns are to be set off by commas, not {mark}." if mark and len(row) == 1 else ""
        raise ValueError(f"the row has the keys {keys}, which no known format has (docs/data.md lists them).{hint}")
    return [Record(slides, question, file.name, number, detail) for question in asked]


def _text(value: Any) -> str:
    """A cell as text; what is no text and no number is none, nor is what stands for nothing (NO_TEXT)."""
    text = str(value).strip() if isinstance(value, str | int | float) and not isinstance(value, bool) else ""
    return "" if text.casefold() in NO_TEXT else text


def _slides(value: Any) -> tuple[str, ...]:
    """Names of slides without folder and endings."""
    names = [slide_name(_text(item)) for item in (value if isinstance(value, list) else [value])]
    if not names or not all(names):
        raise ValueError("the row names no slide.")
    return tuple(names)


def _category(file: Path) -> str:
    """WSI-Bench tells the category by the name of the file: Staging_choice_test.json."""
    return re.sub(r"(_TF_question|_choice)?(_test|_train|_val)?$", "", file.stem).replace("_", " ")


def _options(named: dict[str, Any]) -> tuple[tuple[str, ...], bool]:
    """The options of a row, which may stand under several names, and whether by letter; none for an open question."""
    columns = [found for name in named if (found := re.fullmatch(r"(?:option|choice)[ _.-]?([a-h]|\d)", name))]
    if columns:
        return tuple(_text(named[column[0]]) for column in columns), columns[0][1].isalpha()
    value = next((named[name] for name in ("options", "choice", "choices") if name in named), None)
    if value is None or value == "" or value != value:  # NaN differs from itself
        answer = same_text(_text(named["answer"]))
        other = (
            name for name, item in named.items() if isinstance(item, list) and answer in map(same_text, map(str, item))
        )
        if name := next(other, ""):
            raise ValueError(
                f"the answer is one of the texts under {name}: call them options if that is what they are."
            )
        return (), False
    if not isinstance(value, list) or not all(isinstance(item, str | int | float | None) for item in value):
        raise ValueError(f"the options must be a list of texts, got {str(value)[:40]!r}.")
    options = tuple(str(item) if isinstance(item, bool) else _text(item) for item in value)
    if options and not any(options):
        raise ValueError("all options are empty.")
    if "" in options and any(options[options.index("") :]):  # behind the last, it fills up a table
        raise ValueError(f"option {options.index('') + 1} of {len(options)} is empty. Write it, or leave it out.")
    return options, False


def _conversation(turns: Any, category: str) -> list[Question]:
    """Pairs of turns as questions; each is asked by itself, without the pairs before it."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError("`conversations` must be a list of turns.")
    speakers = [turn.get("from") for turn in turns]
    if not turns or speakers != ["human", "gpt"] * (len(turns) // 2):
        raise ValueError(f"the turns must be human, gpt, human, gpt, ...; got {', '.join(map(str, speakers))}.")
    questions = []
    for asked, answered in zip(turns[::2], turns[1::2]):
        text = _text(asked.get("value")).replace("<image>", "").strip()
        text, options, answer = _find_options(text, _text(answered.get("value")))
        lettered = re.search(r"\bA[.)]\s.*\bB[.)]\s", text, re.DOTALL) and re.match(r"[A-Z][.)]?(\s|$)", answer)
        if lettered and not options:
            raise ValueError("the options cannot be told apart: write each on a line of its own, or as A) ... B) ...")
        if not options and same_text(answer) in map(same_text, YES_NO):
            options = YES_NO
        questions.append(_question(text, options, answer, category, lettered=True))
    return questions


# Marks of options that are options for sure, and those that are if the answer is one of them.
_MARKS = (r"(?<!\S)\(?([A-Z])\)", r"^\s*\(?([A-Z])\.")
_LIKELY_MARKS = (
    # - **Option A.** x, [A] x, A: x, A - x, and the full-width signs of Chinese text, which no space follows
    r"^\s*(?:[-*\u2022]\s+)?(?:\*\*)?[\[(<]?(?:[Oo]ption\s+)?([A-Z])\s*(?:[\u3001\uff0e\uff1a\uff09]|[.:)\]>\-\u2013\u2014]+(?:\*\*)?(?=\s))",
    r"(?<!\S)[\[(]?([A-Z])[.:)\]](?=\s)",
    r"(?<!\S)\(?([a-z])\)",
    r"^\s*([a-z])\s*[.:\-\u2013\u2014](?=\s)",
    r"(?<!\S)([a-z])[.:](?=\s)",
    r"^\s*\(?([0-9]{1,2})\s*[.):\-\u2013\u2014](?=\s)",
    r"(?<!\S)\(?([0-9]{1,2})\)(?=\s)",
    r"^\s*([A-Z])\s+(?=\S)",
)
_STATED = re.compile(r"[\[(<*]*(\w{1,2})[\])>*]*\s*[.):]?[\])>*]*(?:\s+(.+))?", re.DOTALL)  # (mark, text) of an answer
# What is asked of whoever answers, behind the last option.
_INSTRUCTION = re.compile(
    r"(?:\n|(?<=[.;:?!])\s|\s(?=Please\b))\s*((?:please\s+)?(?:answer|select|choose|pick|respond|reply|give|output|provide)\b"
    r".*\b(?:letter|options?|choices?|answers?)\b.*)$",
    re.DOTALL | re.IGNORECASE,
)


def split_options(text: str) -> tuple[str, tuple[str, ...]]:
    """A question with its options inline -> the question and the options; no options where there are none.

    Options are marked `A)` after a space, or `A.` at the start of a line, in the order of the alphabet from A; a letter
    out of order belongs to the text it stands in.
    """
    return next((found[:2] for marker in _MARKS if (found := _split_at(marker, text))), (text, ()))


def _find_options(text: str, answer: str) -> tuple[str, tuple[str, ...], str]:
    """A question, its options and its answer: marked for sure, or so that the answer is one of the marks."""
    question, options = split_options(text)
    if options:
        return question, options, answer
    for marker in _LIKELY_MARKS:
        found = _split_at(marker, text)
        if found is None:
            continue
        question, options, marks = found
        stated = _STATED.fullmatch(answer)
        for mark, option in zip(marks, options):
            if same_text(answer) == same_text(option):
                return question, options, option
            if stated is None or stated[1].casefold() != mark.casefold():
                continue
            if same_text(stated[2] or option) == same_text(option):
                return question, options, option
    return text, (), answer


def _split_at(marker: str, text: str) -> tuple[str, tuple[str, ...], list[str]] | None:
    """(question, options, their marks) where marks stand in order, from A, a or 1 on; None for fewer than two."""
    marks: list[re.Match[str]] = []
    for mark in re.finditer(marker, text, re.MULTILINE):
        following = str(len(marks) + 1) if mark[1].isdigit() else ascii_uppercase[len(marks) % 26]
        if mark[1].upper() == following:
            marks.append(mark)
    if len(marks) < 2:
        return None
    ends = [*(mark.start() for mark in marks[1:]), len(text)]
    options = [text[mark.end() : end].strip() for mark, end in zip(marks, ends)]
    options[-1], rest = _cut_last(options[-1], not any("\n" in option for option in options[:-1]))
    for sign in (";", ","):
        if all(option.endswith(sign) for option in options[:-1]):
            options = [option.removesuffix(sign).rstrip() for option in options]
    question = "\n".join(part for part in (text[: marks[0].start()].strip(), rest) if part)
    return question, tuple(options), [mark[1] for mark in marks]


def _cut_last(option: str, one_line: bool) -> tuple[str, str]:
    """The last option of a question, and what is written behind it: an instruction, or more lines where the others have
    one_line each and it does not go on in lower case.
    """
    first, _, rest = option.partition("\n")
    if one_line and first.strip() and rest.strip() and not rest.lstrip()[0].islower():
        return first.strip(), rest.strip()
    found = _INSTRUCTION.search(option)
    return (option[: found.start()].strip(), found[1].strip()) if found and found.start() else (option, "")


def _take_marks(options: tuple[str, ...], answer: str) -> tuple[tuple[str, ...], str, bool]:
    """(options without marks of their own, as `A. x`, the answer without it, whether there were any).

    Raises ValueError where all bear a letter, but not in order: the letters they are asked under would be others.
    """
    found = [re.fullmatch(r"[\[(]?([A-Za-z]|\d{1,2})[.):\]]\s+(.+)", option, re.DOTALL) for option in options if option]
    if len(found) < 2 or not all(found):
        return options, answer, False
    marks = [mark[1].upper() for mark in found if mark]
    wanted = [
        str(i + 1) if marks[0].isdigit() else ascii_uppercase[i % 26] for i, option in enumerate(options) if option
    ]
    if marks != wanted:
        if set(marks) <= set(ascii_uppercase[: len(options)]):
            raise ValueError(f"the options are marked {', '.join(marks)}: write them in order, or without marks.")
        return options, answer, False
    texts = iter(mark[2].strip() for mark in found if mark)
    bare = tuple(next(texts) if option else "" for option in options)
    answer = next(
        (text for text, option in zip(bare, options) if option and same_text(option) == same_text(answer)), answer
    )
    return bare, answer, True


def _question(question: Any, options: tuple[str, ...], answer: Any, category: str, lettered: bool = False) -> Question:
    """A checked question, its answer in words. Empty options keep their letters; those at the end are dropped.

    lettered: the answer is the letter of an option, alone or before its text; else the text of an option.
    """
    if isinstance(answer, list | dict):
        raise ValueError(f"the answer must be a text, got {str(answer)[:40]!r}.")
    text, answer = _text(question), str(answer) if isinstance(answer, bool) else _text(answer)
    options, answer, marked = _take_marks(options, answer)
    lettered |= marked
    while options and not options[-1]:
        options = options[:-1]
    if not text:
        raise ValueError("the question is empty.")
    if not answer:
        raise ValueError("the answer is empty.")
    real = [same_text(option) for option in options if option]
    if options and len(real) < 2:
        raise ValueError("only one option is not empty.")
    twice = [option for option, count in Counter(real).items() if count > 1]
    if twice:
        raise ValueError(f"two options are the same text, {twice[0]!r}.")
    if not options:
        if re.fullmatch(r"[\[(<*]*[A-Za-z][\])>*.:]*" if lettered else r"[\[(<*]*[A-H][\])>*.:]*", answer):
            raise ValueError(f"the answer is the letter {answer!r}, but no options are found in the question.")
        return Question(text, answer, (), category)
    found = _chosen(answer, options, lettered)
    if found is None:
        raise ValueError(f"the answer {answer[:60]!r} is not among the options {' | '.join(options)[:200]!r}.")
    return Question(text, found, options, category)


def _chosen(answer: str, options: tuple[str, ...], lettered: bool) -> str | None:
    """The option a stated answer means."""
    if lettered and (mark := _STATED.fullmatch(answer)) and len(mark[1]) == 1 and mark[1] in ascii_letters:
        number = ascii_uppercase.index(mark[1].upper())
        option = options[number] if number < len(options) else ""
        if option and (mark[2] is None or same_text(mark[2]) == same_text(option)):
            return option
    return next((option for option in options if option and same_text(option) == same_text(answer)), None)


def same_text(text: str) -> str:
    """What two texts have in common that differ only in case, spaces and a full stop at the end."""
    return " ".join(text.split()).casefold().rstrip(".").rstrip()


def read_closed_questions(benchmark: str, data: Sequence[Path]) -> tuple[list[Record], list[BadRow], list[str]]:
    """The questions of a benchmark's files that have options, rows that cannot be asked, and what is to be said."""
    records, bad = read(data)
    closed = [record for record in records if record.question.options]
    notes = [f"Cannot be asked: {problem}" for problem in bad]
    twice = len(list(report_repeated(closed)))
    if twice:
        notes.append(f"{twice} questions stand in the files more than once and count as often.")
    if len(closed) < len(records):
        notes.append(f"{len(records) - len(closed)} open questions are not asked: there is nothing to count.")
    if not closed:
        raise ValueError(f"{', '.join(map(str, data))} holds no question with options. {' '.join(notes[:3])}")
    known = BENCHMARKS.get(benchmark)
    if known and len(closed) + len(bad) != known.questions:
        notes.append(f"{benchmark} has {known.questions:,} questions; these files have {len(closed) + len(bad):,}.")
    if known and known.published:
        stated = ", ".join(f"{name} {accuracy:.2f} %" for name, accuracy in known.published)
        notes.append(f"{known.what}; stated by others: {stated}.")
    return closed, bad, notes


# ---- checking


def report_missing_features(records: Sequence[Record], features: FeatureFolder) -> Iterator[BadRow]:
    """A row of the report for each slide whose feature file is missing or cannot be told, at its first question."""
    count = Counter(slide for record in records for slide in dict.fromkeys(record.slides))
    seen: set[str] = set()
    for record in records:
        for slide in record.slides:
            if slide not in seen:
                seen.add(slide)
                try:
                    found, reason = features.find(slide), f"slide {slide} has no feature file"
                except ValueError as error:
                    found, reason = [], str(error)
                if not found:
                    yield BadRow(record.file, record.row, f"{reason} ({count[slide]} questions).", slide)


def report_broken_features(
    records: Sequence[Record], features: FeatureFolder, encoder: str | None = None, dim: int | None = None
) -> Iterator[BadRow]:
    """A row of the report for each feature file that is broken, empty, or of another encoder or dimension.

    encoder, dim: what is wanted; where not given, what most files hold. Every file is read as a whole, because one that
    a killed job left behind looks right until its end.
    """
    first = {record.slides: record for record in reversed(records)}
    held: list[tuple[Record, str, int]] = []  # encoder and dimension of what could be read
    for slides, record in tqdm(first.items(), desc="feature files", disable=None):
        try:
            if not all(features.find(slide) for slide in slides):
                continue  # report_missing_features reports it
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # unknown positions do not matter here
                bag = features.load(slides)
            if not len(bag.features):
                raise ValueError("there are no patches in its feature file")
            held.append((record, bag.encoder, bag.features.shape[1]))
        except ValueError as error:
            yield BadRow(record.file, record.row, f"slide {', '.join(slides)}: {error}")
    stated = Counter(name for _, name, _ in held if name != UNKNOWN_ENCODER)
    encoder = encoder or next((name for name, _ in stated.most_common(1)), UNKNOWN_ENCODER)
    dim = dim or next((size for size, _ in Counter(size for *_, size in held).most_common(1)), None)
    for record, name, size in held:
        if size != dim or name not in (encoder, UNKNOWN_ENCODER):
            reason = f"has features of {name}, dimension {size}; wanted: {encoder}, dimension {dim}."
            yield BadRow(record.file, record.row, f"slide {', '.join(record.slides)} {reason}")


# ---- training


def open_training_set(
    data: Sequence[str | Path],
    features: str | Path,
    seed: int,
    questions_per_bag: int,
    progress: Callable[[str], object] = print,
) -> SlideVQADataset:
    """The questions of files about slides that have features, to train on; says what it leaves out."""
    folder = FeatureFolder(features)
    records, problems = read(data)
    problems += report_missing_features(records, folder)
    lost = {problem.slide for problem in problems if problem.slide}
    usable = [record for record in records if lost.isdisjoint(record.slides)]
    if problems:
        progress("\n".join(map(str, problems[:5])))
        progress(
            f"{len(problems):,} problems; {len(usable):,} questions are left. `train.data.questions check` lists all."
        )
    folder.convert_csv(slide for record in usable for slide in record.slides)
    return SlideVQADataset(usable, folder, seed, questions_per_bag)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("command", choices=["check"])
    parser.add_argument("data", nargs="+", type=Path, help="files of questions, or folders of such files")
    parser.add_argument("--features", type=Path, help="folder with the slides' feature files")
    parser.add_argument("--model", type=Path, help="model folder: features must be of its encoder and dimension")
    parser.add_argument("--names-only", action="store_true", help="look for feature files without reading them")
    arguments = parser.parse_args()
    records, problems = read(arguments.data)
    problems += report_repeated(records)
    if arguments.features:
        features = FeatureFolder(arguments.features)
        config = SparseWSIConfig.load(arguments.model) if arguments.model else None
        problems += report_missing_features(records, features)
        if not arguments.names_only:
            encoder, dim = (config.encoder, config.feature_dim) if config else (None, None)
            problems += report_broken_features(records, features, encoder, dim)
    for problem in problems:
        print(problem)
    closed = sum(bool(record.question.options) for record in records)
    slides = len({slide for record in records for slide in record.slides})
    print(
        f"{len(records):,} questions can be asked ({closed:,} with options, {len(records) - closed:,} open) about "
        f"{slides:,} slides; {len(problems):,} problems."
    )
    sys.exit(2 if problems or not records else 0)


if __name__ == "__main__":
    run_command(main)
