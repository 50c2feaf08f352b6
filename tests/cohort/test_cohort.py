"""A cohort's features: nothing lost, nothing done twice, and one bad slide spoils no other."""

import contextlib
import csv
import functools
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unicodedata
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tifffile
import torch

from sparsewsi.bags.foreign import load_bag
from sparsewsi.bags.patch_encoder import PatchEncoder
from sparsewsi.cohort import run
from sparsewsi.cohort.child import Child, extract_in_child
from sparsewsi.cohort.find import Job, find_rank, find_slides, share_jobs
from sparsewsi.cohort.report import Report, Row
from sparsewsi.cohort.slide import Order, Settings, extract_slide, find_finished, look_up, save_part, try_slide

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = Settings("mean-colour", 0.5, 64)


def mean_colour_encoder(seconds: float = 0.0, repeats: int = 1, interrupt_at: int = 0) -> PatchEncoder:
    """A real, tiny encoder, D = 3 * repeats, that takes its time; Ctrl-C is pressed at its call number interrupt_at."""
    calls = itertools.count(1)

    def forward(x: torch.Tensor) -> torch.Tensor:
        time.sleep(seconds)
        if next(calls) == interrupt_at:
            raise KeyboardInterrupt
        return x.mean((2, 3)).repeat(1, repeats)

    return PatchEncoder(
        "mean-colour",
        dim=3 * repeats,
        patch_size=64,
        mpp=0.5,
        licence="none",
        preprocess=lambda pixels: pixels.permute(0, 3, 1, 2).float() / 255,
        forward=forward,
        device=torch.device("cpu"),
        chunk=16,
    )


