"""Slides from outside: hostile ones are a sentence, uploads lie where only we can read them."""

import stat
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.inputs import make_image, make_mrxs, make_tiff, make_vms, picture
from sparsewsi import phantom
from sparsewsi.slides import confined
from sparsewsi.web import desk as desk_module
from sparsewsi.web import intake
from sparsewsi.web.jobs import Halted


@pytest.fixture(scope="module")
def slide_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slides") / "phantom.tiff"
    phantom.write_phantom(path, seed=3, size=1024)
    return path


def test_a_good_slide_is_let_in(slide_path):
    intake.check(slide_path)


def test_13_hostile_files_are_a_sentence(tmp_path):
    import tifffile

    junk, cut, empty = tmp_path / "junk.svs", tmp_path / "cut.tiff", tmp_path / "empty.svs"
    junk.write_bytes(np.random.default_rng(0).bytes(10_000))
    tifffile.imwrite(tmp_path / "whole.tiff", np.zeros((2048, 2048, 3), np.uint8), tile=(256, 256))
    cut.write_bytes((tmp_path / "whole.tiff").read_bytes()[:5_000])
    empty.touch()
    for path in (junk, cut, empty, tmp_path / "not there.svs"):
        with pytest.raises(ValueError, match=r"^[A-Z].*\.$") as caught:
            intake.check(path)
        assert str(tmp_path) not in str(caught.value)


def test_13_a_slide_that_would_take_too_much_is_given_up(slide_path, monkeypatch):
    monkeypatch.setattr(confined, "PATIENCE", 0.01)
    with pytest.raises(ValueError, match="given up"):
        intake.check(slide_path)


