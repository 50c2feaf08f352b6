"""Open a whole-slide image and read any region of it at any resolution.

Frames and units used here and in tissue.py:
    level 0   px of the finest level, origin at the top-left corner of the slide; written xy_level0
    level px  px of one level of the pyramid; level px * downsample = level-0 px
    mpp       um per px; read(..., mpp) returns px of exactly that size, whatever the levels are

Label and macro images are never opened: they may show a patient's name. For the same reason no message and no
Slide.name holds a path or a file name: the caller knows what was asked for, and a log or a shared page does not learn
it.
"""

import hashlib
import io
import json
import math
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

from sparsewsi.files import as_path
from sparsewsi.slides.deepzoom import open_deep_zoom
from sparsewsi.slides.dicomweb import open_dicomweb
from sparsewsi.slides.find import find_dicom_file
from sparsewsi.slides.refusals import SlideError, explain_unsupported
from sparsewsi.slides.remote import ANY, Hosts, is_remote
from sparsewsi.slides.resize import resize
from sparsewsi.slides.resolution import PLAUSIBLE_MPP, explain_implausible, explain_too_coarse, find_resolution
from sparsewsi.slides.sources import BLOCK, Source, open_source, split
from sparsewsi.slides.tiff import empty

# Beyond this factor a patch would show an encoder blur that no microscope at that resolution shows.
MAX_UPSAMPLING = 2.0

NOT_THERE = "There is no file at the path given; check how it is written."


