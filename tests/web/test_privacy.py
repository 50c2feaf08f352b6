"""A slide, its file and its folder name a patient, a date and an accession number: nothing that is put out does.

Every way to use the program is gone: page, HTTP, tools, command line, extraction, check of training data. What is said
where a slide is damaged is looked at as well as what is made.
"""

import asyncio
import json
import re
import shutil
import struct
import sys
import zlib
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import gradio_client
import h5py
import httpx
import numpy as np
import pytest
import tifffile
from PIL import Image, PngImagePlugin

from benchmarks.inputs import APERIO, make_image, make_mrxs, make_tiff, make_vms, pack, picture
from sparsewsi.__main__ import main
from sparsewsi.web.desk import Desk
from sparsewsi.web.page import build_page
from sparsewsi.web.serve import launch_settings
from train.data import questions
from train.flags import run_command

NAME, DATE, NUMBER = "Mustermann^Erika", "1957-03-12", "ACC47110815"
SECRET = re.compile(r"mustermann|erika|1957.?03.?12|12\.03\.1957|47110815", re.IGNORECASE)
TITLE = f"{NAME} {DATE} {NUMBER}"
ASK = ["--question", "Which tissue?", "--option", "fat", "--option", "liver"]


def plant(folder: Path) -> dict[str, Path]:
    """A slide of each format that says who it is of wherever the format can: kind -> its path."""
    folder.mkdir()
    xml = f'<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Experimenter UserName="{NAME}"/>'
    xml += f'<Image ID="i" Name="{TITLE}"><AcquisitionDate>{DATE}</AcquisitionDate>'
    xml += '<Pixels SizeX="768" SizeY="768" PhysicalSizeX="0.5" PhysicalSizeY="0.5"/></Image></OME>'
    header = (
        f"{APERIO}|Patient = {NAME}|Date = {DATE}|Title = {NUMBER}|Filename = {TITLE}|User = {NAME}|Barcode = {NUMBER}"
    )
    files = {
        "svs": make_tiff("jpeg", header),
        "ome.tif": make_tiff("jpeg", xml),
        "tif": make_tiff("zlib", TITLE),
        "png": _png(),
        "jpg": make_image(picture(768), "JPEG", comment=TITLE.encode(), exif=_exif(), xmp=TITLE.encode()),
    }
    made = {kind: folder / f"{TITLE}.{kind}" for kind in files}
    for kind, path in made.items():
        path.write_bytes(files[kind])
    with tifffile.TiffFile(made["tif"], mode="r+") as tiff:
        tiff.pages[0].tags["Software"].overwrite(TITLE)  # type: ignore[union-attr]
    facts = f"SLIDE_NAME = {TITLE}\nSLIDE_CREATIONDATETIME = {DATE}\nPROJECT_NAME = {NUMBER}\n"
    for kind, parts in (("mrxs", make_mrxs(facts)), ("vms", make_vms(f"Reference={TITLE}\nCreated={DATE}\n"))):
        for name, content in parts.items():
            place = folder / kind / (f"{TITLE}{name[1:]}" if name.startswith("a") and kind == "mrxs" else name)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)
        made[kind] = folder / kind / (f"{TITLE}.mrxs" if kind == "mrxs" else "a.vms")
    return made


def _exif() -> Image.Exif:
    exif = Image.Exif()
    exif.update({0x010E: TITLE, 0x013B: NAME, 0x0132: f"{DATE.replace('-', ':')} 10:00:00", 0x8298: NAME})
    return exif


def _png() -> bytes:
    text = PngImagePlugin.PngInfo()
    text.add_text("Title", TITLE)
    text.add_itxt("Author", NAME, zip=True)
    text.add_text("Creation Time", DATE)
    return make_image(picture(768), "PNG", pnginfo=text, exif=_exif())


def plant_dicom(source: Path, folder: Path) -> Path:
    pydicom = pytest.importorskip("pydicom")
    folder.mkdir()
    for number, path in enumerate(sorted(source.iterdir())):
        file = pydicom.dcmread(path)
        file.PatientName, file.PatientID, file.AccessionNumber = NAME, NUMBER, NUMBER
        file.PatientBirthDate = file.StudyDate = DATE.replace("-", "")
        file.StudyDescription = file.ContainerIdentifier = TITLE[:60]
        file.save_as(folder / f"{TITLE} {number}.dcm")
    return folder


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return plant(tmp_path_factory.mktemp("slides") / TITLE)


def hide(text: object, what: str) -> None:
    """Fail if the text names the patient."""
    found = SECRET.search(str(text))
    assert found is None, f"{what} says {str(text)[max(0, found.start() - 80) : found.end() + 40]!r}"