def archive(path: Path, entries: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in entries.items():
            file.writestr(name, data)
    return path


def test_a_name_that_is_too_long_is_not_called_damage(tmp_path):
    with pytest.raises(ValueError, match="too long"):
        intake.unpack(archive(tmp_path / "a.zip", {"n" * 300 + ".svs": b"x"}), tmp_path / "unpacked")
    assert not (tmp_path / "unpacked").exists()


@pytest.mark.parametrize("name", ["../evil.svs", "/etc/evil", "a/../../evil", "C:/evil", "..\\evil"])
def test_13_an_archive_that_leads_out_is_not_unpacked(name, tmp_path):
    packed_file = archive(tmp_path / "a.zip", {"good.dcm": b"x", name: b"x"})
    with pytest.raises(ValueError, match="leads out"):
        intake.unpack(packed_file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_13_a_small_file_of_very_many_px_is_given_up_before_it_is_decoded(tmp_path):
    from benchmarks.hostile import tiff_bomb

    tiff_bomb(tmp_path / "bomb.tiff")
    assert (tmp_path / "bomb.tiff").stat().st_size < 100_000
    with pytest.raises(ValueError, match="20,000 x 20,000 px on its smallest level are no scan"):
        intake.check(tmp_path / "bomb.tiff")


def test_13_archives_with_links_bombs_or_damage_are_not_unpacked(tmp_path):
    link = zipfile.ZipInfo("link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "link.zip", "w") as file:
        file.writestr(link, "/etc/passwd")
    archive(tmp_path / "bomb.zip", {"zeros.dcm": bytes(200 << 20)})
    (tmp_path / "bad.zip").write_bytes(b"PK\x03\x04" + bytes(100))
    data = bytearray(archive(tmp_path / "flipped.zip", {"a.dcm": bytes(range(256)) * 40}).read_bytes())
    data[45:60] = b"\xff" * 15  # in the packed bytes
    (tmp_path / "flipped.zip").write_bytes(data)
    archive(tmp_path / "under.zip", {"a": b"x", "a/b": b"x"})
    refused = {"link": "leads out", "bomb": "far more", "bad": "damaged", "flipped": "damaged", "under": "damaged"}
    for name, words in refused.items():
        with pytest.raises(ValueError, match=words):
            intake.unpack(tmp_path / f"{name}.zip", tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("there", "instead"),
    [
        (b"a/b.svs", b"\x00/b.svs"),  # a name ends at a zero
        ("c/é.svs".encode(), b"c/\xff\xfe.svs"),  # no text
        (b"PK\x01\x02", b"PK\x01\x03"),
    ],
)
def test_13_an_archive_whose_list_of_files_is_damaged_is_refused(there, instead, tmp_path):
    path = archive(tmp_path / "a.zip", {"a/b.svs": b"slide", "c/é.svs": b"x"})
    data = path.read_bytes()
    assert there in data
    path.write_bytes(data.replace(there, instead))
    with pytest.raises(ValueError, match=r"damaged|no slide|leads out"):
        intake.unpack(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_13_an_archive_that_may_ask_for_gigabytes_to_be_unpacked_is_refused(method, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", method) as file:
        file.writestr("slide.svs", bytes(1000))
    with pytest.raises(ValueError, match="Deflate"):
        intake.unpack(tmp_path / "a.zip", tmp_path / "out")


@pytest.mark.parametrize("most", [0, 10, 999])
def test_13_an_archive_keeps_to_the_room_there_is(most, tmp_path):
    with pytest.raises(ValueError, match="far more"):
        intake.unpack(archive(tmp_path / "a.zip", {"slide.svs": bytes(1000)}), tmp_path / "out", most)
    assert not (tmp_path / "out").exists()


def test_13_the_list_of_an_archives_files_is_not_read_however_long_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(intake, "MOST_READ", 70_000)  # enough for a comment
    many = archive(tmp_path / "many.zip", {f"{i:080d}": b"" for i in range(1000)})
    with pytest.raises(ValueError, match="far more files"):
        intake.unpack(many, tmp_path / "out")
    with zipfile.ZipFile(tmp_path / "said.zip", "w") as file:
        file.writestr("slide.svs", b"x" * 100)
        file.comment = b"c" * 60_000
    assert intake.unpack(tmp_path / "said.zip", tmp_path / "out").name == "slide.svs"


def test_an_archive_is_not_unpacked_to_its_end_when_nobody_waits(desk, tmp_path):
    file = desk.uploads / "0123" / "a.zip"
    file.parent.mkdir(parents=True, exist_ok=True)
    archive(file, {f"{i}.dcm": b"x" * 100 for i in range(50)})
    with desk.jobs.run("somebody", "slide") as job:
        desk.leave("somebody")
        with pytest.raises(Halted):
            desk.keep_upload(file, "somebody", job)
    assert not desk.folder_of("somebody").exists()
    assert not file.parent.exists()


def png(path: Path, side: int) -> Path:
    Image.new("L", (side, side), 200).save(path)
    return path


def test_the_px_of_all_open_pictures_together_are_bounded(desk, tmp_path, monkeypatch):
    monkeypatch.setattr(desk_module, "MOST_DECODED", 3 * 200**2)
    one, other, large = (png(tmp_path / f"{side}.png", side) for side in (150, 160, 201))
    with pytest.raises(ValueError, match="decoded as a whole"):
        desk.open_slide(large)
    first = desk.open_slide(one)
    with pytest.raises(ValueError, match="no memory for another"):
        desk.open_slide(other)
    first.close()
    shown = desk.slides.add(other, "somebody")
    desk.slides.patch(shown, 0, 0, 100, 100)
    with desk.open_slide(one):  # the one that is only shown is closed for it, and opened again later
        assert desk.slides.holds(shown)
    desk.slides.patch(shown, 0, 0, 50, 50)
    desk.forget("somebody")


def test_a_folder_slide_comes_in_as_an_archive(tmp_path):
    dicom = archive(tmp_path / "dicom.zip", {"case/1.dcm": b"a", "case/2.dcm": b"b"})
    assert intake.unpack(dicom, tmp_path / "one").name == "case"
    mirax = archive(tmp_path / "mirax.zip", {"s.mrxs": b"a", "s/Slidedat.ini": b"b"})
    assert intake.unpack(mirax, tmp_path / "two").name == "s.mrxs"


def test_what_the_slide_of_an_archive_is_its_content_decides(tmp_path):
    zoom = b'<Image TileSize="254" Overlap="1" Format="jpeg"><Size Width="3" Height="3"/></Image>'
    tiles = {f"z_files/{level}/0_0.jpeg": make_image(picture(64), "JPEG") for level in range(3)}
    made = {
        "a.vms": make_vms() | {"notes.txt": b"x", "__MACOSX/._a.vms": b"\0\5\x16\7"},
        "a.mrxs": make_mrxs(),
        "scan": {"case 1/scan": make_tiff("jpeg"), "case 1/scan_macro.jpg": make_image(picture(64), "JPEG")},
        "z.dzi": {"z.dzi": zoom, **tiles},
    }
    for name, files in made.items():
        assert intake.unpack(archive(tmp_path / f"{name}.zip", files), tmp_path / name).name == name


def test_an_archive_of_several_slides_or_none_is_refused_in_words(tmp_path):
    two = {"a.svs": make_tiff("jpeg"), "b.svs": make_tiff("jpeg")}
    lost = {name: content for name, content in make_mrxs().items() if name != "a.mrxs"}
    cases = {
        "holds 2 slides": two,
        "holds no slide;": {"a.txt": b"x", "b.csv": b"y"},
        "whose .mrxs file is not beside": lost,
    }
    for words, files in {**cases, "by its name": {"label.png": make_image(picture(64), "PNG")}}.items():
        with pytest.raises(ValueError, match=words):
            intake.unpack(archive(tmp_path / "a.zip", files), tmp_path / words)


# ---- uploads


def test_only_a_plain_file_of_the_uploads_is_taken(tmp_path):
    uploads = tmp_path / "gradio"
    mine = uploads / "0123abcd" / "slide.svs"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"slide")
    assert intake.require_upload(mine, uploads) == mine
    (tmp_path / "private.svs").write_bytes(b"slide")
    (mine.parent / "link.svs").symlink_to(tmp_path / "private.svs")
    others = [uploads, mine.parent, tmp_path / "private.svs", mine.parent / "link.svs", uploads / ".." / "private.svs"]
    others += [mine.parent / "absent.svs", mine / "deeper.svs", uploads / "0123abcd" / ".." / ".." / "private.svs", ""]
    for path in others:
        with pytest.raises(ValueError, match="not uploaded to this server"):
            intake.require_upload(path, uploads)


def test_an_upload_that_is_no_slide_is_deleted_at_once(desk):
    file = desk.uploads / "0123abcd" / "slide.svs"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"junk" * 99)
    with desk.jobs.run("somebody", "slide") as job, pytest.raises(ValueError, match="text, not an image"):
        desk.keep_upload(file, "somebody", job)
    assert not file.exists()
    assert not desk.folder_of("somebody").exists()


def test_an_archive_that_names_a_file_outside_is_refused(desk):
    text = "[Virtual Microscope Specimen]\nNoLayers=1\nImageFile=../../private.jpg\n"
    (desk.uploads / "0123").mkdir(parents=True, exist_ok=True)
    file = archive(desk.uploads / "0123" / "a.zip", {"s.vms": text.encode()})
    with desk.jobs.run("somebody", "slide") as job, pytest.raises(ValueError, match="outside its own folder"):
        desk.keep_upload(file, "somebody", job)


def test_an_upload_moves_to_a_folder_of_its_session_that_only_we_can_read(tmp_path, desk):
    source = tmp_path / "Mustermann_1950.svs"
    sessions = ("../../escape", "abc", None)
    for session in sessions:
        source.write_bytes(b"slide")
        kept = intake.keep_upload(source, desk.folder_of(session))
        assert not source.exists()
        assert kept.name == "slide.svs"
        assert kept.parent.parent == desk.folder
        assert stat.S_IMODE(kept.parent.stat().st_mode) == 0o700
    desk.forget("abc")
    assert not desk.folder_of("abc").exists()
    assert desk.folder_of("../../escape").exists()


def test_a_second_upload_replaces_the_first(tmp_path):
    for name in ("one.svs", "two.tiff"):
        (tmp_path / name).write_bytes(b"slide")
        kept = intake.keep_upload(tmp_path / name, tmp_path / "same")
    assert [path.name for path in kept.parent.iterdir()] == ["slide.tiff"]
