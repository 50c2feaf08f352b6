"""What the commands of train/ share: flags with one meaning everywhere, and errors told in a sentence."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from sparsewsi.files import allow_any_text
from sparsewsi.model.config import Unavailable
from train.data.layout import LEAST_PATCHES


def run_command(main: Callable[[], object]) -> None:
    """Run a command. A fault of its input ends it with one sentence and exit status 2, without a traceback."""
    allow_any_text()
    try:
        main()
    except (ValueError, OSError, Unavailable, SafetensorError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def mosaic_size(text: str) -> int:
    """N of a mosaic from the command line. Raises argparse.ArgumentTypeError for less than LEAST_PATCHES."""
    if not text.isdecimal() or int(text) < LEAST_PATCHES:
        raise argparse.ArgumentTypeError(f"a mosaic has {LEAST_PATCHES} patches or more, got {text}")
    return int(text)


SHARED: dict[str, dict[str, Any]] = {
    "--model": {"type": Path, "default": Path("assets/demo-model"), "help": "model folder"},
    "--bank": {"type": Path, "help": "feature bank of python -m train.data.mosaic bank"},
    "--banks": {"nargs": "+", "default": [], "help": "feature banks of python -m train.data.mosaic bank"},
    "--split": {"default": "test", "help": "train, val or test"},
    "--n": {"type": mosaic_size, "default": 1024, "help": "patches of a mosaic"},
    "--needles": {"type": int, "nargs": 2, "default": [4, 12], "help": "fewest and most patches of a focus"},
    "--questions": {"type": int, "default": 400, "help": "number of questions, one mosaic each"},
    "--seed": {"type": int, "default": 0, "help": "of the questions"},
    "--tables": {"action": "store_true", "help": "train and ask nothing, print the tables of the answers in --out"},
    "--out": {"type": Path, "required": True},
}


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help shows a module's docstring as it is written."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_flag(parser: argparse.ArgumentParser, name: str, **changes: Any) -> None:
    """Add a flag of SHARED, with what this command changes of it."""
    parser.add_argument(name, **SHARED[name] | changes)
