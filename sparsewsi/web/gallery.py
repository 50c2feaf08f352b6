"""The gallery: public slides that the page offers, with what is published of them. They lie on their own servers."""

import tomllib
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

from sparsewsi.slides.remote import OPEN, find_address
from sparsewsi.slides.resolution import PLAUSIBLE_MPP

GALLERY = Path(__file__).with_name("gallery.toml")
RESOLUTIONS = ("estimated", "published")


@dataclass(frozen=True)
class Sample:
    """A slide of the gallery; gallery.toml says what its fields are. source, licence: to be shown with it"""

    name: str
    organ: str
    diagnosis: str
    address: str
    mpp: float
    resolution: str
    seen: bool
    teaches: str
    source: str
    licence: str

    @property
    def title(self) -> str:
        """What a button says: the organ, not the diagnosis, which one may want to find."""
        return f"{self.organ[:1].upper()}{self.organ[1:]}"

    @property
    def caption(self) -> str:
        """What stands beside the slide once it is open."""
        known = "no test of this model: it was trained on patches of this slide" if self.seen else "not trained on"
        return (
            f"Published diagnosis: {self.diagnosis} ({self.organ}); {known}. {self.teaches} "
            f"{self.mpp:g} µm/px, {self.resolution}. {self.source}; {self.licence}."
        )


@cache
def read_gallery(path: Path = GALLERY) -> tuple[Sample, ...]:
    """The slides of a gallery, in its order. Raises ValueError, in words, for one that a page could not offer."""
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name} is not TOML ({error}).") from None
    common = {name: given.get(name) for name in ("source", "licence")}
    rows = given.get("slide", [])
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path.name} holds no [[slide]].")
    samples = tuple(_read_sample(row, common, f"slide {number} of {path.name}") for number, row in enumerate(rows, 1))
    for what in ("name", "address"):
        found = [getattr(sample, what) for sample in samples]
        if twice := sorted({one for one in found if found.count(one) > 1}):
            raise ValueError(f"{path.name} has the {what} {twice[0]} twice.")
    return samples


def find_sample(what: str | Path) -> Sample | None:
    """The slide of the gallery with this name or address, also where a Path folded its slashes."""
    address = find_address(what) or ""
    return next((sample for sample in read_gallery() if str(what) == sample.name or address == sample.address), None)


def _read_sample(row: dict, common: dict, where: str) -> Sample:
    values = {**common, **row}
    kinds = {field.name: field.type for field in fields(Sample)}
    if set(values) != set(kinds):
        odd = min(set(values) ^ set(kinds))
        raise ValueError(f"{where} has no {odd}." if odd in kinds else f"{where} says {odd}, which is unknown.")
    for name, kind in kinds.items():
        value = values[name]
        fine = isinstance(value, kind) if isinstance(kind, type) else False
        if not fine or (isinstance(value, str) and not value.strip()):
            raise ValueError(f"{where} has {name} = {value!r}, which is no {getattr(kind, '__name__', kind)}.")
    sample = Sample(**values)
    if urlsplit(sample.address).hostname not in (OPEN.names or ()) or find_address(sample.address) != sample.address:
        raise ValueError(f"{where} lies on a server that a hosted page may not ask; add it to slides.remote.OPEN.")
    if not PLAUSIBLE_MPP[0] <= sample.mpp <= PLAUSIBLE_MPP[1]:
        raise ValueError(f"{where} has mpp = {sample.mpp}, which no slide has.")
    if sample.resolution not in RESOLUTIONS:
        raise ValueError(f"{where} has resolution = {sample.resolution!r}; it is {' or '.join(RESOLUTIONS)}.")
    return sample
