"""python -m sparsewsi SLIDE: select patches of a slide, answer questions from them, write what was selected.

With --replay selection.json: answer from the very patches that an earlier run selected, without scoring.

Exit status 0, or 2 with one sentence on stderr when the input is at fault.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsewsi.model.config import DEFAULT_MODEL, SparseWSIConfig

if TYPE_CHECKING:
    from sparsewsi.bags.bag import Bag
    from sparsewsi.model.sparse_wsi import SparseWSI
    from sparsewsi.report.answer import Answer
    from sparsewsi.report.case import Case
    from sparsewsi.report.record import Record

DEFAULT_QUESTION = "Describe this slide."
BAG_SUFFIXES = (".safetensors", ".h5", ".hdf5", ".pt", ".npy", ".csv")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ValueError(f"{message[0].upper()}{message[1:]} (see python -m sparsewsi --help).")


class _Ask(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None) -> None:
        namespace.questions = [*namespace.questions, (values, [])]


class _Offer(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None) -> None:
        if not namespace.questions:
            parser.error("--option belongs to the --question before it, and there is none")
        namespace.questions[-1][1].append(values)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and check the command line. Raises ValueError with one sentence."""
    parser = _Parser(prog="python -m sparsewsi", description="Answer questions about a slide from a few patches of it.")
    parser.add_argument("slide", metavar="SLIDE", help="a slide, a saved bag of features, or the word: phantom")
    parser.add_argument("--model", default=os.environ.get("SPARSEWSI_MODEL") or str(DEFAULT_MODEL), metavar="DIR")
    parser.add_argument("--question", action=_Ask, dest="questions", default=[], help=f"default: {DEFAULT_QUESTION}")
    parser.add_argument("--option", action=_Offer, help="a possible answer to the question before it; repeat it")
    parser.add_argument("--k", type=int, help="patches to select (default: the model's, 32)")
    parser.add_argument("--selector", default="learned", help="learned, or a training-free one such as random")
    parser.add_argument("--slide-mpp", type=float, help="um/px of the scan, for slides that do not state it")
    parser.add_argument("--max-patches", type=int, metavar="N", help="encode at most N patches, evenly spaced")
    parser.add_argument("--evidence", action="store_true", help="measure which patches each answer rests on (seconds)")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="a selection.json: its patches and its questions")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: out/<name of the slide>")
    options = parser.parse_args(argv)
    if options.k is not None and options.k < 1:
        raise ValueError(f"--k must be at least 1, got {options.k}.")
    if options.max_patches is not None and options.max_patches < 1:
        raise ValueError(f"--max-patches must be at least 1, got {options.max_patches}.")
    if options.replay is not None and (options.k or options.max_patches or options.selector != "learned"):
        raise ValueError("--replay takes the patches that were selected; leave out --k, --selector and --max-patches.")
    if options.out is not None and options.out.exists() and not options.out.is_dir():
        raise ValueError(f"--out names a folder, but {options.out} is a file; name another.")
    if not Path(options.model).is_dir() and options.model.count("/") != 1:
        raise ValueError(f"There is no model folder {options.model}; pass --model a folder or a hub id (owner/name).")
    return options


def load_model(folder: str) -> SparseWSI:
    """The model of a folder or a hub repository; whatever keeps it from loading is a ValueError."""
    from sparsewsi.model.sparse_wsi import SparseWSI

    try:
        return SparseWSI.from_pretrained(folder)
    except (RuntimeError, OSError) as error:  # not on the hub, no network and not in the cache
        raise ValueError(str(error)) from error


