"""A slide on a DICOMweb server (the Imaging Data Commons, an archive), read by wsidicom: frames as they are needed.

Needs the packages of the extra [dicomweb]. Instances that show a label or the whole glass are never asked for their
px. Frames: level px throughout.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit, urlunsplit

import numpy as np

from sparsewsi.slides.refusals import DAMAGED, SlideError, quote_reason
from sparsewsi.slides.remote import ANY, UNREACHABLE, Hosts, Remote, find_address
from sparsewsi.slides.tile_cache import TileCache

if TYPE_CHECKING:
    from pydicom import Dataset
    from wsidicom.web import WsiDicomWebClient

CACHE_BYTES = 64 << 20  # of decoded frames
MOST_BYTES = 256 << 20  # of one answer: what is said of a sparse level of a large slide, or the frames of a region
AT_A_TIME = 64  # frames of one request, so that its address stays short
UID = re.compile(r"[0-9]+(\.[0-9]+)+")
NO_ADDRESS = (
    "The address of a DICOMweb slide is dicomweb:<base URL>?study=<UID>&series=<UID>; UIDs are digits and points."
)
NO_PACKAGES = "Slides on DICOMweb servers need the packages of an extra: pip install 'sparsewsi[dicomweb]'."


def open_dicomweb(path: str | Path, hosts: Hosts) -> tuple["DicomWebSource", bytes] | None:
    """The source and some bytes that tell it from others; None for what does not begin with dicomweb:.

    Raises SlideError if the address is none, its server may not be asked, or the series is no slide.
    """
    if not str(path).strip().strip("'\"").lower().startswith("dicomweb:"):
        return None
    base, study, series = parse_address(path)
    remote = Remote(hosts)
    try:
        return DicomWebSource(base, study, series, remote), f"{study} {series}".encode()
    except ImportError:
        remote.close()
        raise SlideError(NO_PACKAGES) from None
    except BaseException:
        remote.close()
        raise


def parse_address(path: str | Path) -> tuple[str, str, str]:
    """(base URL, study UID, series UID) of dicomweb:<base>?study=..&series=.. Raises SlideError."""
    parts = urlsplit(find_address(path, "dicomweb") or "")
    asked = parse_qs(parts.query)
    (study, *more), (series, *others) = asked.get("study", [""]), asked.get("series", [""])
    fine = all(UID.fullmatch(uid) and len(uid) <= 64 for uid in (study, series))
    if not parts.netloc or more or others or set(asked) != {"study", "series"} or not fine or parts.fragment:
        raise SlideError(NO_ADDRESS)
    return urlunsplit(parts._replace(query="")).rstrip("/"), study, series


def read_headers(path: str | Path, hosts: Hosts = ANY) -> list["Dataset"]:
    """What the server says of the levels of a slide, without px. Raises SlideError as open_dicomweb does."""
    base, study, series = parse_address(path)
    remote = Remote(hosts)
    try:
        with _sentences():
            client = _make_client(base, remote)
            found = client.get_wsi_instances(study, [series])  # type: ignore[arg-type]
            return [client.get_instance(study, one, instance) for one, instance, _ in found]  # type: ignore[arg-type]
    except ImportError:
        raise SlideError(NO_PACKAGES) from None
    finally:
        remote.close()


class DicomWebSource:
    """The levels of one series, of its largest pyramid. Threads may share it."""

    vendor = "dicom"

    def __init__(self, base: str, study: str, series: str, remote: Remote):
        from wsidicom import WsiDicom

        self._remote, self._tiles = remote, TileCache(CACHE_BYTES)
        with _sentences():
            slide = WsiDicom.open_web(_make_client(base, remote), study, series)
            slide.resize_cache(1)  # byte: wsidicom's own counts a frame twice that two threads read at once
            pyramid = max(slide.pyramids, key=lambda pyramid: pyramid.size.area)
            self._levels = sorted(pyramid.levels, key=lambda level: -level.size.width)
            bits = self._levels[0].default_instance.dataset.bits
            if bits > 8:
                raise SlideError(
                    f"The DICOM slide holds {bits} bits a channel, and 8 are read; it is no stained slide."
                )
            self.doubts = _say_left_out(self._levels[0])
        self.level_sizes = tuple(level.size.to_tuple() for level in self._levels)
        self.level_downsamples = tuple(_find_downsample(self.level_sizes[0], size) for size in self.level_sizes)
        self.properties = {"openslide.vendor": self.vendor, **_read_resolution(self._levels[0])}

    def read(self, level: int, xy: tuple[int, int], size: tuple[int, int], out: np.ndarray | None = None) -> np.ndarray:
        out = np.full((size[1], size[0], 3), 255, np.uint8)
        (width, height), side = self.level_sizes[level], self._levels[level].tile_size
        x0, y0 = max(0, xy[0]), max(0, xy[1])
        x1, y1 = min(width, xy[0] + size[0]), min(height, xy[1] + size[1])
        if x0 >= x1 or y0 >= y1:
            return out
        rows, columns = (
            range(y0 // side.height, (y1 - 1) // side.height + 1),
            range(x0 // side.width, (x1 - 1) // side.width + 1),
        )
        places = [(column, row) for row in rows for column in columns]
        for start in range(0, len(places), AT_A_TIME):
            part = places[start : start + AT_A_TIME]
            for (column, row), pixels in zip(part, self._find(level, part)):
                left, top = column * side.width, row * side.height
                a, b = max(x0, left), min(x1, left + side.width)
                c, d = max(y0, top), min(y1, top + side.height)
                out[c - xy[1] : d - xy[1], a - xy[0] : b - xy[0]] = pixels[c - top : d - top, a - left : b - left]
        return out

    def close(self) -> None:
        self._remote.close()
        self._tiles.clear()

    def _find(self, level: int, places: list[tuple[int, int]]) -> list[np.ndarray]:
        """Frames, uint8 (h, w, 3) each, from the cache or read; only whole ones are kept."""
        from wsidicom.geometry import Point

        found = {place: self._tiles.get((level, *place)) for place in places}
        missing = [place for place in places if found[place] is None]
        if missing:
            instance = self._levels[level].default_instance
            data, side = instance.image_data, self._levels[level].tile_size
            with _sentences():
                frames = data.get_decoded_tiles(
                    [Point(*place) for place in missing], instance.default_z, instance.default_path
                )
                for place, frame in zip(missing, frames, strict=True):
                    pixels = np.asarray(frame.convert("RGB"))
                    if pixels.shape != (side.height, side.width, 3):
                        raise SlideError(DAMAGED.format(": a frame has another size than its series says"))
                    found[place] = pixels
                    self._tiles.put((level, *place), pixels)
        return [pixels for pixels in found.values() if pixels is not None]


def _find_downsample(base: tuple[int, int], size: tuple[int, int]) -> float:
    """Level-0 px per px: a whole number where the sizes are those of one, rounded up or down."""
    ratio = max(base) / size[base.index(max(base))]
    whole = round(ratio)
    fits = all(side // whole <= part <= -(-side // whole) for side, part in zip(base, size))
    return float(whole) if fits else ratio


def _say_left_out(level: Any) -> tuple[str, ...]:
    """A sentence where a level holds more pictures than the one that is read."""
    counts = {"optical paths": len(level.optical_paths), "focal planes": len(level.focal_planes)}
    more = [f"{count} {what}" for what, count in counts.items() if count > 1]
    return (f"The DICOM slide holds {' and '.join(more)}; one is read.",) if more else ()


def _read_resolution(level: Any) -> dict[str, str]:
    """um/px and objective, as OpenSlide names them, where the series states them."""
    spacing, stated = level.pixel_spacing, {}
    if spacing is not None:
        stated = {
            "openslide.mpp-x": repr(float(spacing.width) * 1000),
            "openslide.mpp-y": repr(float(spacing.height) * 1000),
        }
    for path in getattr(level.default_instance.dataset, "OpticalPathSequence", []):
        if power := getattr(path, "ObjectiveLensPower", None):
            stated["openslide.objective-power"] = f"{float(power):g}"
    return stated


@contextmanager
def _sentences() -> Iterator[None]:
    """Whatever wsidicom, pydicom and dicomweb_client raise, as one sentence."""
    import requests

    try:
        yield
    except (SlideError, ImportError):
        raise
    except requests.HTTPError as error:
        status = "failed" if error.response is None else f"answered {error.response.status_code}"
        raise SlideError(UNREACHABLE.format(status)) from None
    except Exception as error:
        raise SlideError(f"The DICOMweb series is not a slide that can be read{quote_reason(str(error))}.") from None


# ---- what wsidicom asks with


def _make_client(base: str, remote: Remote) -> "WsiDicomWebClient":
    """wsidicom's client, which asks through `remote` and is told of the levels alone."""
    import requests
    from dicomweb_client.api import DICOMwebClient
    from pydicom import Dataset
    from requests.adapters import BaseAdapter
    from wsidicom.web import WsiDicomWebClient

    class Adapter(BaseAdapter):
        """requests, over Remote: its checks, its tries, its limits."""

        def send(self, request: requests.PreparedRequest, *_given: Any, **_named: Any) -> requests.Response:
            accept = {"Accept": str(request.headers["Accept"])} if "Accept" in request.headers else {}
            reply = remote.get(request.url or "", MOST_BYTES, accept)
            response = requests.Response()
            response.status_code, response.url, response.request = reply.status, request.url or "", request
            # The content was decoded when it came.
            response.headers.update({name: reply.headers[name] for name in ("content-type",) if name in reply.headers})
            response.raw = io.BytesIO(reply.content)
            return response

        def close(self) -> None:
            pass

    class Client(WsiDicomWebClient):
        def __init__(self, client: DICOMwebClient):
            super().__init__(client)
            self._known: dict[str, Dataset] = {}  # what the server said of the levels, by instance

        def get_wsi_instances(self, study_uid: Any, series_uids: Any) -> Iterator[tuple[Any, Any, Any]]:
            for series, instance, syntaxes in super().get_wsi_instances(study_uid, series_uids):
                told = self._client.retrieve_instance_metadata(study_uid, series, instance)
                dataset = Dataset.from_json(told, lambda *_: None)  # what is told apart, as colour profiles, is left
                # A label shows a name, the whole glass shows the label: their px are never asked for.
                if "VOLUME" in dataset.get("ImageType", ()):
                    self._known[instance] = dataset
                    yield series, instance, syntaxes

        def get_instance(self, study_uid: Any, series_uid: Any, instance_uid: Any) -> Dataset:
            return self._known.pop(instance_uid)

        def get_annotation_instances(self, study_uid: Any, series_uids: Any) -> Iterator[tuple[Any, Any, Any]]:
            return iter(())

    session = requests.Session()
    session.trust_env = False
    for scheme in ("http://", "https://"):
        session.mount(scheme, Adapter())
    client = DICOMwebClient(base, session=session)
    client.set_http_retry_params(retry=False)
    return Client(client)
