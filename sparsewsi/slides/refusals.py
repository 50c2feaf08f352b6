"""Why a file is not read, in one sentence for people.

No sentence holds a path or a file name: whoever asked knows what was asked for, and a log or a shared page does not
learn it.
"""

import re
import struct

CONVERT = "convert it to a pyramidal TIFF, e.g. vips tiffsave IN OUT.tiff --tile --pyramid --compression jpeg"
DAMAGED = "Reading the slide failed{}; the file is damaged or cut short, copy it again."
DAMAGED_IMAGE = "The PNG or JPEG is damaged or cut short; copy it again."
DAMAGED_JPEG = (
    "The JPEG's data are damaged: from some place on it would show other px than it held; copy it again, or, if a "
    "viewer shows it whole, save it anew as PNG."
)
# Of scanners whose files nothing here reads: as slides they are named and refused all the same.
UNREAD_SUFFIXES = (".isyntax", ".i2syntax", ".vsi", ".kfb", ".sdpc", ".tmap", ".mds", ".mdsx", ".lif")
LONGEST_REASON = 200  # characters; what is longer quotes the file's own text


class SlideError(ValueError):
    """A slide that cannot be opened, read or used as asked; the message is one sentence for people."""


def explain_unsupported(head: bytes, tail: bytes, length: int, suffix: str) -> str:
    """The sentence for a file that OpenSlide does not know.

    head, tail: its first and last MB; length: of the file, bytes; suffix: of its name, lower case
    """
    if suffix in UNREAD_SUFFIXES:
        return f"OpenSlide does not read {suffix} files; export a pyramidal TIFF from the scanner's own program."
    first_ifd = _first_ifd(head)
    if first_ifd is not None:
        if first_ifd >= length:
            return "The TIFF is cut short: its directory lies beyond the end of the file; copy or download it again."
        if b"openmicroscopy.org/Schemas/OME" in head or b"openmicroscopy.org/Schemas/OME" in tail:
            return f"This OME-TIFF is not one that OpenSlide opens; {CONVERT}."
        return f"This TIFF is cut short, or not a tiled TIFF that OpenSlide opens; copy it again, or {CONVERT}."
    if suffix == ".mrxs":
        return "An MRXS slide needs its data folder, of the same name, beside the .mrxs file; copy both."
    if head[128:132] == b"DICM":
        return "This DICOM file is not a whole-slide microscopy image, or parts of it are missing."
    if not head.strip(b"\0"):
        return "The file holds only zeros; copy or download the slide again."
    if _is_text(head[:4096]):
        return (
            "The file holds text, not an image (a web page or a pointer saved in its place?); download the slide again."
        )
    return "The file is not a slide: neither a format that OpenSlide reads, nor PNG, nor JPEG."


def quote_reason(error: str) -> str:
    """': the reason' in OpenSlide's words, or '' where they may hold a path or a file name, or are no sentence."""
    error = " ".join(error.split()).rstrip(".")
    if len(error) > LONGEST_REASON or not error.isprintable():
        return ""
    return "" if not error or re.search(r"[\\/]|\w\.[A-Za-z]\w", error) else f": {error}"


def _first_ifd(head: bytes) -> int | None:
    """Offset of the first directory of a TIFF or BigTIFF; None if it is neither."""
    order = {b"II": "<", b"MM": ">"}.get(head[:2])
    if order is None or len(head) < 16:
        return None
    (version,) = struct.unpack_from(order + "H", head, 2)
    if version == 42:
        return struct.unpack_from(order + "I", head, 4)[0]
    return struct.unpack_from(order + "Q", head, 8)[0] if version == 43 else None


def _is_text(head: bytes) -> bool:
    return all(byte >= 32 or byte in b"\t\n\r\f" for byte in head)