def read_bag(options: argparse.Namespace, slide: Path, config: SparseWSIConfig) -> Bag:
    """The features of a slide, or of a bag that was saved; shows a progress bar while it encodes."""
    from tqdm import tqdm

    from sparsewsi.bags.bag import extract_bag, load_bag
    from sparsewsi.slides.slide import open_slide

    if slide.suffix.lower() in BAG_SUFFIXES:
        return load_bag(slide, slide_mpp=options.slide_mpp)
    with open_slide(slide, slide_mpp=options.slide_mpp) as opened:
        for doubt in filter(None, (*opened.warnings, opened.check_mpp(config.mpp))):
            warnings.warn(doubt, stacklevel=1)
    with tqdm(desc="Encoding patches", unit=" patches", leave=False, disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return extract_bag(
            slide,
            config.encoder,
            mpp=config.mpp,
            patch_size=config.patch_size,
            slide_mpp=options.slide_mpp,
            max_patches=options.max_patches,
            progress=progress,
        )


def check_slide(options: argparse.Namespace, slide: Path, record: Record | None) -> None:
    """Refuse, before anything slow is loaded, what is no slide, states no resolution, or is not the record's slide."""
    from sparsewsi.slides.slide import open_slide

    if slide.suffix.lower() not in BAG_SUFFIXES or not slide.is_file():
        with open_slide(slide, slide_mpp=options.slide_mpp) as opened:
            opened.require_mpp()
            if record is not None:
                record.check_names(slide=opened.name)


def ask(case: Case, model: SparseWSI, question: str, options: list[str], evidence: bool) -> Answer:
    """Put one question; prints the answer as it comes, the options' probabilities and which patches it rests on."""
    print(f"\nQ: {question}\nA: ", end="", flush=True)
    pieces, messages = [], [{"role": "user", "content": question}]
    for piece in case.answer(model, messages, options):
        pieces.append(piece)
        print(piece, end="", flush=True)
    print()
    answer = case.measure(model, messages, "".join(pieces), options, evidence=evidence)
    for option, prob in zip(answer.options, answer.probs):
        print(f"   {prob:6.1%}  {option}")
    if answer.evidence:
        print(answer.evidence)
    return answer


def run(options: argparse.Namespace) -> None:
    """Do what the command line says. Raises ValueError or OSError for input at fault."""
    from sparsewsi.model.selector import SELECTORS
    from sparsewsi.report.case import open_case, replay_case

    if options.selector not in ("learned", *SELECTORS):
        raise ValueError(f"--selector is learned, {' or '.join(SELECTORS)}, got {options.selector}.")
    record = recall(options)
    if options.slide != "phantom":
        check_slide(options, Path(options.slide), record)
    if options.out is not None:  # a folder that cannot be made is found now, not after an hour of encoding
        options.out.mkdir(parents=True, exist_ok=True)
    model = load_model(options.model)
    if record is not None:
        record.check_names(encoder=model.config.encoder)
        if record.weights_sha256 != model.weights_sha256:
            warnings.warn("the model's weights are not the record's: same patches, other answers.", stacklevel=1)
    slide = phantom() if options.slide == "phantom" else Path(options.slide)
    bag = read_bag(options, slide, model.config)
    path = None if slide.suffix.lower() in BAG_SUFFIXES else slide
    if record is not None:
        case = replay_case(model, bag, record, path, slide_mpp=options.slide_mpp)
    else:
        given = {"k": options.k, "selector": options.selector, "max_patches": options.max_patches}
        case = open_case(model, bag, path, slide_mpp=options.slide_mpp, **given)
    report(options, case, model)


def recall(options: argparse.Namespace) -> Record | None:
    """The record that is to be replayed; what it was made with becomes what the command line says."""
    from sparsewsi.report.record import read_selection

    if options.replay is None:
        return None
    record = read_selection(options.replay)
    options.max_patches, options.selector = record.max_patches, record.selector
    options.slide_mpp = options.slide_mpp or record.slide_mpp
    options.questions = options.questions or [(text, list(given)) for text, given in record.questions]
    return record


def phantom() -> Path:
    """The bundled example, generated when it is first asked for."""
    from sparsewsi.phantom import example_slide

    if sys.stderr.isatty():
        print("Opening the phantom; it is generated on first use, which takes a little while.", file=sys.stderr)
    return example_slide()


def report(options: argparse.Namespace, case: Case, model: SparseWSI) -> None:
    """Print the answers, write the files."""
    print(case.summary)
    for line in filter(None, (case.bag.note, *case.doubts)):
        print(line)
    questions = options.questions or [(DEFAULT_QUESTION, [])]
    answers = [ask(case, model, question, given, options.evidence) for question, given in questions]
    print(f"\n{case.notice}")
    out = options.out or Path("out") / case.bag.slide.replace(" ", "-")
    case.write(out, answers)
    print(f"Wrote report.html, overlay.png, umap.png, patches.csv, patches.geojson and selection.json to {out}.")


@contextmanager
def _notes() -> Iterator[None]:
    """Print our own warnings as notes for people, without the line of code that gave them; leave others' out."""

    def show(message: Warning | str, category: type[Warning], filename: str, *_args: Any) -> None:
        if Path(filename).parent == Path(__file__).parent:
            print(f"Note: {message}")

    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = show
        yield


def _sentence(error: Exception) -> str:
    """What went wrong, on one line, in the words of the command line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}." if error.filename else f"{error.strerror}."
    text = " ".join(str(error).split()).replace("slide_mpp=", "--slide-mpp")
    return text[:1].upper() + text[1:] if text.split(" ")[0].isalpha() else text  # a file's name stays as it is


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    try:
        options = arguments(argv)
        with _notes():
            run(options)
    except (ValueError, OSError) as error:
        print(_sentence(error), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