class Slide:
    """One open slide; a context manager. Threads may share it; it cannot be pickled or copied (it holds an open file).

    name               shown to people: "phantom 7" or "slide 1a2b3c4d", never a path or a file name
    size               (W, H), level-0 px
    mpp                um per level-0 px, None if the slide states none (see require_mpp)
    mpp_source         "argument" | "openslide" | "ome" | "tiff resolution" | "objective power" | None
    vendor             OpenSlide's name of the format, or "png" / "jpeg"
    level_sizes        (w, h) of every level, finest first
    level_downsamples  level-0 px per level px of every level
    bounds             (x, y, w, h), level-0 px: the part that was scanned
    phantom_seed       seed of the phantom generator that wrote the slide, None for a real slide
    warnings           sentences about doubtful levels and metadata
    doubt              the one of them that says that mpp itself may be wrong, "" if nothing speaks against it
    cache              what others have found out about the px of this slide, by their own keys
    """

    def __init__(self, source: Source, *, name: str, slide_mpp: float | None = None, phantom_seed: int | None = None):
        self._source = source
        self._closed = False
        self.name = name
        self.phantom_seed = phantom_seed
        self.vendor = source.vendor
        self.level_sizes = source.level_sizes
        self.level_downsamples = source.level_downsamples
        self.size = source.level_sizes[0]
        self.bounds = _bounds(source.properties, self.size)
        self._resolution = find_resolution(source.properties, source.vendor, self.size, slide_mpp)
        self.mpp, self.mpp_source = self._resolution.mpp, self._resolution.source
        self.doubt = self._resolution.doubt
        self.warnings = (*source.doubts, *self._resolution.notes)
        self.cache: dict[str, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Slide {self.name!r} {self.size[0]} x {self.size[1]} px, mpp {self.mpp}>"

    def __reduce__(self):
        raise TypeError("A Slide holds an open file and is not copied or pickled; open_slide() it where it is needed.")

    def close(self) -> None:
        """Close the file. No other thread may be reading."""
        if not self._closed:
            self._closed = True
            self._source.close()

    @property
    def closed(self) -> bool:
        """Whether nothing more can be read."""
        return self._closed

    def require_mpp(self) -> float:
        """um per level-0 px. Raises SlideError, naming the remedy, if the slide states none."""
        if self.mpp is None:
            raise SlideError(self._resolution.problem)
        return self.mpp

    def check_mpp(self, mpp: float) -> str | None:
        """Can this slide be read at mpp um/px? None if so, a sentence to show if it must be enlarged (up to 2 times).

        Raises SlideError if it states no resolution or would have to be enlarged more than 2 times.
        """
        own = self.require_mpp()
        if not (math.isfinite(mpp) and mpp > 0):
            raise SlideError(f"The resolution to read at must be a positive number of µm/px, got {mpp}.")
        factor = own / mpp
        if factor > MAX_UPSAMPLING * (1 + 1e-6):
            raise SlideError(explain_too_coarse(self._resolution, mpp, MAX_UPSAMPLING))
        if factor > 1.02:
            return (
                f"The slide is {own:.4g} µm/px and is enlarged {factor:.2g} times to {mpp:.4g} µm/px, "
                "so patches look blurred to the encoder."
            )
        return None

    def read(self, xy_level0: tuple[float, float], size: tuple[int, int], mpp: float) -> np.ndarray:
        """The region of size = (w, h) px at mpp um/px whose top-left corner is xy_level0.

        Returns uint8 (h, w, 3), resized by area from the nearest finer level; white beyond the slide and where it holds
        nothing. Raises SlideError if the slide states no resolution or cannot be read.
        """
        return self.read_scaled(xy_level0, size, mpp / self.require_mpp())

    def read_scaled(self, xy_level0: tuple[float, float], size: tuple[int, int], downsample: float) -> np.ndarray:
        """read() with the resolution given as level-0 px per px, for slides that state no mpp."""
        return self._read_scaled(xy_level0, size, downsample, None)

    def _read_scaled(
        self, xy_level0: tuple[float, float], size: tuple[int, int], downsample: float, out: np.ndarray | None
    ) -> np.ndarray:
        """out: where the px may go; it is returned if they went there."""
        width, height = size
        if width < 1 or height < 1 or not (math.isfinite(downsample) and downsample > 0):
            raise SlideError(f"A region needs a positive size and scale, got {width} x {height} px at {downsample}.")
        level = self.level_for(downsample)
        ratio = downsample / self.level_downsamples[level]  # level px per px
        if abs(ratio - round(ratio)) * max(size) < 1e-3 and ratio > 0.5:
            ratio = float(round(ratio))  # 0.3 / 0.1 is 2.9999999999999996; the integer path is exact and faster
        x0, y0 = (v / self.level_downsamples[level] for v in xy_level0)
        block = tuple(max(1, int(side / max(ratio, 1))) for side in BLOCK)
        if ratio == 1 or (width <= block[0] and height <= block[1]):
            return self._read_block(level, (x0, y0), size, ratio, out)
        out = empty((height, width, 3)) if out is None else out
        for (left, top), part, here in split(size, block):
            out[here] = self._read_block(level, (x0 + left * ratio, y0 + top * ratio), part, ratio)
        return out

    def read_batch(
        self, corners: ArrayLike, size: tuple[int, int], mpp: float, out: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """read() at every corner of (B, 2), level-0 px: (uint8 (B, h, w, 3), which could be read: bool (B,)).

        out: where the pixels go. A patch in a damaged part of the file is never shown as something else.
        Raises SlideError if the slide states no resolution.
        """
        downsample = mpp / self.require_mpp()
        places = np.asarray(corners).tolist()
        pixels = empty((len(places), size[1], size[0], 3)) if out is None else out
        fine = np.zeros(len(places), bool)
        for i, (x, y) in enumerate(places):
            try:
                here = pixels[i]
                found = self._read_scaled((x, y), size, downsample, here)
                if found is not here:
                    here[:] = found
                fine[i] = True
            except SlideError:
                continue  # listed as unreadable through `fine`
        return pixels, fine

    def level_for(self, downsample: float) -> int:
        """The coarsest level that is no coarser than downsample (level-0 px per px); 0 if none is."""
        fitting = [i for i, d in enumerate(self.level_downsamples) if d <= downsample * (1 + 1e-3)]
        return max(fitting, key=lambda i: self.level_downsamples[i], default=0)

    def read_level(self, level: int, xy_level0: tuple[float, float], size: tuple[int, int]) -> np.ndarray:
        """The region of size = (w, h) px of one level, unscaled: uint8 (h, w, 3), white where there is nothing."""
        if not 0 <= level < len(self.level_sizes):
            raise SlideError(f"The slide has levels 0 to {len(self.level_sizes) - 1}, got {level}.")
        downsample = self.level_downsamples[level]
        return self._read_pixels(level, (round(xy_level0[0] / downsample), round(xy_level0[1] / downsample)), size)

    def read_jpeg(
        self, xy_level0: tuple[float, float], size: tuple[int, int], downsample: float, quality: int
    ) -> bytes:
        """read_scaled() as JPEG."""
        data = io.BytesIO()
        Image.fromarray(self.read_scaled(xy_level0, size, downsample)).save(data, "JPEG", quality=quality)
        return data.getvalue()

    def thumbnail(self, max_side: int = 1024) -> tuple[np.ndarray, float]:
        """The whole slide with its longer side at most max_side px, never enlarged.

        Returns (uint8 (h, w, 3), level-0 px per thumbnail px). Memory is bounded however large the coarsest level is.
        """
        scale = max(1.0, max(self.size) / max_side)
        # The tolerance keeps 2000.0000000000002 from becoming 2001 px.
        width, height = (max(1, math.ceil(side / scale - 1e-6)) for side in self.size)
        return self.read_scaled((0, 0), (width, height), scale), scale

    def _read_block(
        self,
        level: int,
        xy: tuple[float, float],
        size: tuple[int, int],
        ratio: float,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """size px of ratio level px each, from xy in level px: the region around it, resized."""
        margin = (
            3 if ratio < 1 else 0
        )  # bicubic enlargement looks at neighbours; without them patches would show a frame
        x0, y0 = (math.floor(v + 1e-6) - margin for v in xy)
        x1, y1 = (math.ceil(v + n * ratio - 1e-6) + margin for v, n in zip(xy, size))
        if ratio == 1 and (x1 - x0, y1 - y0) == size:
            return self._read_pixels(level, (x0, y0), size, out)
        pixels = self._read_pixels(level, (x0, y0), (x1 - x0, y1 - y0))
        left, top = xy[0] - x0, xy[1] - y0
        return resize(pixels, (left, top, left + size[0] * ratio, top + size[1] * ratio), size)

    def _read_pixels(
        self, level: int, xy: tuple[int, int], size: tuple[int, int], out: np.ndarray | None = None
    ) -> np.ndarray:
        if self._closed:
            raise SlideError("The slide has been closed.")
        return self._source.read(level, xy, size, out)


def open_slide(path: str | Path, *, slide_mpp: float | None = None, hosts: Hosts = ANY) -> Slide:
    """Open a slide: what OpenSlide reads (a DICOM slide as its folder or one of its files), Deep Zoom, PNG or JPEG.

    path:      as it may be pasted, in quotes or as a file:// URL too; of a .dzi also its http(s) address; of a slide
               on a DICOMweb server dicomweb:<base URL>?study=<UID>&series=<UID>
    slide_mpp: um per level-0 px; wins over what the slide states, and is needed to work with a PNG or JPEG
    hosts:     which servers may be asked
    Raises SlideError with one sentence for anything that is not a slide, is damaged or may not be read.
    """
    if slide_mpp is not None and not (math.isfinite(slide_mpp) and slide_mpp > 0):
        raise SlideError(f"slide_mpp must be a positive number of µm/px, e.g. 0.25 for a 40x scan, got {slide_mpp}.")
    if slide_mpp is not None and not PLAUSIBLE_MPP[0] <= slide_mpp <= PLAUSIBLE_MPP[1]:
        raise SlideError(explain_implausible(slide_mpp))
    if not str(path).strip(" \t\n\"'`\u201c\u201d\u2018\u2019"):
        raise SlideError("No slide was given; pass the path of one.")
    found = open_dicomweb(path, hosts) or open_deep_zoom(path, hosts)
    if found is not None:
        source, head = found
        return Slide(source, name=f"slide {hashlib.sha256(head).hexdigest()[:8]}", slide_mpp=slide_mpp)
    if is_remote(path):
        raise SlideError("The address leads to no slide that is read over the network: a .dzi, or a dicomweb: series.")
    file, head, tail, length = _look_at(as_path(path))
    source = open_source(file, head)
    if source is None:
        raise SlideError(explain_unsupported(head, tail, length, file.suffix.lower()))
    seed = _phantom_seed(source.properties)
    name = f"phantom {seed}" if seed is not None else f"slide {_digest(length, head, source)}"
    return Slide(source, name=name, slide_mpp=slide_mpp, phantom_seed=seed)


def _look_at(file: Path) -> tuple[Path, bytes, bytes, int]:
    """(the file to open, its first MB, its last MB, its length). Raises SlideError if it cannot be read."""
    try:
        if file.is_dir():
            file = find_dicom_file(file)
        if not file.exists():
            raise SlideError(NOT_THERE)
        if not file.is_file():
            raise SlideError("The path given is neither a file nor a DICOM folder.")
        length = file.stat().st_size
        with file.open("rb") as stream:
            head = stream.read(1 << 20)
            stream.seek(max(0, length - (1 << 20)))
            tail = stream.read()
    except PermissionError:
        raise SlideError("The slide may not be read: this user lacks the permission.") from None
    except SlideError:
        raise
    except (OSError, ValueError):  # a name too long, a null byte, a disk that fails
        raise SlideError("The path given cannot be read; check how it is written and that its disk is there.") from None
    if not head:
        raise SlideError("The file is empty; copy or download the slide again.")
    return file, head, tail, length


# ---- what the slide says about itself ----


def _bounds(properties: dict[str, str], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """(x, y, w, h) of the scanned part, level-0 px: openslide.bounds-* cut to the slide, or all of it."""
    try:
        x, y, w, h = (int(properties[f"openslide.bounds-{key}"]) for key in ("x", "y", "width", "height"))
    except (KeyError, ValueError):
        return 0, 0, *size
    left, top = max(0, x), max(0, y)
    right, bottom = min(size[0], x + w), min(size[1], y + h)
    return (left, top, right - left, bottom - top) if right > left and bottom > top else (0, 0, *size)


def _phantom_seed(properties: dict[str, str]) -> int | None:
    """Seed written by sparsewsi.phantom into the TIFF ImageDescription, {"sparsewsi_phantom": {"seed": 7, ...}}."""
    text = properties.get("tiff.ImageDescription") or properties.get("openslide.comment") or ""
    if '"sparsewsi_phantom"' not in text:
        return None
    try:
        seed = json.loads(text)["sparsewsi_phantom"]["seed"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return seed if isinstance(seed, int) else None


def _digest(length: int, head: bytes, source: Source) -> str:
    """8 hex digits that tell slides apart without naming them."""
    content = hashlib.sha256(length.to_bytes(8, "little") + head)
    if source.vendor in ("dicom", "mirax"):  # many files: the name must not depend on which one was given
        content = hashlib.sha256(source.properties.get("openslide.quickhash-1", "").encode() or content.digest())
    return content.hexdigest()[:8]
