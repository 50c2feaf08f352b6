"""DICOMweb: a phantom as DICOM on a real archive (Orthanc), read through the network, is the phantom in its files."""

import json
import logging
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch

from sparsewsi.bags.bag import Bag
from sparsewsi.model.selection import Selection
from sparsewsi.phantom import write_phantom
from sparsewsi.report.annotations import write_annotations
from sparsewsi.slides import remote
from sparsewsi.slides.dicomweb import NO_ADDRESS, open_dicomweb, parse_address, read_headers
from sparsewsi.slides.refusals import SlideError
from sparsewsi.slides.remote import ANY
from sparsewsi.slides.slide import open_slide

ORTHANC = shutil.which("Orthanc") or shutil.which("Orthanc", path="/usr/sbin:/usr/local/sbin")
PLUGINS = sorted(Path("/usr/lib/orthanc").glob("libOrthancDicomWeb.so*"))


@dataclass
class Archive:
    """The phantom's DICOM folder, and where Orthanc serves it."""

    folder: Path
    base: str
    study: str = ""
    series: str = ""
    instances: list[str] = field(default_factory=list)

    def address(self, base: str | None = None) -> str:
        return f"dicomweb:{base or self.base}?study={self.study}&series={self.series}"


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Archive]:
    if ORTHANC is None or not PLUGINS:
        pytest.skip("Orthanc and its DICOMweb plugin are not installed (Debian: orthanc, orthanc-dicomweb)")
    pytest.importorskip("wsidicom", reason="the extra [dicomweb] is not installed")
    wsidicomizer = pytest.importorskip("wsidicomizer", reason="wsidicomizer makes the DICOM files")
    folder = tmp_path_factory.mktemp("archive")
    write_phantom(folder / "phantom.tiff", seed=5, size=2_000)
    logging.getLogger("wsidicomizer").setLevel(logging.ERROR)
    wsidicomizer.WsiDicomizer.convert(folder / "phantom.tiff", folder / "dicom", tile_size=256, workers=1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {
        "StorageDirectory": str(folder / "db"),
        "IndexDirectory": str(folder / "db"),
        "HttpPort": port,
        "DicomServerEnabled": False,
        "Plugins": [str(PLUGINS[-1])],
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
    }
    (folder / "orthanc.json").write_text(json.dumps(settings))
    assert ORTHANC is not None
    process = subprocess.Popen(
        [ORTHANC, str(folder / "orthanc.json")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        found = Archive(folder / "dicom", f"http://127.0.0.1:{port}/dicom-web")
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=30) as client:
            _wait_for(client)
            for file in sorted(found.folder.iterdir()):
                client.post("/instances", content=file.read_bytes()).raise_for_status()
                found.instances.append(file.name)
            series = client.get("/series?expand").json()[0]
            found.series = series["MainDicomTags"]["SeriesInstanceUID"]
            found.study = client.get(f"/studies/{series['ParentStudy']}").json()["MainDicomTags"]["StudyInstanceUID"]
        yield found
    finally:
        process.terminate()
        process.wait(20)


def _wait_for(client: httpx.Client) -> None:
    end = time.monotonic() + 60
    while True:
        try:
            client.get("/system").raise_for_status()
            return
        except httpx.HTTPError:
            assert time.monotonic() < end, "Orthanc did not start"
            time.sleep(0.1)


def test_px_and_levels_and_resolution_are_those_of_the_files(archive):
    with open_slide(archive.folder) as here, open_slide(archive.address()) as there:
        assert there.level_sizes == here.level_sizes
        assert there.level_downsamples == here.level_downsamples
        assert there.mpp == pytest.approx(here.mpp)
        assert there.vendor == here.vendor == "dicom"
        for level, (width, height) in enumerate(here.level_sizes):
            assert np.array_equal(
                there.read_level(level, (0, 0), (width, height)), here.read_level(level, (0, 0), (width, height))
            )
        corners = [(-30, -30), (250, 251), (1_900, 1_950)]
        for ours, theirs in zip(there.read_batch(corners, (120, 90), 0.7), here.read_batch(corners, (120, 90), 0.7)):
            assert np.array_equal(ours, theirs)


def test_the_name_tells_slides_apart_and_says_nothing(archive):
    with open_slide(archive.address()) as slide:
        assert re.fullmatch(r"slide [0-9a-f]{8}", slide.name)
        assert slide.phantom_seed is None


def test_a_path_made_of_the_address_is_still_the_address(archive):
    assert parse_address(Path(archive.address())) == (archive.base, archive.study, archive.series)
    assert parse_address(f" '{archive.address()}' ") == (archive.base, archive.study, archive.series)


def test_the_cache_is_bounded_and_no_frame_is_asked_for_twice(archive, gate, monkeypatch):
    monkeypatch.setattr("sparsewsi.slides.dicomweb.CACHE_BYTES", 8 * 256 * 256 * 3)
    source, _ = open_dicomweb(archive.address(gate.address), ANY) or pytest.fail("it is DICOMweb")
    source.read(0, (0, 0), (2_000, 700))
    assert 0 < source._tiles.held <= 8 * 256 * 256 * 3
    source.read(0, (10, 10), (300, 300))
    gate.asked.clear()
    source.read(0, (10, 10), (300, 300))
    assert gate.asked == []
    source.close()


def test_a_server_that_dies_midway_is_one_sentence_and_nothing_half_is_kept(archive, gate, monkeypatch):
    monkeypatch.setattr(remote.time, "sleep", lambda _seconds: None)
    with open_slide(archive.folder) as here, open_slide(archive.address(gate.address)) as slide:
        gate.cut = 3_000  # bytes of each answer, then the connection is closed
        for _ in range(2):
            with pytest.raises(SlideError, match=r"^The slide's server broke off; check the network") as told:
                slide.read_level(0, (0, 0), (600, 600))
            assert "127.0.0.1" not in str(told.value)
            assert archive.series not in str(told.value)
        gate.cut = None
        whole = slide.read_level(0, (0, 0), (600, 600))
        assert np.array_equal(whole, here.read_level(0, (0, 0), (600, 600)))
        gate.failures = 2
        assert slide.read_level(0, (1_000, 1_000), (300, 300)).std() > 0, "a busy server is asked again"


def test_px_of_a_label_are_never_asked_for(archive, gate):
    with open_slide(archive.address(gate.address)) as slide:
        slide.thumbnail(300)
    labels = {"LABEL", "OVERVIEW", "THUMBNAIL"}
    assert gate.kinds, "metadata was seen"
    for path in gate.asked:
        if (found := re.search(r"/instances/([0-9.]+)/frames", path)) is not None:
            assert not labels & set(gate.kinds[found[1]])


def test_the_server_says_of_the_levels_what_the_files_say(archive, gate):
    import pydicom

    read = {one.SOPInstanceUID: one for one in map(pydicom.dcmread, archive.folder.iterdir())}
    told = read_headers(archive.address(gate.address))
    assert {one.SOPInstanceUID for one in told} == {uid for uid, one in read.items() if "VOLUME" in one.ImageType}
    for one in told:
        file = read[one.SOPInstanceUID]
        for name in ("FrameOfReferenceUID", "TotalPixelMatrixColumns", "TotalPixelMatrixRows", "ContainerIdentifier"):
            assert one.get(name) == file.get(name)
    assert not [path for path in gate.asked if "/frames" in path]


def test_annotations_of_a_slide_on_a_server_are_those_of_its_files(archive, tmp_path):
    hd = pytest.importorskip("highdicom", reason="the extra [dicom] is not installed")
    coords, scores = torch.tensor([[0, 0], [224, 448], [448, 0]]), torch.tensor([1.0, 3.0, 2.0])
    bag = Bag(torch.zeros(3, 8), coords, 224, 0.5, "efficientnet-lite0", "slide 0a1b2c3d")
    kept = Selection(torch.tensor([1, 2]), scores, torch.zeros(2, 4), 3)
    for name, slide in (("here", archive.folder), ("there", archive.address())):
        write_annotations(tmp_path / name, bag, kept, slide, "demo")
    here, there = (hd.ann.annread(tmp_path / name) for name in ("here", "there"))
    assert there.SOPInstanceUID == here.SOPInstanceUID
    assert there.ReferencedImageSequence == here.ReferencedImageSequence
    assert there.StudyInstanceUID == archive.study
    rectangles = there.get_annotation_group(number=1).get_graphic_data("2D")
    assert [rectangle[0].tolist() for rectangle in rectangles] == [[224, 448], [448, 0]]


def test_what_is_not_there_is_a_sentence(archive):
    other = archive.address().replace(archive.series, "1.2.3")
    with pytest.raises(SlideError) as told:
        open_slide(other)
    assert len(str(told.value).splitlines()) == 1
    assert "1.2.3" not in str(told.value)


@pytest.mark.parametrize(
    "address",
    [
        "dicomweb:",
        "dicomweb:/folder?study=1.2&series=1.2",
        "dicomweb:ftp://host/base?study=1.2&series=1.2",
        "dicomweb:https://host/base",
        "dicomweb:https://host/base?study=1.2",
        "dicomweb:https://host/base?study=1.2&series=1.2/../../x",
        "dicomweb:https://host/base?study=1.2&series=1.2&series=1.3",
        "dicomweb:https://host/base?study=1.2&series=1.2&more=x",
        "dicomweb:https://host/base?study=1.2&series=" + "1." * 40 + "1",
    ],
)
def test_an_address_that_is_none_is_refused_before_anything_is_asked(address):
    with pytest.raises(SlideError) as told:
        open_slide(address)
    assert str(told.value) == NO_ADDRESS


# ---- a gate before Orthanc, which can break


class Gate(ThreadingHTTPServer):
    upstream: str
    address: str
    asked: list[str]
    kinds: dict[str, list[str]]  # ImageType by instance, as it went through
    failures: int = 0
    cut: int | None = None


class Passing(BaseHTTPRequestHandler):
    server: Gate
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        if self.server.failures:
            self.server.failures -= 1
            self.send_error(503)
            return
        accept = {"Accept": self.headers.get("Accept", "*/*")}
        with httpx.Client(trust_env=False) as client:
            answer = client.get(self.server.upstream + self.path, headers=accept)
        if "json" in answer.headers.get("content-type", ""):
            for one in answer.json():
                if "00080008" in one:
                    self.server.kinds[one["00080018"]["Value"][0]] = one["00080008"]["Value"]
        self.send_response(answer.status_code)
        self.send_header("Content-Type", answer.headers.get("content-type", "text/plain"))
        self.send_header("Content-Length", str(len(answer.content)))
        self.end_headers()
        self.wfile.write(answer.content[: self.server.cut])
        if self.server.cut is not None:
            self.close_connection = True

    def log_message(self, *_args) -> None:
        pass


@pytest.fixture
def gate(archive) -> Iterator[Gate]:
    serving = Gate(("127.0.0.1", 0), Passing)
    serving.upstream, serving.asked, serving.kinds = archive.base.removesuffix("/dicom-web"), [], {}
    serving.address = f"http://127.0.0.1:{serving.server_port}/dicom-web"
    threading.Thread(target=serving.serve_forever, args=(0.02,), daemon=True).start()
    yield serving
    serving.shutdown()
    serving.server_close()