def write_slide(path: Path, size: int = 1024, tissue: bool = True, mpp: float | None = 0.5, seed: int = 0) -> Path:
    """A tiled JPEG TIFF with a disc of tissue."""
    path.parent.mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    pixels = np.full((size, size, 3), 244, np.uint8)
    if tissue:
        disc = (x - size / 2) ** 2 + (y - size / 2) ** 2 < (0.42 * size) ** 2
        texture = rng.integers(-40, 40, (size // 8, size // 8, 1)).repeat(8, axis=0).repeat(8, axis=1)
        pixels[disc] = np.clip(np.array([170, 90, 160]) + texture, 0, 255).astype(np.uint8)[disc]
    resolution = {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"} if mpp else {}
    tifffile.imwrite(path, pixels, tile=(256, 256), photometric="rgb", compression="jpeg", metadata=None, **resolution)
    return path


def zero_a_tile(path: Path, number: int) -> None:
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        start, length = page.dataoffsets[number], page.databytecounts[number]
    with path.open("r+b") as file:
        file.seek(start)
        file.write(bytes(length))


def outputs(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def job_of(path: Path) -> Job:
    (job,) = find_slides([str(path)])
    return job


# ---- which slides, and whose


def test_slides_are_found_in_folders_patterns_and_tables(tmp_path: Path):
    for name in (
        "a/x.svs",
        "a/x.png",
        "a/y.jpg",
        "b/z.tiff",
        "b/.hidden.svs",
        "b/notes.txt",
        "dicom/1.dcm",
        "dicom/2.dcm",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"12345")
    found = {job.stem: job for job in find_slides([str(tmp_path)])}
    assert sorted(found) == ["dicom", "x", "y", "z"]
    assert found["x"].path.suffix == ".svs"  # the PNG is its thumbnail
    assert (found["dicom"].path, found["dicom"].bytes) == (tmp_path / "dicom", 10)
    assert [job.stem for job in find_slides([str(tmp_path / "*" / "*.tiff")])] == ["z"]
    (tmp_path / "list.csv").write_text("slide, mpp\na/x.svs, 0.25\nb/z.tiff,\nb/no.svs, 0.5\nb/z.tiff,\na/y.jpg,?\n")
    listed = {job.stem: job for job in find_slides([str(tmp_path / "list.csv")], slide_mpp=0.4)}
    assert {stem: job.slide_mpp for stem, job in listed.items() if not job.problem} == {"x": 0.25, "z": 0.4}
    assert "No such file" in listed["no"].problem
    assert "write a number" in listed["y"].problem
    for bad in (str(tmp_path / "nowhere"), str(tmp_path / "*.bif")):
        with pytest.raises(ValueError, match="no slide, folder or CSV"):
            find_slides([bad])
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match="no slide in"):
        find_slides([str(tmp_path / "bare")])
    (tmp_path / "bare.mrxs").write_bytes(b"1")  # its data lie in the folder beside it
    for sources in ([str(tmp_path / "bare*")], [str(tmp_path / "bare"), str(tmp_path / "bare.mrxs")]):
        assert [job.stem for job in find_slides(sources)] == ["bare"]
    (tmp_path / "other.csv").write_text("path\na/x.svs\n")
    with pytest.raises(ValueError, match=r"column `slide`.*got path"):
        find_slides([str(tmp_path / "other.csv")])


@pytest.mark.parametrize("name", ["a" * 250, "ä" * 124, "1.2.840." + "9" * 240])
def test_a_slide_whose_features_would_have_too_long_a_name_says_so(tmp_path: Path, name: str):
    (tmp_path / f"{name}.svs").write_bytes(b"II*\0")
    over = len(f"{name}.safetensors".encode()) - 255
    assert f"{over} bytes too long" in job_of(tmp_path / f"{name}.svs").problem
    short = name[: len(name) * 9 // 10]
    (tmp_path / f"{short}.svs").write_bytes(b"II*\0")
    assert job_of(tmp_path / f"{short}.svs").problem == ""


@pytest.mark.parametrize("stored", ["NFC", "NFD"])
def test_a_table_finds_slides_however_their_accents_are_written(tmp_path: Path, stored: Any):
    typed: Any = "NFD" if stored == "NFC" else "NFC"
    (tmp_path / unicodedata.normalize(stored, "Müller.svs")).write_bytes(b"II*\0")
    (tmp_path / "list.csv").write_text(f"slide\n{unicodedata.normalize(typed, 'Müller.svs')}\n", encoding="utf-8")
    (job,) = find_slides([str(tmp_path / "list.csv")])
    assert job.problem == ""
    assert job.stem == unicodedata.normalize(stored, "Müller")


def test_a_pattern_names_a_slide_of_several_files_once_and_tells_what_it_leaves_out(tmp_path: Path, caplog):
    for name in ("d/1.dcm", "d/2.dcm", "x.svs", "x_label.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"12345")
    shell = [str(path) for path in sorted(tmp_path.rglob("*")) if path.is_file()]
    for sources in (shell, [str(tmp_path / "**" / "*")]):
        caplog.clear()
        assert [job.path.name for job in find_slides(sources)] == ["d", "x.svs"]
        assert "Left out: 2 files" in caplog.text
    with pytest.raises(ValueError, match="None of the 2 files is a slide"):
        find_slides([str(tmp_path / "notes.txt"), str(tmp_path / "x_label.png")])
    assert [job.stem for job in find_slides([str(tmp_path / "x_label.png")])] == ["x_label"], "one is what they say"


@pytest.mark.parametrize("written", ['"{}"', " '{}'", "URI", "\u201c{}\u201d"])
def test_slides_are_named_as_they_are_pasted(tmp_path: Path, written: str):
    path = tmp_path / "a b.svs"
    path.write_bytes(b"12345")
    text = path.as_uri() if written == "URI" else written.format(path)
    assert [job.path for job in find_slides([text])] == [path]
    (tmp_path / "list.csv").write_text(f'slide,mpp\n"{text.replace(chr(34), chr(34) * 2)}",0.5\n')
    assert [(job.path, job.problem) for job in find_slides([str(tmp_path / "list.csv")])] == [(path, "")]


@pytest.mark.parametrize("text", ['"a.svs,0.5\nb.svs,0.5\n', 'a.svs,"0.5\nb.svs,\n', 'a.svs,0.5\nb.svs,"0.5"5\n'])
def test_a_quotation_mark_that_is_not_closed_drops_no_slide_of_a_table(tmp_path: Path, text: str):
    (tmp_path / "list.csv").write_text("slide,mpp\n" + text)
    with pytest.raises(ValueError, match="quotation mark is not closed"):
        find_slides([str(tmp_path / "list.csv")])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("slide,mpp\na.svs,0,25\n", "more cells than the header"),
        ("slide,mpp\na.svs,1,25\n", "more cells than the header"),
        ("slide\na,b.svs\n", "more cells than the header"),
        ("slide;mpp\na.svs;0,25\n", "not semicolons"),
        ("slide\tmpp\na.svs\t0.25\n", "not tabs"),
        ("slide,slide_mpp\na.svs,0.25\n", "got slide_mpp"),
        ("slide,mpp_x,mpp_y\na.svs,0.25,0.25\n", "got mpp_x"),
        ("slide,mpp,MPP\na.svs,0.25,0.5\n", "got mpp"),
    ],
)
def test_a_table_is_not_read_as_another(tmp_path: Path, text: str, words: str):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ValueError, match=words):
        find_slides([str(tmp_path / "t.csv")])


def test_a_path_that_none_can_be_fails_alone(tmp_path: Path):
    (tmp_path / "a.svs").write_bytes(b"x")
    (tmp_path / "t.csv").write_text("slide,mpp\na\0.svs,0.25\na.svs,0.25\n")
    assert {job.stem: bool(job.problem) for job in find_slides([str(tmp_path / "t.csv")])} == {"a\0": True, "a": False}


@pytest.mark.parametrize("mpp", ["nan", "-0.5", "0", "inf", "0,5"])
def test_a_table_in_any_case_states_numbers(tmp_path: Path, mpp: str):
    (tmp_path / "a.svs").write_bytes(b"1")
    (tmp_path / "list.csv").write_text(f'Slide , MPP\na.svs,"{mpp}"\n')
    (job,) = find_slides([str(tmp_path / "list.csv")])
    assert "write a number" in job.problem


def test_two_slides_of_one_name_are_both_told(tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.svs").write_bytes(b"1")
    jobs = find_slides([str(tmp_path)])
    assert len(jobs) == 2
    assert all("2 slides would write x.safetensors" in job.problem and "b/x.svs" in job.problem for job in jobs)


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="POSIX permissions")
def test_what_may_not_be_read_is_told_and_the_rest_is_done():
    encoder = mean_colour_encoder()
    with tempfile.TemporaryDirectory(dir="/tmp") as name:  # pytest's own folder is closed to other users
        slides, out = Path(name), Path(name, ".features")
        for folder in (slides / "closed", out):
            folder.mkdir()
        assert (
            try_slide(job_of(write_slide(slides / "good.tiff", 512)), Order(SETTINGS, out), encoder).outcome == "done"
        )
        write_slide(slides / "locked.tiff", 512).chmod(0)
        slides.chmod(0o755), out.chmod(0o777), (slides / "closed").chmod(0)
        user = os.geteuid()
        try:
            if user == 0:
                os.seteuid(65534)  # root may read anything
            jobs = {job.stem: job for job in find_slides([name])}
            assert "lacks the permission" in try_slide(jobs["locked"], Order(SETTINGS, out), encoder).warnings
        finally:
            os.seteuid(user)
            (slides / "closed").chmod(0o755)
        work = functools.partial(extract_in_child, order=Order(SETTINGS, out))
        run.extract_all([jobs["closed"], jobs["good"]], out, work)
        assert list(outputs(out)) == ["good.safetensors"]
        with (out / "report.csv").open(newline="") as file:
            reported = {row["slide"]: row for row in csv.DictReader(file)}
        assert {stem: row["outcome"] for stem, row in reported.items()} == {"closed": "failed", "good": "done"}
        assert "Permission denied" in reported["closed"]["warnings"]


def test_ranks_come_from_torchrun_a_slurm_array_or_both():
    assert find_rank({}) == (0, 1)
    assert find_rank({"RANK": "3", "WORLD_SIZE": "4"}) == (3, 4)
    array = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "5"}
    assert find_rank(array) == (2, 4)
    assert find_rank({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}) == (0, 1)  # a batch script, before any srun
    step = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4"}
    assert find_rank(step) == (3, 4)
    assert find_rank(step | {"RANK": "1", "WORLD_SIZE": "2"}) == (1, 2)
    assert find_rank(array | {"RANK": "1", "WORLD_SIZE": "2"}) == (5, 8)
    with pytest.raises(ValueError, match="one range"):
        find_rank({"SLURM_ARRAY_TASK_ID": "90", "SLURM_ARRAY_TASK_COUNT": "3"})


def test_a_thousand_slides_are_shared_evenly_and_each_once():
    rng = random.Random(0)
    jobs = [Job(Path(f"{i}.svs"), str(i), bytes=int(rng.lognormvariate(20, 1))) for i in range(1000)]
    parts = [share_jobs(jobs, rank, 8) for rank in range(8)]
    assert sorted(job.stem for part in parts for job in part) == sorted(job.stem for job in jobs)
    loads = [sum(job.bytes for job in part) for part in parts]
    assert max(loads) < 1.01 * min(loads)
    assert [job.stem for job in share_jobs(jobs[::-1], 3, 8)] == [job.stem for job in parts[3]]
    empty = [Job(Path(f"{i}"), str(i)) for i in range(10)]
    assert [len(share_jobs(empty, rank, 2)) for rank in range(2)] == [5, 5]


@pytest.mark.skipif(os.name != "posix", reason="names are bytes, links need no permission")
def test_odd_names_links_and_strangers_in_the_way(tmp_path: Path):
    slides, out = tmp_path / "slides", tmp_path / "out"
    out.mkdir()
    names = ["Präparat 1 (HE)", "we[i]rd*%s", "a.b.c", os.fsdecode(b"latin-\xfc")]
    for name in names:
        write_slide(slides / f"{name}.tiff", 512)
    write_slide(tmp_path / "elsewhere" / "linked.tiff", 512)
    (slides / "to a folder").symlink_to(tmp_path / "elsewhere")
    (slides / "to itself").symlink_to(slides)
    (slides / "to a slide.tiff").symlink_to(slides / "a.b.c.tiff")
    (slides / "to nothing.svs").symlink_to(tmp_path / "nothing")
    write_slide(slides / "half.tiff", 512)
    jobs = find_slides([str(slides)])
    assert sorted(job.stem for job in jobs) == sorted([*names, "half", "linked", "to a slide", "to nothing"])
    report = Report(out, 0)
    for _ in range(2):
        for job in jobs:
            row = look_up(job, out) or try_slide(job, Order(SETTINGS, out, 0.0), mean_colour_encoder())
            report.add_if_new(row)
        whole = out / "half.safetensors"
        whole.write_bytes(whole.read_bytes()[:-40])
    report.finish()
    rows = Report(out, 0).rows
    assert {stem for stem, row in rows.items() if row.outcome != "done"} == {"half", "to nothing", names[3]}
    assert "rename it" in rows[names[3]].warnings
    assert "no whole feature file" in rows["half"].warnings
    assert "No such file" in rows["to nothing"].warnings
    with (out / "report.csv").open(newline="", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == len(jobs)
    assert len(list(out.glob("*.safetensors"))) == len(jobs) - 2


def test_a_folder_holds_features_of_one_kind(tmp_path: Path):
    run.check_settings(tmp_path, Settings("misspelt", 0.5, 64))
    run.check_settings(tmp_path, SETTINGS)  # nothing was extracted
    (tmp_path / "a.safetensors").touch()
    run.check_settings(tmp_path, SETTINGS)
    with pytest.raises(
        ValueError, match=r"encoder mean-colour \(now uni\), mpp 0.5 \(now 0.25\); choose another --out"
    ):
        run.check_settings(tmp_path, Settings("uni", 0.25, 64))


# ---- one slide


def test_parts_give_the_same_file_as_one_go(tmp_path: Path):
    job = job_of(write_slide(tmp_path / "TCGA-1.tiff"))
    for name, part_seconds in (("whole", 1e9), ("parts", 0.0)):
        (tmp_path / name).mkdir()
        row = extract_slide(job, Order(SETTINGS, tmp_path / name, part_seconds), mean_colour_encoder())
        assert (row.slide, row.outcome, row.slide_mpp, row.mpp_source) == ("TCGA-1", "done", 0.5, "tiff resolution")
        assert find_finished(job, tmp_path / name) is not None
    assert outputs(tmp_path / "whole") == outputs(tmp_path / "parts")
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == ["TCGA-1.safetensors"]
    bag = load_bag(tmp_path / "parts" / "TCGA-1.safetensors")
    assert len(bag.features) == row.patches > 100
    assert "TCGA" not in bag.slide


def test_features_bear_the_name_that_an_encoder_gives_itself(tmp_path: Path):
    job = job_of(write_slide(tmp_path / "one.tiff"))
    (tmp_path / "vit").mkdir()
    settings = replace(SETTINGS, encoder=f"hf:{tmp_path / 'vit'}")
    extract_slide(job, Order(settings, tmp_path), mean_colour_encoder())
    assert load_bag(tmp_path / "one.safetensors").encoder == "hf:vit"


def test_an_interrupted_slide_goes_on_where_it_was(tmp_path: Path):
    job = job_of(write_slide(tmp_path / "a.tiff"))
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir(), broken.mkdir()
    extract_slide(job, Order(SETTINGS, whole), mean_colour_encoder())
    with pytest.raises(KeyboardInterrupt):
        extract_slide(job, Order(SETTINGS, broken, 0.0), mean_colour_encoder(interrupt_at=7))
    parts = sorted((broken / ".a.parts").glob("*.safetensors"))
    assert len(parts) == 3
    assert find_finished(job, broken) is None
    # The last part is damaged, and one of other settings lies about: neither is used.
    parts[2].write_bytes(parts[2].read_bytes()[:100])
    shutil.copy(parts[0], parts[0].with_name(f"{10**6:09d}.safetensors"))
    row = extract_slide(job, Order(SETTINGS, broken, 1e9), mean_colour_encoder())
    assert row.resumed_at == 64
    assert outputs(broken) == outputs(whole)
    assert not (broken / ".a.parts").exists()


def test_parts_of_other_settings_are_not_used(tmp_path: Path):
    job = job_of(write_slide(tmp_path / "a.tiff"))
    (tmp_path / ".a.parts").mkdir()
    save_part(tmp_path / ".a.parts", 0, "another slide's", torch.zeros(5, 3).half(), torch.ones(5).bool())
    assert extract_slide(job, Order(SETTINGS, tmp_path), mean_colour_encoder()).resumed_at == 0


def test_patches_in_damaged_tiles_are_left_out_and_listed(tmp_path: Path):
    intact, damaged = write_slide(tmp_path / "a.tiff"), tmp_path / "b.tiff"
    shutil.copy(intact, damaged)
    zero_a_tile(damaged, 6)  # x 512 to 768, y 256 to 512
    rows = [
        extract_slide(job_of(path), Order(SETTINGS, tmp_path, 0.0), mean_colour_encoder()) for path in (intact, damaged)
    ]
    lost = [[x, y] for y in range(256, 512, 64) for x in range(512, 768, 64)]
    assert rows[0].unreadable == []
    assert sorted(rows[1].unreadable) == sorted(lost)
    assert "16 of" in rows[1].warnings
    a, b = (load_bag(tmp_path / f"{name}.safetensors") for name in "ab")
    left = [i for i, xy in enumerate(a.coords.tolist()) if xy not in lost]
    assert torch.equal(a.coords[left], b.coords)
    assert torch.equal(a.features[left], b.features)


def test_what_was_made_of_another_file_is_made_again_and_strangers_are_left_alone(tmp_path: Path):
    path = write_slide(tmp_path / "a.tiff", 512)
    job = job_of(path)
    extract_slide(job, Order(SETTINGS, tmp_path), mean_colour_encoder())
    assert find_finished(job, tmp_path) is not None
    assert find_finished(Job(path, "a", slide_mpp=0.4, bytes=job.bytes), tmp_path) is None
    with path.open("ab") as file:
        file.write(b"more")  # as when a copy had not been complete
    assert find_finished(job_of(path), tmp_path) is None
    (tmp_path / "a.safetensors").write_bytes(b"something else")
    with pytest.raises(ValueError, match="Delete or move it"):
        find_finished(job, tmp_path)


def _slowly(path: Path, out: Path) -> None:
    extract_slide(job_of(path), Order(SETTINGS, out, 0.0), mean_colour_encoder(seconds=0.02))


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_killed_at_five_random_moments_it_ends_with_the_same_file(tmp_path: Path):
    path = write_slide(tmp_path / "a.tiff", 2048)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir(), killed.mkdir()
    _slowly(path, whole)
    context = multiprocessing.get_context("forkserver")  # a process without threads to fork from
    context.set_forkserver_preload([__name__])
    rng = random.Random(0)
    for _ in range(5):
        before = set(killed.glob(".a.parts/*"))
        process = context.Process(target=_slowly, args=(path, killed))
        process.start()
        deadline = time.monotonic() + 60
        while set(killed.glob(".a.parts/*")) == before and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.06))  # a part takes 0.04 s
        process.kill()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL  # it was at work
        assert not outputs(killed)
    context.Process(target=_slowly, args=(path, killed)).run()
    assert outputs(killed) == outputs(whole)
    assert [entry.name for entry in killed.iterdir()] == ["a.safetensors"]


