"""Ask a whole-slide image, from the patches that matter.

    sparsewsi ask SLIDE          answer questions about a slide, write what was selected (SLIDE alone is short for this)
    sparsewsi extract SLIDES     encode many slides, resumable
    sparsewsi app                serve the page and its API
    sparsewsi doctor             what is installed, which weights are at hand, what this machine can run
    sparsewsi serve [SLIDES]     answer OpenAI's chat completions about slides, for harnesses and chat clients

`sparsewsi COMMAND --help` says more. `python -m sparsewsi` does the same as `sparsewsi`.
Exit status 0, or 2 with one sentence on stderr when the input is at fault.
"""

import argparse
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparsewsi.files import allow_any_text
from sparsewsi.model.config import DEFAULT_MODEL
from sparsewsi.readers.choice import add_reader_flags, choose_reader


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ValueError(f"{message[0].upper()}{message[1:]} (see sparsewsi ask --help).")


class _Question(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None) -> None:
        namespace.questions = [*namespace.questions, (values, [])]


class _Option(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None) -> None:
        if not namespace.questions:
            parser.error("--option belongs to the --question before it, and there is none")
        namespace.questions[-1][1].append(values)


def _read_ranks(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"#?\d+(\s*,\s*#?\d+)*", text.strip()):
        raise argparse.ArgumentTypeError(f"numbers of patches with commas between, as 3,5; got {text}")
    return tuple(int(number) for number in re.findall(r"\d+", text))


def parse_ask(words: Sequence[str]) -> dict[str, Any]:
    """The arguments of report.ask.ask, checked. Raises ValueError with one sentence."""
    parser = _Parser(
        prog="sparsewsi ask",
        description="Answer questions about a slide from a few patches of it, and write report.html, patches.csv, "
        "patches.geojson (for QuPath), selection.json and two pictures.",
    )
    add = parser.add_argument
    several = "a slide, a file of features, or the word: phantom; several are one case, in which patches are chosen"
    add("slides", metavar="SLIDE", nargs="+", help=several)
    model = os.environ.get("SPARSEWSI_MODEL") or str(DEFAULT_MODEL)
    add("--model", default=model, metavar="DIR", help="folder or repository (owner/name); default: the demo model")
    add("--question", action=_Question, dest="questions", default=[], help="repeat it; default: Describe this slide.")
    add("--option", action=_Option, default=argparse.SUPPRESS, help="an answer offered to the question before it")
    add("--k", type=int, help="patches to select (default: the model's, 32)")
    add(
        "--selector",
        default="learned",
        help="learned, question (nearest to its words, too), or a training-free one, as random",
    )
    add("--slide-mpp", type=float, help="um/px of the scan, for slides that do not state it")
    add("--max-patches", type=int, metavar="N", help="encode at most N patches, evenly spaced")
    add("--evidence", action="store_true", help="measure which patches each answer rests on (seconds)")
    add("--without", metavar="N,N", type=_read_ranks, default=(), help="ask again without these patches, by number")
    add("--replay", type=Path, metavar="FILE", help="a selection.json: its patches, and its questions if none is given")
    add_reader_flags(parser)
    add("--out", type=Path, metavar="DIR", help="default: out/<name of the slide>")
    given = parser.parse_args(words)
    given.reader = choose_reader(given, os.environ)
    for name in ("k", "max_patches"):
        number = getattr(given, name)
        if number is not None and number < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {number}.")
    if given.replay is not None and (given.k or given.max_patches or given.selector != "learned"):
        raise ValueError("--replay takes the patches that were selected; leave out --k, --selector and --max-patches.")
    if given.out is not None and given.out.exists() and not given.out.is_dir():
        raise ValueError(f"--out names a folder, but {given.out} is a file; name another.")
    if not Path(given.model).is_dir() and given.model.count("/") != 1:
        raise ValueError(f"There is no model folder {given.model}; pass --model a folder or a hub id (owner/name).")
    return vars(given)


def run_ask(words: Sequence[str]) -> int:
    """The command ask; returns the exit status."""
    try:
        given = parse_ask(words)
        from sparsewsi.report.ask import ask

        with _print_warnings():
            ask(**given)
    except (ValueError, OSError) as error:
        print(_word_error(error), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    return 0


def run_extract(words: Sequence[str]) -> int:
    """The command extract; returns the exit status."""
    from sparsewsi.cohort.run import main as extract

    return extract(list(words))


def run_doctor(words: Sequence[str]) -> int:
    """The command doctor; returns the exit status."""
    from sparsewsi.doctor import main as doctor

    return doctor(words)


def run_app(words: Sequence[str]) -> int:
    """The command app; returns the exit status."""
    try:
        from sparsewsi.web.serve import main as serve
    except ImportError as error:  # where a SOCKS proxy is set, Gradio's HTTP client needs a package of its own
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    return serve(words)


def run_serve(words: Sequence[str]) -> int:
    """The command serve; returns the exit status."""
    from sparsewsi.web.completions import main as serve

    return serve(words)


@contextmanager
def _print_warnings() -> Iterator[None]:
    """Print our own warnings as notes for people, without the line of code that gave them; leave others' out."""

    def show(message: Warning | str, category: type[Warning], filename: str, *_args: Any) -> None:
        if Path(__file__).parent in Path(filename).parents:
            print(f"Note: {_word_flags(str(message))}")

    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = show
        yield


def _word_error(error: Exception) -> str:
    """What went wrong, on one line, in the words of the command line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}." if error.filename else f"{error.strerror}."
    text = _word_flags(" ".join(str(error).split()))
    return text[:1].upper() + text[1:] if text.split(" ")[0].isalpha() else text  # a file's name stays as it is


def _word_flags(text: str) -> str:
    """Arguments of Python as flags: slide_mpp=0.5 -> --slide-mpp 0.5"""
    return re.sub(r"slide_mpp=(?=(\d?))", lambda found: "--slide-mpp " if found[1] else "--slide-mpp", text)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `sparsewsi` and of `python -m sparsewsi`; returns the exit status."""
    allow_any_text()
    words = list(sys.argv[1:] if argv is None else argv)
    command = words[0] if words else ""
    if command in ("-h", "--help"):
        print((__doc__ or "").strip())
        return 0
    if command == "extract":
        return run_extract(words[1:])
    if command == "app":
        return run_app(words[1:])
    if command == "doctor":
        return run_doctor(words[1:])
    if command == "serve":
        return run_serve(words[1:])
    return run_ask(words[1:] if command == "ask" else words)


if __name__ == "__main__":
    sys.exit(main())
