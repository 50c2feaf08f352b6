"""A stranger's slide is read by a process that sees its folder alone; what happens to that process is a sentence."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from sparsewsi.bags.extract import read_patches
from sparsewsi.slides import confined
from sparsewsi.slides.confined import ConfinedSlide
from sparsewsi.slides.refusals import SlideError
from sparsewsi.slides.slide import open_slide

RNG = np.random.default_rng(0)
ROOT = Path(__file__).resolve().parents[2]


def write_slide(path: Path, side: int = 600, **extra) -> Path:
    """Three levels of noise, lossless, 0.5 um/px."""
    pixels = RNG.integers(0, 256, (side, side, 3), dtype=np.uint8)
    with tifffile.TiffWriter(path) as tiff:
        for i, level in enumerate((pixels, pixels[::2, ::2], pixels[::8, ::8])):
            tiff.write(
                level,
                photometric="rgb",
                tile=(64, 64),
                compression="zlib",
                metadata=None,
                subfiletype=1 if i else 0,
                resolution=(2e4 / (1, 2, 8)[i], 2e4 / (1, 2, 8)[i]),
                resolutionunit="CENTIMETER",
                **extra,
            )
    return path


def open_confined(path: Path, root: Path | None = None) -> ConfinedSlide:
    slide = confined.open_confined(path, root=root)
    assert isinstance(slide, ConfinedSlide)
    return slide


@pytest.fixture(scope="module")
def slide_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_slide(tmp_path_factory.mktemp("session") / "slide.tiff")


def waited(question, seconds: float = 5.0) -> bool:
    """Whether the question is answered with yes before the time is over."""
    ends = time.monotonic() + seconds
    while not question() and time.monotonic() < ends:
        time.sleep(0.02)
    return question()


def alive(pid: int) -> bool:
    try:
        return "zombie" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


# ---- it is a Slide


def test_a_confined_slide_says_and_shows_what_the_slide_does(slide_file: Path):
    with open_slide(slide_file) as own, open_confined(slide_file, root=slide_file.parent) as other:
        stated = {name: value for name, value in vars(own).items() if name != "_source"}
        assert {name: vars(other)[name] for name in stated} == stated
        assert all(np.array_equal(a, b) for a, b in zip(own.thumbnail(200), other.thumbnail(200)))
        for xy, size, mpp in [((0, 0), (64, 64), 0.5), ((-9.5, 580), (100, 333), 0.7), ((3, 4), (50, 60), 0.3)]:
            assert np.array_equal(own.read(xy, size, mpp), other.read(xy, size, mpp))
        assert np.array_equal(own.read_level(1, (20, 40), (300, 20)), other.read_level(1, (20, 40), (300, 20)))
        assert own.check_mpp(0.4) == other.check_mpp(0.4)
        with pytest.raises(SlideError, match="levels 0 to 2"):
            other.read_level(3, (0, 0), (10, 10))


def test_a_region_larger_than_the_shared_memory_is_the_same(slide_file: Path):
    corners = np.arange(24).reshape(12, 2) * 8
    with open_slide(slide_file) as own, open_confined(slide_file) as other:
        for read in (
            lambda slide: slide.read((-3.5, 7.25), (1900, 1700), 0.5),
            lambda slide: slide.read_level(0, (0, 0), (1000, 3000)),
            lambda slide: slide.read_batch(corners, (600, 600), 0.5)[0],
            lambda slide: slide.read_batch(corners[:1], (1900, 1700), 0.5)[0],
        ):
            assert np.array_equal(read(own), read(other))


def test_a_jpeg_made_in_the_child_is_the_one_made_here(slide_file: Path):
    regions = [
        ((0, 0), (512, 512), 1.0),
        ((-20, 500), (200, 300), 2.5),
        ((0, 0), (700, 600), 1.0),
    ]  # the last too large
    with open_slide(slide_file) as own, open_confined(slide_file) as other:
        for xy, size, downsample in regions:
            assert own.read_jpeg(xy, size, downsample, 85) == other.read_jpeg(xy, size, downsample, 85)
        with pytest.raises(SlideError, match="positive size"):
            other.read_jpeg((0, 0), (0, 5), 1.0, 85)


def test_many_threads_read_at_once(slide_file: Path):
    corners = RNG.integers(0, 550, (200, 2))
    with open_slide(slide_file) as own, open_confined(slide_file) as other, ThreadPoolExecutor(8) as pool:
        wanted = [own.read(tuple(xy), (32, 32), 0.5) for xy in corners.tolist()]
        read = pool.map(lambda xy: other.read(tuple(xy), (32, 32), 0.5), corners.tolist())
        assert all(np.array_equal(a, b) for a, b in zip(wanted, read))
        batches = list(read_patches(other, corners, 0.5, 32, batch_size=16))
        assert np.array_equal(np.concatenate([pixels for pixels, _ in batches]), np.stack(wanted))


def test_patches_that_somebody_still_looks_at_are_never_written_over(slide_file: Path):
    corners = RNG.integers(0, 550, (40, 6, 2))
    with open_slide(slide_file) as own, open_confined(slide_file) as other, ThreadPoolExecutor(8) as pool:
        wanted = [own.read_batch(part, (32, 32), 0.5)[0] for part in corners]
        held = list(pool.map(lambda part: other.read_batch(part, (32, 32), 0.5)[0], corners))
        rows = [pixels[2:] for pixels in held]  # a part keeps the whole
        del held
        more = [other.read((0, 0), (32, 32), 0.5) for _ in range(20)]
        assert all(np.array_equal(a[2:], b) for a, b in zip(wanted, rows))
        del rows, more
        assert other._to_lend.qsize() == confined.LENT
        kept = other.read((0, 0), (32, 32), 0.5)
        shown = kept.copy()
    assert np.array_equal(kept, shown), "what was read outlives the slide"


def test_patches_in_a_damaged_part_are_told_from_the_others(tmp_path: Path):
    path = write_slide(tmp_path / "slide.tiff")
    with tifffile.TiffFile(path) as tiff:
        page: Any = tiff.pages[0]
        offset, length = page.dataoffsets[0], page.databytecounts[0]
    data = bytearray(path.read_bytes())
    data[offset : offset + length] = bytes(length)
    path.write_bytes(data)
    with open_confined(path) as slide:
        fine = slide.read_batch(np.array([(0, 0), (128, 128)]), (64, 64), 0.5)[1]
        assert fine.tolist() == [False, True]
        with pytest.raises(SlideError, match="damaged"):
            slide.read((0, 0), (64, 64), 0.5)


def test_what_is_no_slide_gets_the_same_sentence(tmp_path: Path):
    for name, content in {"a.svs": b"", "b.svs": b"junk" * 99, "c.tiff": b"II*\0\xff\xff\xff\xff" + bytes(99)}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(SlideError) as own:
            open_slide(tmp_path / name)
        with pytest.raises(SlideError) as other:
            open_confined(tmp_path / name, root=tmp_path)
        assert str(own.value) == str(other.value)
    with pytest.raises(SlideError, match="no file"):
        open_confined(tmp_path / "absent.svs", root=tmp_path)


def test_a_strangers_slide_is_no_phantom_whatever_it_says(tmp_path: Path):
    path = write_slide(tmp_path / "slide.tiff", 100, description='{"sparsewsi_phantom": {"seed": 7}}')
    with open_confined(path) as mine, open_confined(path, root=tmp_path) as strange:
        assert (mine.name, mine.phantom_seed) == ("phantom 7", 7)
        assert re.fullmatch("slide [0-9a-f]{8}", strange.name)
        assert strange.phantom_seed is None


# ---- it sees its own folder alone

TRIES = """
import ctypes, os, socket, subprocess, sys
from pathlib import Path
from sparsewsi.slides import sandbox
inside, outside = map(Path, sys.argv[1:3])
libc = ctypes.CDLL(None, use_errno=True)
sandbox._audit = lambda readable: None if sys.argv[3] == "kernel" else keep(readable)
keep = sandbox._audit
walls = sandbox.wall_in([inside], 1 << 30)
def what(deed):
    try:
        return "yes" if deed() else "no"
    except MemoryError:
        return "memory"
    except OSError:
        return "no"
