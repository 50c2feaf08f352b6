"""The command `ask`: select patches of a slide, answer questions from them, write what was selected."""

import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from sparsewsi.bags.bag import FEATURE_SUFFIXES, Bag, join
from sparsewsi.bags.extract import extract_bag
from sparsewsi.bags.foreign import load_bag
from sparsewsi.files import as_path
from sparsewsi.model.config import SparseWSIConfig
from sparsewsi.model.prompt import format_question
from sparsewsi.model.selector import QUESTION, check_selector
from sparsewsi.model.words import pick_words
from sparsewsi.phantom import example_slide
from sparsewsi.readers.choice import ReaderChoice, open_reader
from sparsewsi.readers.pictures import PictureReader, ReaderError, encode_jpeg
from sparsewsi.report.annotations import can_annotate
from sparsewsi.report.answer import Answer
from sparsewsi.report.case import ANNOTATIONS, FILES, Case, Model, Reader, open_case, replay_case
from sparsewsi.report.contradictions import word_contradictions
from sparsewsi.report.record import Record, read_selection
from sparsewsi.report.scope import word_answer, word_tendency
from sparsewsi.slides.slide import open_slide

DEFAULT_QUESTION = "Describe this slide."

Questions = Sequence[tuple[str, Sequence[str]]]  # text and options


def ask(
    slides: Sequence[str],
    *,
    model: str,
    questions: Questions = (),
    k: int | None = None,
    selector: str = "learned",
    slide_mpp: float | None = None,
    max_patches: int | None = None,
    evidence: bool = False,
    replay: Path | None = None,
    out: Path | None = None,
    reader: ReaderChoice | None = None,
    without: Sequence[int] = (),
) -> None:
    """Print the answers as they come, write the files of the case.

    slides:    a slide, a feature file, or the word phantom; several are one case, in which K patches are chosen
    model:     folder or repository
    evidence:  measure which patches each answer rests on
    replay:    a selection.json whose patches are taken, and whose questions are asked where none is given
    out:       folder, default out/<name of the slide>
    reader:    who answers, from pictures of the patches; None: the model's own LLM
    without:   numbers of patches; each question is put once more without these
    Raises ValueError or OSError, in words, for input at fault; before anything slow is loaded where that can be known.
    """
    if selector != QUESTION:
        check_selector(selector)
    record = None if replay is None else read_selection(replay)
    if record is not None:
        selector, max_patches = record.selector, record.max_patches
        slide_mpp, questions = slide_mpp or record.slide_mpp, questions or record.questions
    questions = questions or [(DEFAULT_QUESTION, ())]
    for text, options in questions:
        format_question(text, options)  # one that cannot be put is refused now, not after an hour of encoding
    asked = " ".join(word for text, options in questions for word in (text, *options))
    if selector == QUESTION and record is None and not pick_words(asked):
        raise ValueError("--selector question needs a --question with words that name something.")
    for slide in slides:
        given = as_path(slide)
        if slide != "phantom":
            _check_slide(given, slide_mpp, record if len(slides) == 1 else None)
        if reader is not None and slide != "phantom" and _holds_features(given):
            raise ReaderError(
                f"{reader.name} is shown pictures of patches, and features are none. Pass the slide itself."
            )
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)  # and a folder that cannot be made
    loaded = _load_model(model)
    read = None if reader is None else open_reader(reader)
    if record is not None:
        record.check_names(encoder=loaded.config.encoder)
        if record.weights_sha256 != loaded.weights_sha256:
            warnings.warn("the model's weights are not the record's: same patches, other answers.", stacklevel=1)
    paths = [_make_phantom() if slide == "phantom" else as_path(slide) for slide in slides]
    bag = join([_read_bag(path, loaded.config, slide_mpp, max_patches) for path in paths])
    pictured = None if any(map(_holds_features, paths)) else paths
    if record is not None:
        case = replay_case(loaded, bag, record, pictured, slide_mpp=slide_mpp)
    else:
        how = {"k": k, "selector": selector, "max_patches": max_patches, "question": asked}
        case = open_case(loaded, bag, pictured, slide_mpp=slide_mpp, **how)
    folder = out or Path("out") / bag.slide.replace(" ", "-")
    _answer(case, loaded if read is None else read, questions, evidence, folder, without)