def test_a_full_disk_is_reported_and_with_room_again_the_rest_is_done(tmp_path: Path):
    encoder = mean_colour_encoder(repeats=200)

    def attempt(job: Job, out: Path) -> Row:
        return try_slide(job, Order(SETTINGS, out, 0.0), encoder)

    slides, disk, whole = tmp_path / "slides", tmp_path / "disk", tmp_path / "whole"
    for folder in (slides, disk, whole):
        folder.mkdir()
    jobs = [job_of(write_slide(slides / f"{name}.tiff", seed=i)) for i, name in enumerate("abcd")]
    assert all(attempt(job, out=whole).outcome == "done" for job in jobs)
    room = 2.5 * len(outputs(whole)["a.safetensors"])  # a slide needs twice its size: its parts, then its file
    mount = ["mount", "-t", "tmpfs", "-o", f"size={room:.0f}", "tmpfs", str(disk)]
    try:
        subprocess.run(mount, check=True, capture_output=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        pytest.skip("a small file system can be mounted by root only")
    try:
        report = Report(disk, 0)
        rows = [attempt(job, out=disk) for job in jobs]
        for row in rows:
            report.add(row)
        report.finish()
        outcomes = [row.outcome for row in rows]
        assert outcomes[0] == "done"
        assert "failed" in outcomes
        assert all("No space left" in row.warnings for row in rows if row.outcome == "failed")
        assert outputs(disk).items() < outputs(whole).items()  # what is there is whole
        assert not [path for path in disk.rglob("*") if path.suffix == ".partial"]
        subprocess.run(["mount", "-o", "remount,size=16m", str(disk)], check=True, timeout=30)
        for job in jobs:
            if find_finished(job, disk) is None:
                report.add(attempt(job, out=disk))
        report.finish()
        assert outputs(disk) == outputs(whole)
        with (disk / "report.csv").open(newline="") as file:
            assert [row["outcome"] for row in csv.DictReader(file)] == ["done"] * 4
    finally:
        subprocess.run(["umount", str(disk)], check=True, timeout=30)


# ---- the child, the report


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_child_that_dies_or_stands_still_is_replaced():
    child = Child(stall_seconds=1.5)
    try:
        with pytest.raises(BrokenProcessPool):
            child.call(os._exit, 139)
        with pytest.raises(BrokenProcessPool):
            child.call(time.sleep, 600)
    finally:
        child.close()


def test_a_report_survives_a_torn_line_and_a_full_disk(tmp_path: Path, monkeypatch, capsys):
    report = Report(tmp_path, 0)
    report.add(Row("a", "failed", warnings="ü"))
    with (tmp_path / "report" / "0.jsonl").open("a") as file:
        file.write('{"slide": "b", "outc')  # killed here
    report = Report(tmp_path, 0)
    assert list(report.rows) == ["a"]
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda *args, **kwargs: (_ for _ in ()).throw(OSError(28, "No space left")))
        report.add(Row("c", "done"))
    assert "No space left" in capsys.readouterr().err
    report.add(Row("a", "done", patches=5, unreadable=[[1, 2]]))
    report.finish()
    with (tmp_path / "report.csv").open(newline="") as file:
        rows = [(row["slide"], row["outcome"], row["patches"], row["unreadable"]) for row in csv.DictReader(file)]
    assert rows == [("a", "done", "5", "1"), ("c", "done", "0", "0")]