c_open = lambda path, how: libc.open(os.fsencode(path), how) >= 0
print(" ".join(walls))
print(what(lambda: (inside / "mine").read_bytes()), what(lambda: c_open(inside / "mine", 0)))
print(what(lambda: (outside / "secret").read_bytes()), what(lambda: c_open(outside / "secret", 0)),
      what(lambda: c_open(inside / "link", 0)), what(lambda: c_open("/proc/self/environ", 0)))
print(what(lambda: c_open(inside / "mine", os.O_WRONLY)), what(lambda: c_open(inside / "new", os.O_CREAT | 1)),
      what(lambda: libc.unlink(os.fsencode(inside / "mine")) == 0))
print(what(lambda: socket.socket()), what(lambda: libc.socket(1, 1, 0) >= 0), what(lambda: libc.socket(2, 2, 0) >= 0))
print(what(lambda: subprocess.run(["true"])), what(lambda: libc.fork() >= 0),
      what(lambda: libc.kill(os.getppid(), 0) == 0))
print(what(lambda: bytes(2 << 30)))
"""


def tried(folder: Path, walls: str) -> tuple[set[str], list[str]]:
    inside, outside = folder / "inside", folder / "outside"
    for name in (inside, outside):
        name.mkdir()
    (inside / "mine").write_text("mine")
    (outside / "secret").write_text("secret")
    (inside / "link").symlink_to(outside / "secret")
    code = TRIES.replace("sandbox._audit = lambda readable: None if", "pass #") if walls == "all" else TRIES
    run = subprocess.run(
        [sys.executable, "-c", code, inside, outside, walls], capture_output=True, text=True, cwd=ROOT, check=True
    )
    first, *rest = run.stdout.splitlines()
    return set(first.split()), [word for line in rest for word in line.split()]


@pytest.mark.skipif(sys.platform != "linux", reason="walls of the kernel are Linux's")
def test_the_kernel_refuses_other_files_sockets_and_programs(tmp_path: Path):
    standing, (mine, also, *others, memory) = tried(tmp_path, "kernel")
    if not {"landlock", "seccomp"} <= standing:
        pytest.skip(f"this kernel has only {standing}")
    assert (mine, also, memory) == ("yes", "yes", "memory")
    assert set(others) == {"no"}


def test_python_refuses_them_where_the_kernel_does_not(tmp_path: Path):
    code = "from sparsewsi.slides import sandbox; import socket, subprocess; from pathlib import Path\n"
    code += f"sandbox._audit([Path({str(tmp_path)!r})])\n"
    for deed in ("Path('/etc/hosts').read_bytes()", "socket.socket()", "subprocess.run(['true'])", "Path('x').touch()"):
        run = subprocess.run([sys.executable, "-c", code + deed], capture_output=True, text=True, cwd=ROOT, check=False)
        assert "PermissionError: A process that reads a stranger's slide" in run.stderr


def test_nothing_of_the_servers_environment_reaches_the_child(slide_file: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    with open_confined(slide_file) as slide:
        assert "landlock" in slide.walls or "audit" in slide.walls
        if sys.platform == "linux":
            assert b"HF_TOKEN" not in Path(f"/proc/{slide.process.pid}/environ").read_bytes()
            assert b"slide.tiff" not in Path(f"/proc/{slide.process.pid}/cmdline").read_bytes()


def mrxs(folder: Path, line: str) -> Path:
    Image.fromarray(RNG.integers(0, 256, (50, 50, 3), dtype=np.uint8)).save(folder / "a.mrxs", "JPEG")
    (folder / "a").mkdir()
    head = "[GENERAL]\nSLIDE_ID = 1\n[HIERARCHICAL]\nINDEXFILE = Index.dat\n[DATAFILE]\nFILE_COUNT = 1\n"
    (folder / "a" / "Slidedat.ini").write_text("\ufeff" + head + line + "\n", encoding="utf-8")
    return folder / "a.mrxs"


def hamamatsu(folder: Path, name: str, line: str) -> Path:
    group = "Virtual Microscope Specimen" if name.endswith("vms") else "Uncompressed Virtual Microscope Specimen"
    (folder / name).write_text(f"[{group}]\nNoLayers=1\n{line}\n")
    return folder / name


@pytest.mark.parametrize("value", ["../../private.jpg", "/etc/hostname", "..", "sub/../../x.dat", "..\\x.dat"])
def test_text_parts_that_lead_out_of_the_folder_are_refused(tmp_path: Path, value: str):
    made = [
        mrxs(tmp_path, f"FILE_0 = {value}"),
        hamamatsu(tmp_path, "a.vms", f"ImageFile={value}"),
        hamamatsu(tmp_path, "b.vms", f"MapFile = {value}"),
        hamamatsu(tmp_path, "c.vmu", f"ImageFile(0,0)={value}"),
        hamamatsu(tmp_path, "d.svs", f"  macroimage={value}"),
    ]
    for path in made:
        with pytest.raises(SlideError, match="outside its own folder"):
            open_confined(path, root=tmp_path)


def test_links_and_pipes_in_a_strangers_folder_are_refused(tmp_path: Path, slide_file: Path):
    folder = tmp_path / "session"
    folder.mkdir()
    good = write_slide(folder / "slide.tiff", 100)
    open_confined(good, root=folder).close()
    (folder / "link.tiff").symlink_to(slide_file)
    for path in (folder / "link.tiff", good):
        with pytest.raises(SlideError, match="outside its own folder"):
            open_confined(path, root=folder)
    (folder / "link.tiff").unlink()
    with pytest.raises(SlideError, match="outside its own folder"):
        open_confined(slide_file, root=folder)
    os.mkfifo(folder / "pipe")
    with pytest.raises(SlideError, match="outside its own folder"):
        open_confined(good, root=folder)


# ---- what happens to it is a sentence


def huge_middle_level(path: Path) -> Path:
    """Levels of 720,000, 90,000 and 1,000 px; the first two are one tile each, which no memory holds."""
    pixels = np.full((64, 64, 3), 200, np.uint8)
    with tifffile.TiffWriter(path) as tiff:
        for i, level in enumerate((pixels, pixels, RNG.integers(150, 256, (1000, 1000, 3), dtype=np.uint8))):
            tiff.write(
                level,
                photometric="rgb",
                tile=(64, 64),
                compression="zlib",
                metadata=None,
                subfiletype=1 if i else 0,
                resolution=(2e4, 2e4),
                resolutionunit="CENTIMETER",
            )
    with tifffile.TiffFile(path, mode="r+") as tiff:
        pages: Any = tiff.pages
        for page, side in ((0, 720_000), (1, 90_000)):
            for tag, value in (("ImageWidth", side), ("ImageLength", side), ("TileWidth", side), ("TileLength", side)):
                pages[page].tags[tag].overwrite(value, dtype="I")
    return path


def test_a_level_that_no_memory_holds_is_a_sentence(tmp_path: Path):
    path = huge_middle_level(tmp_path / "slide.tiff")
    with pytest.raises(SlideError, match="given up"), open_confined(path, root=tmp_path) as slide:
        slide.read_level(1, (0, 0), (64, 64))


@pytest.mark.parametrize("how", [signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL])
def test_after_a_crash_every_call_says_so(slide_file: Path, how: int):
    with open_confined(slide_file) as slide, ThreadPoolExecutor(6) as pool:
        os.kill(slide.process.pid, how)
        for read in [pool.submit(slide.read, (0, 0), (64, 64), 0.5) for _ in range(12)]:
            with pytest.raises(SlideError, match="given up"):
                read.result(10)
    with pytest.raises(SlideError):
        slide.thumbnail()


def test_a_child_that_hangs_is_killed(slide_file: Path, monkeypatch: pytest.MonkeyPatch):
    with open_confined(slide_file) as slide:
        monkeypatch.setattr(confined, "PATIENCE", 1.0)
        pid = slide.process.pid
        os.kill(pid, signal.SIGSTOP)
        began = time.monotonic()
        with pytest.raises(SlideError, match="more than 8 seconds"):
            slide.read((0, 0), (64, 64), 0.5)
        assert time.monotonic() - began < 5
        assert waited(lambda: not alive(pid))


def test_the_kernel_ends_a_child_that_computes_too_long():
    code = "from sparsewsi.slides.sandbox import allow_seconds; allow_seconds(0)\nwhile True: pass"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=False)
    assert run.returncode == -signal.SIGXCPU


def test_closing_frees_whoever_is_reading(slide_file: Path):
    slide = open_confined(slide_file)
    os.kill(slide.process.pid, signal.SIGSTOP)
    errors: list[str] = []

    def read() -> None:
        try:
            slide.read((0, 0), (64, 64), 0.5)
        except SlideError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=read) for _ in range(6)]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    slide.close()
    for thread in threads:
        thread.join(5)
    assert errors == ["The slide has been closed."] * 6
    assert not alive(slide.process.pid)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_the_child_ends_with_its_parent_however_that_ends(slide_file: Path):
    code = "import sys, time; from sparsewsi.slides.confined import open_confined\n"
    code += "slide = open_confined(sys.argv[1]); print(slide.process.pid, flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, slide_file], cwd=ROOT, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert alive(pid)
        parent.kill()
    assert waited(lambda: not alive(pid))


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_forgotten_slide_leaves_no_child(slide_file: Path):
    pid = open_confined(slide_file).process.pid
    assert waited(lambda: not alive(pid))


@pytest.mark.parametrize("place", ["gone.svs", "no folder/gone.svs", "no/folder/at all/gone.dcm"])
def test_what_is_not_there_is_said_so_wherever_it_is_not(tmp_path, place):
    with pytest.raises(SlideError, match="no file at the path given"):
        open_confined(tmp_path / place)