def hide_in_files(folder: Path) -> None:
    """Fail if a file below a folder, or its name, names the patient; texts within PNG are unpacked."""
    for path in folder.rglob("*"):
        hide(path.relative_to(folder), "the name of a file")
        if path.is_file():
            content = path.read_bytes()
            hide(content.decode("latin-1"), path.name)
            for length, kind, data in _chunks(content):
                if kind in (b"zTXt", b"iTXt"):
                    hide(zlib.decompressobj().decompress(data.split(b"\0\0")[-1]) if length else b"", path.name)


def _chunks(content: bytes):
    at = 8
    while content.startswith(b"\x89PNG") and at + 8 <= len(content):
        length, kind = struct.unpack(">I4s", content[at : at + 8])
        yield length, kind, content[at + 8 : at + 8 + length]
        at += 12 + length


def cut(path: Path, folder: Path) -> Path:
    """A copy that breaks off, under the same name."""
    folder.mkdir(exist_ok=True)
    content = path.read_bytes()
    (folder / path.name).write_bytes(content[: len(content) // 3])
    return folder / path.name


# ---- on one's own machine


@pytest.mark.parametrize("kind", ["svs", "ome.tif", "tif", "png", "jpg", "mrxs", "vms", "dicom"])
def test_the_command_line_names_nobody(planted, kind, tiny_model, tmp_path, capfd, caplog, request):
    if kind == "dicom":
        source = request.getfixturevalue("shared_data") / "slides/dicom_boxes"
        planted = {"dicom": plant_dicom(source, tmp_path / TITLE)}
    words = ["--model", str(tiny_model), "--out", str(tmp_path / "out"), *ASK]
    scale = ["--slide-mpp", "0.5"] if kind in ("png", "jpg") else []
    main([str(planted[kind]), *words, *scale])
    said = "".join(capfd.readouterr())
    hide(said + caplog.text, "the command line")
    if kind != "dicom":  # boxes are no tissue
        assert "A: " in said, said
        assert (tmp_path / "out" / "report.html").is_file()
    hide_in_files(tmp_path / "out")


def test_errors_of_the_command_line_name_nobody(planted, tiny_model, tmp_path, capfd, caplog):
    place = tmp_path / TITLE
    broken = [cut(planted[kind], place) for kind in ("svs", "ome.tif", "tif", "png", "jpg", "mrxs", "vms")]
    for path in [*broken, planted["png"], place / "not there" / f"{TITLE}.svs", place]:
        main([str(path), "--model", str(tiny_model), "--out", str(tmp_path / "out")])
        hide("".join(capfd.readouterr()) + caplog.text, "the command line")
    hide_in_files(tmp_path / "out")


def test_features_and_the_report_of_a_cohort_name_nobody(planted, tmp_path, capfd, caplog):
    """Features bear the names of the slides' files, by which they are found; all else is the slides' own."""
    place = tmp_path / TITLE
    place.mkdir()
    for kind in ("svs", "tif", "ome.tif"):
        shutil.copy(planted[kind], place / f"s {kind}")
    (place / "s cut.svs").write_bytes((place / "s svs").read_bytes()[:3000])
    assert main(["extract", str(place), "--out", str(tmp_path / "out")]) == 1, "one is cut"
    hide("".join(capfd.readouterr()) + caplog.text, "the command line")
    hide_in_files(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 3


def test_the_check_of_training_data_names_nobody(planted, tmp_path, capfd, monkeypatch):
    place = tmp_path / TITLE
    place.mkdir()
    rng = np.random.default_rng(0)
    for name in ("s1", "s2", "s3"):
        with h5py.File(place / f"{name}.h5", "w") as file:
            file["features"] = rng.random((9, 16), dtype=np.float32)
            file["coords"] = np.stack([np.arange(9) * 224, np.zeros(9, int)], 1)
            file["coords"].attrs.update({"name": TITLE, "savetodir": TITLE, "patient": NAME, "patch_size_level0": 224})
            file.attrs.update({"slide": TITLE, "date": DATE})
    (place / "s2.h5").write_bytes((place / "s2.h5").read_bytes()[:900])
    # Pickled on purpose: it is refused, and the refusal must not quote what it holds.
    np.save(place / "s4.npy", np.array({"x": TITLE}, dtype=object), allow_pickle=True)
    rows = [{"slide": f"{place}/s{i}.svs", "question": "Which?", "answer": "skin"} for i in range(1, 6)]
    (place / "q.json").write_text(json.dumps(rows))
    monkeypatch.setattr(sys, "argv", ["x", "check", str(place / "q.json"), "--features", str(place)])
    with pytest.raises(SystemExit):
        run_command(questions.main)
    said = "".join(capfd.readouterr())
    assert "5 questions can be asked" in said
    hide(said, "the check")


# ---- on a server


def test_the_page_names_nobody(planted, desk, on, visitor, capfd, caplog):
    for kind in ("svs", "ome.tif", "png"):
        me, page = visitor(), on.page
        upload = desk.uploads / f"01{kind}" / planted[kind].name
        upload.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(planted[kind], upload)
        asked_for = on.on_upload([str(upload)], False, me)[page.asked]
        shown = on.on_slide(asked_for, "0.5" if kind == "png" else "", None, None, (), me)
        steps = list(on.on_slide_shown(shown[page.coming], None, [], me))
        opened = steps[-1][page.opened]
        asked = on.on_question("Which tissue?", "fat\nliver", "", opened, (), [], {}, me)
        answered = list(on.on_asked(opened, asked[page.chat], {}, {}, me))
        hide([asked_for, shown, steps, asked, answered], "the page")
        hide([vars(one) for one in opened.slides], "the slides of a case")
        hide(vars(opened.case), "a case")
        on.on_analysed(opened, answered[-1][page.answers], me)
        for name in ("report.html", "patches.csv", "patches.geojson", "selection.json", "log.jsonl"):
            said = list(answered[-1][page.answers].values())
            on._write_download(opened, opened.case, said, me.session_hash, name)
        hide_in_files(desk.files_of(me.session_hash))
        hide([file.relative_to(desk.folder) for file in desk.folder.rglob("*")], "the server's folder")
    hide("".join(capfd.readouterr()) + caplog.text, "the server's log")


@pytest.fixture(scope="module")
def served(tiny_model, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        desk = Desk(str(tiny_model), tmp_path_factory.mktemp("desk"), log=tmp_path_factory.mktemp("log") / "log.jsonl")
        patch.setenv("GRADIO_TEMP_DIR", str(desk.uploads))
        demo = build_page(desk)
        tools = find_spec("mcp") is not None
        _, address, _ = demo.launch(
            **launch_settings(desk, "127.0.0.1", mcp=tools), quiet=True, prevent_thread_lock=True
        )
        yield SimpleNamespace(desk=desk, address=address.rstrip("/"))
        demo.close(verbose=False)


def test_the_api_names_nobody(planted, served, tmp_path, capfd, caplog):
    client, said = gradio_client.Client(served.address, verbose=False), []
    zipped = tmp_path / f"{TITLE}.zip"
    zipped.write_bytes(pack(make_vms(f"Reference={TITLE}\n")))
    bad = [cut(planted[kind], tmp_path / "cut") for kind in ("svs", "png")]
    for path in [planted["svs"], planted["jpg"], zipped, *bad]:
        scale = 0.5 if path.suffix in (".png", ".jpg") else 0
        try:
            found = client.predict(file=gradio_client.handle_file(path), slide_mpp=scale, api_name="/analyze")
            answer = client.predict(found["case"], "Which tissue?", ["fat", "liver"], api_name="/ask")
            said += [found, answer]
            said.append(client.predict(found["case"], "Which?", answer["answer"], api_name="/evidence"))
            for place in ("0/0_0.jpg", "patch/0_0_224_224.jpg", "thumbnail.jpg"):
                reply = httpx.get(f"{served.address}/gradio_api/slide/{found['case']}/{place}")
                said += [reply.headers, reply.content.decode("latin-1")]
        except Exception as error:
            said.append((type(error), str(error), vars(error)))
    assert sum(isinstance(answer, dict) for answer in said) > 3, "some were analysed and asked about"
    hide(said, "the API")
    hide("".join(capfd.readouterr()) + caplog.text, "the server's log")
    hide_in_files(served.desk.log.parent)


def test_the_tools_name_nobody(planted, served, capfd, caplog):
    http = pytest.importorskip("mcp.client.streamable_http")
    mcp = pytest.importorskip("mcp")
    with planted["svs"].open("rb") as stream:
        uploaded = httpx.post(f"{served.address}/gradio_api/upload", files={"files": (planted["svs"].name, stream)})
    said: list = [uploaded.text]

    async def use() -> None:
        place = f"{served.address}/gradio_api/mcp/"
        async with http.streamablehttp_client(place) as (reads, writes, _), mcp.ClientSession(reads, writes) as session:
            await session.initialize()
            for slide in (uploaded.json()[0], str(planted["svs"])):
                said.append(await session.call_tool("analyze", {"slide": slide}))

    asyncio.run(use())
    assert "num_patches" in str(said[1])
    hide(said[:2], "the tools")
    hide("".join(capfd.readouterr()) + caplog.text, "the server's log")
