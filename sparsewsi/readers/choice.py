"""Which reader is wanted, as a command line and the environment say it; nothing is loaded until open_reader."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field

from sparsewsi.readers.pictures import PictureReader, ReaderError

KINDS = "hf:<id or folder> or openai:<model>"


@dataclass(frozen=True)
class ReaderChoice:
    """A reader of pictures by name. Raises ReaderError for one that cannot be.

    name:            hf:<hub id or folder> | openai:<model of the server>
    endpoint, key:   of an OpenAI-compatible server; no host is assumed, so that nothing is sent anywhere by mistake
    images_per_call: at most so many patches are shown, the best first; None: all
    overview:        show the whole slide, too
    """

    name: str
    endpoint: str | None = None
    key: str | None = field(default=None, repr=False)
    images_per_call: int | None = None
    overview: bool = False

    def __post_init__(self) -> None:
        kind, colon, what = self.name.partition(":")
        if kind not in ("hf", "openai") or not colon or not what.strip():
            raise ReaderError(f"--reader is {KINDS}, got {self.name!r}.")
        if kind == "openai" and not self.endpoint:
            raise ReaderError(
                f"{self.name} needs a server: set SPARSEWSI_ENDPOINT to its base URL, as in http://127.0.0.1:8000/v1 "
                "or https://api.openai.com/v1 (patches are then sent there as pictures)."
            )
        if self.images_per_call is not None and self.images_per_call < 1:
            raise ReaderError(f"--reader-images must be at least 1, got {self.images_per_call}.")
        if kind == "openai":
            from sparsewsi.readers.server import check_endpoint, check_key  # httpx, which nobody else waits for

            check_endpoint(self.endpoint or "")
            check_key(self.key or "none")


def add_reader_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that choose a reader."""
    add = parser.add_argument
    add("--reader", metavar="READER", help=f"who reads the patches, as pictures: {KINDS}; default: the model's own LLM")
    add("--reader-images", type=int, metavar="N", help="show the reader only the N best patches")
    add("--reader-overview", action="store_true", help="show the reader an overview of the whole slide, too")


def choose_reader(given: argparse.Namespace, environ: Mapping[str, str]) -> ReaderChoice | None:
    """What add_reader_flags' flags say; takes them out of `given`. None: the model's own LLM reads.

    environ: SPARSEWSI_ENDPOINT and OPENAI_API_KEY are read from it. Raises ReaderError.
    """
    name, images, overview = (vars(given).pop(f"reader{part}") for part in ("", "_images", "_overview"))
    if name is None:
        if images is not None or overview:
            raise ReaderError("--reader-images and --reader-overview belong to a --reader, and there is none.")
        return None
    return ReaderChoice(name, environ.get("SPARSEWSI_ENDPOINT"), environ.get("OPENAI_API_KEY"), images, overview)


def open_reader(choice: ReaderChoice, count: bool = False) -> PictureReader:
    """Load the reader; minutes for a local model that must be fetched. Raises ReaderError.

    count: ask a server to count tokens
    """
    kind, _, what = choice.name.partition(":")
    if kind == "hf":
        from sparsewsi.readers.local import load_reader

        return load_reader(what, choice.images_per_call, choice.overview)
    from sparsewsi.readers.server import ServerReader

    assert choice.endpoint is not None, "ReaderChoice refuses one without"
    return ServerReader(what, choice.endpoint, choice.key, choice.images_per_call, choice.overview, count=count)
