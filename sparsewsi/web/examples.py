"""Slides that the page offers: a phantom, generated on first use, and one real slide, fetched on first use.

Both are kept in the cache folder. An address of the page may name them, and nothing else.
"""

import hashlib
import urllib.request
from pathlib import Path

from sparsewsi import phantom
from sparsewsi.files import cache_folder, digest, write_bytes

EXAMPLES = ("phantom", "cmu-1")
SAMPLE_URL = "https://openslide.cs.cmu.edu/download/openslide-testdata/Aperio/CMU-1-Small-Region.svs"
SAMPLE_SHA256 = "ed92d5a9f2e86df67640d6f92ce3e231419ce127131697fbbce42ad5e002c8a7"
SAMPLE_BYTES = 1_938_955


def open_example(name: str) -> Path:
    """The path of one of EXAMPLES, made or fetched if it is not there. Raises ValueError if it cannot be fetched."""
    assert name in EXAMPLES
    return phantom.example_slide(cache_folder()) if name == "phantom" else fetch_sample(cache_folder())


def name_example(path: str | Path) -> str:
    """Which of EXAMPLES a slide is: a file in the cache folder; "" for any other slide."""
    if Path(path).parent != cache_folder():
        return ""
    return "phantom" if phantom.truth_path(path).is_file() else "cmu-1"


def fetch_sample(
    folder: Path, url: str = SAMPLE_URL, sha256: str = SAMPLE_SHA256, most: int = 2 * SAMPLE_BYTES, timeout: float = 20
) -> Path:
    """OpenSlide's CMU-1-Small-Region.svs (CC0), fetched once into a folder, checked and kept there.

    Raises ValueError with one sentence when it cannot be had, or is not the file it should be.
    """
    path = folder / "CMU-1-Small-Region.svs"
    if path.is_file() and digest(path) == sha256:
        return path
    try:
        with urllib.request.urlopen(url, timeout=timeout) as answer:
            data = answer.read(most)
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise ValueError(f"OpenSlide's sample slide could not be fetched from this machine ({reason}).") from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError("Another file came in place of OpenSlide's sample slide, so it was thrown away.")
    write_bytes(path, data)
    return path