# ---- all of it


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cohort")
    for i in range(2):
        write_slide(folder / f"good-{i}.tiff", seed=i)
    write_slide(folder / "blank.tiff", 512, tissue=False)
    write_slide(folder / "nompp.tiff", 512, mpp=None)
    zero_a_tile(write_slide(folder / "zeroed.tiff"), 5)
    whole = (folder / "good-0.tiff").read_bytes()
    (folder / "short.tiff").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.svs").touch()
    return folder


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_a_cohort_with_bad_slides_killed_and_started_again(cohort: Path, tmp_path: Path, capsys):
    command = [str(cohort), "--max-patches", "12", "--device", "cpu", "--part-seconds", "0", "--out"]
    assert run.main([*command, str(tmp_path / "whole")]) == 1
    with (tmp_path / "whole" / "report.csv").open(newline="") as file:
        rows = {row["slide"]: row for row in csv.DictReader(file)}
    outcomes = {stem: row["outcome"] for stem, row in rows.items()}
    good = {"good-0": "done", "good-1": "done", "zeroed": "done", "blank": "empty"}
    assert outcomes == good | dict.fromkeys(("nompp", "short", "empty"), "failed")
    for stem, words in (("nompp", "slide_mpp"), ("short", "damaged"), ("empty", "empty"), ("blank", "blank")):
        assert words in rows[stem]["warnings"], stem
    assert rows["good-0"]["patches"] == "12"
    assert int(rows["zeroed"]["unreadable"]) > 0

    again = [sys.executable, "-m", "sparsewsi", "extract", *command, str(tmp_path / "killed")]
    process = subprocess.Popen(again, cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not outputs(tmp_path / "killed") and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()  # the parent; the child ends by itself
    process.wait()
    assert run.main([*command, str(tmp_path / "killed")]) == 1
    assert outputs(tmp_path / "killed") == outputs(tmp_path / "whole")
    names = {path.name for path in (tmp_path / "killed").iterdir()}
    assert names == {path.name for path in (tmp_path / "whole").iterdir()}
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").glob("*.safetensors")}
    reported = (tmp_path / "killed" / "report" / "0.jsonl").read_text()

    assert run.main([*command, str(tmp_path / "killed")]) == 1  # only those that failed are tried again
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").glob("*.safetensors")}
    assert (tmp_path / "killed" / "report" / "0.jsonl").read_text() == reported
    capsys.readouterr()
    assert run.main([str(cohort), "--max-patches", "9", "--out", str(tmp_path / "killed")]) == 2
    assert "max_patches 12 (now 9)" in capsys.readouterr().err
    assert json.loads((tmp_path / "killed" / "extract.json").read_text())["max_patches"] == 12


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_ray_gives_the_same_files_though_a_reader_and_an_encoder_are_killed(tmp_path: Path):
    pytest.importorskip("ray", reason="needs the extra [cluster]")
    for i in range(3):
        write_slide(tmp_path / "slides" / f"{i}.tiff", 1024 + 256 * i, seed=i)
    zero_a_tile(write_slide(tmp_path / "slides" / "zeroed.tiff"), 5)
    write_slide(tmp_path / "slides" / "nompp.tiff", 512, mpp=None)
    command = [str(tmp_path / "slides"), "--part-seconds", "0", "--out"]
    assert run.main([*command, str(tmp_path / "processes"), "--device", "cpu"]) == 1
    on_ray = [sys.executable, "-m", "sparsewsi", "extract", *command, str(tmp_path / "ray")]
    on_ray += ["--engine", "ray", "--encoders", "1"]
    # Ray's workers step back for all else; on a busy machine they would never come to work.
    environment = os.environ | {"RAY_worker_niceness": "0"}
    cwd = ROOT
    process = subprocess.Popen(on_ray, cwd=cwd, env=environment, stderr=subprocess.DEVNULL)
    try:
        killed = kill_a_descendant(process, "ray::MapBatches(_read_on_ray)")
        killed += kill_a_descendant(process, "ray::MapWorker(MapBatches(_EncodeOnRay)).submit")
        assert process.wait(200) == 1
    finally:
        process.kill()
    assert killed == 2
    assert outputs(tmp_path / "ray") == outputs(tmp_path / "processes")
    tables = [rows_of_report(tmp_path / engine) for engine in ("ray", "processes")]
    assert tables[0] == tables[1]
    assert tables[0]["nompp"]["outcome"] == "failed"


def rows_of_report(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "report.csv").open(newline="") as file:
        return {row["slide"]: row | {"seconds": "", "time": ""} for row in csv.DictReader(file)}


def kill_a_descendant(process: subprocess.Popen, title: str) -> int:
    """Wait until there is a process of that title below this one and kill it; 0 if there never is."""
    family, deadline = psutil.Process(process.pid), time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        for one in family.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if "".join(one.cmdline()).startswith(title):
                    one.kill()
                    return 1
        time.sleep(0.01)
    return 0