def _answer(
    case: Case, reader: Reader | PictureReader, questions: Questions, evidence: bool, out: Path, without: Sequence[int]
) -> None:
    """Print what was selected, what to doubt and the answers; write the files."""
    if unknown := sorted(set(without) - set(case.selection.ranks.tolist())):
        raise ValueError(f"--without names {_word_ranks(unknown)}, which is not among the patches that are kept.")
    less = replace(case, selection=case.selection.without(without)) if without else None
    print(case.summary)
    for doubt in filter(None, (case.bag.note, *case.doubts)):
        print(doubt)
    case.write(out, names=("selection.json", "patches.csv", "patches.geojson"))  # whatever happens to the answers
    if isinstance(reader, PictureReader):
        print(f"Read by {reader.name}, from pictures of the patches. {reader.sends}".strip())
    answers, failure = [], None
    try:
        for text, options in questions:
            answers.append(_put(case, reader, text, options, evidence))
            if less is not None:
                again = _put(less, reader, text, options, False, _word_cost(less, reader, without))
                named = f"without {_word_ranks(without)}"
                answers.append(replace(again, question=f"{text} ({named})", beside=f"the kept patches {named}"))
    except ReaderError as error:  # what was answered before is written
        failure = error
    print(f"\n{' '.join(filter(None, [word_contradictions(answers), case.notice]))}")
    written = case.write(out, answers, (*FILES, *([ANNOTATIONS] if any(map(can_annotate, case.slides)) else [])))
    print(f"Wrote {', '.join(written[:-1])} and {written[-1]} to {out}.")
    if failure is not None:
        raise failure


def _word_ranks(ranks: Sequence[int]) -> str:
    return ", ".join(f"#{rank}" for rank in ranks)


def _word_cost(less: Case, reader: Reader | PictureReader, without: Sequence[int]) -> str:
    """What asking once more without some patches takes, to be told before."""
    cost = f"Asked again without {_word_ranks(without)}"
    if not isinstance(reader, PictureReader):
        return f"{cost}:"
    shown = less.pictures.patches
    places = sorted(range(len(shown)), key=lambda place: less.pictures.ranks[place])[: reader.images_per_call]
    size = sum(len(encode_jpeg(shown[place])) for place in places) / 1e6
    return f"{cost} (one more request, {len(places)} pictures, {size:.1f} MB):"


def _put(
    case: Case,
    reader: Reader | PictureReader,
    question: str,
    options: Sequence[str],
    evidence: bool,
    again: str = "",
) -> Answer:
    """Put one question; prints the answer as it comes, the options' probabilities and which patches it rests on.

    again: what is printed in place of the question
    """
    print(f"\n{again or f'Q: {question}'}\nA: ", end="", flush=True)
    pieces, messages = [], [{"role": "user", "content": question}]
    at_once = not (options or evidence)  # nothing is told before it is judged
    for piece in case.answer(reader, messages, options):
        pieces.append(piece)
        if at_once:
            print(case.continue_answer(reader, messages, pieces), end="", flush=True)
    answer = case.measure(reader, messages, "".join(pieces), options, evidence=evidence)
    print("" if at_once else word_answer(answer, case.limits))
    first = [answer.limit] if answer.unvalidated else []
    for sentence in filter(None, (*first, "" if answer.probs else word_tendency(answer, case.limits))):
        print(sentence)
    for option, prob in zip(answer.options, answer.probs):
        print(f"   {prob:6.1%}  {option}")
    rest = [answer.dependence, answer.evidence, answer.citation]
    for sentence in filter(None, rest if answer.unvalidated else [answer.limit, *rest]):
        print(sentence)
    return answer


def _holds_features(path: Path) -> bool:
    return path.suffix.lower() in FEATURE_SUFFIXES


def _check_slide(path: Path, slide_mpp: float | None, record: Record | None) -> None:
    """Refuse what is no slide, states no resolution, or is not the record's slide. Features are looked at later."""
    if not _holds_features(path) or not path.is_file():
        with open_slide(path, slide_mpp=slide_mpp) as slide:
            slide.require_mpp()
            if record is not None:
                record.check_names(slide=slide.name)


def _load_model(folder_or_repo: str) -> Model:
    """The model; whatever keeps it from loading is a ValueError."""
    from sparsewsi.model.sparse_wsi import SparseWSI  # takes seconds, which a wrong argument need not wait for

    try:
        return SparseWSI.from_pretrained(folder_or_repo)
    except (RuntimeError, OSError) as error:  # not on the hub, no network and not in the cache
        raise ValueError(str(error)) from error


def _make_phantom() -> Path:
    """The bundled example, generated when it is first asked for."""
    if sys.stderr.isatty():
        print("Opening the phantom; it is generated on first use, which takes a little while.", file=sys.stderr)
    return example_slide()


def _read_bag(path: Path, config: SparseWSIConfig, slide_mpp: float | None, max_patches: int | None) -> Bag:
    """The features of a slide, or of a feature file; shows a progress bar while it encodes."""
    if _holds_features(path):
        return load_bag(path, slide_mpp=slide_mpp)
    with open_slide(path, slide_mpp=slide_mpp) as slide:
        for doubt in filter(None, (*slide.warnings, slide.check_mpp(config.mpp))):
            warnings.warn(doubt, stacklevel=1)
    with tqdm(desc="Encoding patches", unit=" patches", leave=False, disable=None) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return extract_bag(
            path,
            config.encoder,
            mpp=config.mpp,
            patch_size=config.patch_size,
            slide_mpp=slide_mpp,
            max_patches=max_patches,
            progress=show,
        )
