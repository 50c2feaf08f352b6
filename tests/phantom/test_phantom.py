"""Phantom slides: the same pixels however they are cut, a real pyramidal TIFF, and a ground truth that is true."""

import json
import subprocess
import sys
import time
import tracemalloc
from collections import Counter

import numpy as np
import openslide
import pytest

from sparsewsi import phantom
from sparsewsi.phantom import BACKGROUNDS, KINDS, NEEDLES, ground_truth, patches, phantom_map, render, write_phantom
from sparsewsi.phantom import slide as slide_module
from sparsewsi.phantom.kinds import KIND_IDS, KIND_NAMES, NEEDLE_SHARE
from sparsewsi.phantom.paint import border, only_glass, paint
from sparsewsi.phantom.plan import contents


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A written phantom of 3,000 px: (path, ground truth). 3,000 is no multiple of a TIFF tile."""
    path = tmp_path_factory.mktemp("phantom") / "p.tiff"
    return path, write_phantom(path, seed=3, size=3_000)


def grid(size: int, patch_size: int) -> np.ndarray:
    steps = np.arange(0, size - patch_size + 1, patch_size)
    return np.stack(np.meshgrid(steps, steps), -1).reshape(-1, 2)


def test_same_seed_same_pixels_and_another_seed_other_pixels():
    first, again, other = (phantom_map(seed, 2_048) for seed in (5, 5, 6))
    window = 700, 800, 300, 200
    assert np.array_equal(render(first, *window), render(again, *window))
    assert not np.array_equal(render(first, *window), render(other, *window))
    assert first.needles == again.needles


def test_a_version_always_gives_the_same_phantoms():
    """Trained models and published figures rest on these pixels: whoever changes them raises VERSION."""
    assert phantom.VERSION == 1
    slide = phantom_map(7, 4_096, 0.25)
    assert (slide.dominant, *slide.others) == ("adipose", "stroma_fibrous", "smooth_muscle")
    assert [(needle.kind, needle.x, needle.y, needle.w, needle.h) for needle in slide.needles] == [
        ("necrosis", 1_216, 704, 768, 576),
        ("lymphoid", 3_072, 2_176, 640, 704),
        ("carcinoma", 2_048, 3_008, 704, 640),
    ]
    pixels = render(slide, 1_216, 704, 300, 300).reshape(3, 100, 3, 100, 3).mean((1, 3))
    assert pixels.mean((0, 1)) == pytest.approx([193.99, 144.48, 191.53], abs=0.02)
    grey = [172.70, 173.49, 181.87, 174.30, 182.08, 178.20, 178.91, 172.80, 175.64]
    assert pixels.mean(-1).ravel() == pytest.approx(grey, abs=0.02)


@pytest.mark.parametrize(("seed", "mpp"), [(10, 0.5), (4, 0.5), (7, 0.25), (9, 1.0)])
def test_any_cut_gives_the_same_pixels(seed, mpp):
    slide = phantom_map(seed, 2_400, mpp)
    needle = slide.needles[0]
    x, y = max(0, needle.x - 200), max(0, needle.y - 200)
    whole = render(slide, x, y, 620, 610)
    assert len(np.unique(whole)) > 50  # there is something to cut
    rng = np.random.default_rng(seed)
    for _ in range(6):
        left, top = (int(corner) for corner in rng.integers(0, 450, 2))
        w, h = (int(side) for side in rng.integers(1, 160, 2))
        part = render(slide, x + left, y + top, w, h)
        assert np.array_equal(part, whole[top : top + h, left : left + w])


def test_skipped_glass_equals_painted_glass():
    slide = phantom_map(1, 2_048)
    corner = np.empty((64, 64, 3), np.uint8)
    assert only_glass(slide, 0, 0, 64, 64)
    paint(slide, 0, 0, corner)
    wide = render(slide, 0, 0, 2_048, 512)  # its second block holds tissue or not, the corner is the same
    assert np.array_equal(wide[:64, :64], corner)


def test_openslide_reads_the_file(small):
    path, truth = small
    with openslide.OpenSlide(path) as slide:
        assert slide.dimensions == (3_000, 3_000)
        assert slide.level_count >= 3
        assert [round(d) for d in slide.level_downsamples[:3]] == [1, 4, 16]
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.5, rel=1e-3)
        assert float(slide.properties["openslide.mpp-y"]) == pytest.approx(0.5, rel=1e-3)
        stated = json.loads(slide.properties["tiff.ImageDescription"])["sparsewsi_phantom"]
        assert stated == {"seed": 3, "size": 3_000, "version": phantom.VERSION}
        needle = truth.needles[0]
        read = np.asarray(slide.read_region((needle.x, needle.y), 0, (300, 300)).convert("RGB"), float)
        drawn = render(truth.map, needle.x, needle.y, 300, 300).astype(float)
        assert np.abs(read - drawn).mean() < 8  # JPEG, nothing else
        for level, side in ((1, 750), (2, 187)):
            assert slide.level_dimensions[level] == (side, side)
            shrunk = np.asarray(slide.read_region((0, 0), level, (side, side)).convert("RGB"), float)
            factor = 4**level
            full = np.asarray(slide.read_region((0, 0), 0, (side * factor,) * 2).convert("RGB"), float)
            mean = full.reshape(side, factor, side, factor, 3).mean((1, 3))
            assert np.abs(shrunk - mean).mean() < 3


def test_a_written_phantom_brings_its_truth(small):
    path, truth = small
    loaded = phantom.load_truth(path)
    coords = grid(3_000, 224)
    assert loaded.needles == truth.needles
    assert np.array_equal(loaded.label_at(coords, 224), truth.label_at(coords, 224))
    record = json.loads(phantom.truth_path(path).read_text())
    assert record["dominant"] == truth.dominant
    assert record["present"] == list(truth.present)
    with pytest.raises(ValueError, match="write_phantom"):
        phantom.load_truth(path.with_name("other.tiff"))


@pytest.mark.parametrize("seed", range(6))
def test_truth_agrees_with_the_map(seed):
    size = 8_000
    truth = ground_truth(seed, size)
    coords = grid(size, 224)
    labels, shares = truth.label_at(coords, 224), truth.shares(coords, 224)
    assert np.allclose(shares.sum(1), 1)
    tissue = labels != "background"
    counts = Counter(labels[tissue])
    assert counts.most_common(1)[0][0] == truth.dominant
    assert counts[truth.dominant] > 0.4 * tissue.sum()
    assert set(counts) <= {truth.dominant, *truth.map.others, *truth.present}
    for kind in truth.present:  # a focus covers 4 to 12 patches; by the 30 % rule a few more are called by it
        assert 2 <= counts[kind] <= 30
        assert 0.001 < counts[kind] / tissue.sum() < 0.06
    for (x, y), label, share in zip(coords, labels, shares):
        if label in NEEDLES:
            assert share[KIND_NAMES.index(label)] >= NEEDLE_SHARE
            boxes = [box for box in truth.needles if box.kind == label]
            slack = 32  # borders wobble
            assert any(
                x < box.x + box.w + slack
                and x + 224 > box.x - slack
                and y < box.y + box.h + slack
                and y + 224 > box.y - slack
                for box in boxes
            )


def test_labels_describe_the_pixels():
    """Blood is the one kind that colour alone tells: patches called blood are redder than all others."""
    truth = next(t for t in (ground_truth(seed, 4_000) for seed in range(50)) if "blood" in t.present)
    coords = grid(4_000, 224)
    labels = truth.label_at(coords, 224)

    def redness(xy):
        pixels = render(truth.map, int(xy[0]), int(xy[1]), 224, 224).astype(float)
        return (pixels[..., 0] - pixels[..., 1:].mean(-1)).mean()

    blood = [redness(xy) for xy in coords[labels == "blood"]]
    rest = [redness(xy) for xy in coords[(labels != "blood") & (labels != "background")][::6]]
    assert np.mean(blood) > np.mean(rest) + 10


def test_kinds_are_balanced_over_seeds():
    slides = [contents(seed) for seed in range(1_000, 1_400)]
    dominant = Counter(kinds[0] for kinds in slides)
    assert all(dominant[kind] == 100 for kind in BACKGROUNDS)
    present = Counter(kind for kinds in slides for kind in kinds[2])
    assert all(120 < present[kind] < 200 for kind in NEEDLES)  # two of five on average: 160
    assert set(Counter(len(kinds[2]) for kinds in slides)) == {1, 2, 3}
    for kind in NEEDLES:  # needles tell nothing of the dominant kind
        per = Counter(kinds[0] for kinds in slides if kind in kinds[2])
        assert all(20 < per[other] < 62 for other in BACKGROUNDS)


def test_large_phantoms_hide_more_foci():
    small, large = ground_truth(11, 8_000), ground_truth(11, 40_000)
    assert len(large.needles) > len(small.needles)
    assert large.present == small.present
    assert all(n.x >= 0 and n.y >= 0 and n.x + n.w <= 40_000 and n.y + n.h <= 40_000 for n in large.needles)


def test_patches_are_seeded_and_differ_by_kind():
    means = {}
    for kind in KINDS:
        pixels = patches(12, kind, 4, mixed=0.0)
        assert pixels.shape == (4, 224, 224, 3)
        assert pixels.dtype == np.uint8
        assert np.array_equal(pixels[:2], patches(12, kind, 2, mixed=0.0))
        means[kind] = pixels.mean()
    assert means["background"] == max(means.values())
    assert means["adipose"] > means["mucin"] > means["stroma_fibrous"]
    assert patches(12, "mucin", 1, size=96).shape == (1, 96, 96, 3)


def test_mixed_patches_keep_enough_of_their_kind():
    rng = np.random.default_rng(0)
    for kind, least in (("carcinoma", NEEDLE_SHARE), ("adipose", 0.5)):
        for _ in range(20):
            labels = border(np.full((12, 12), KIND_IDS[kind], np.uint8), kind, rng)
            inner = labels[2:9, 2:9]
            assert (inner == KIND_IDS[kind]).mean() >= least
            assert len(np.unique(labels)) == 2


def test_memory_does_not_hold_the_slide(tmp_path, monkeypatch):
    """A 10,000 px phantom is 300 MB of pixels; strips, one row of tiles per level and the JPEG bytes are kept."""
    monkeypatch.setattr(slide_module, "paint", lambda slide, x, y, out: out.fill(200))
    tracemalloc.start()
    try:
        write_phantom(tmp_path / "flat.tiff", seed=2, size=10_000)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 110e6


def test_killed_writer_leaves_no_file_at_the_target(tmp_path):
    target = tmp_path / "killed.tiff"
    code = f"from sparsewsi.phantom import write_phantom; write_phantom({str(target)!r}, 3, 8_000)"
    writer = subprocess.Popen([sys.executable, "-c", code])
    try:
        until = time.monotonic() + 60
        while time.monotonic() < until and not any(p.stat().st_size for p in tmp_path.glob(".*.partial")):
            assert writer.poll() is None
            time.sleep(0.05)
        assert list(tmp_path.glob(".*.partial"))  # it was in the middle of it
    finally:
        writer.kill()
        writer.wait()
    assert not target.exists()
    assert not phantom.truth_path(target).exists()


def test_failed_writer_cleans_up(tmp_path):
    def stop(done, total):
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        write_phantom(tmp_path / "failed.tiff", seed=3, size=1_500, progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_example_is_made_once(tmp_path, monkeypatch):
    monkeypatch.setattr(slide_module, "EXAMPLE_SIZE", 1_024)
    monkeypatch.setenv("SPARSEWSI_CACHE", str(tmp_path))
    first = phantom.example_slide()
    stamp = first.stat().st_mtime_ns
    assert first.parent == tmp_path
    assert phantom.example_slide() == first
    assert first.stat().st_mtime_ns == stamp


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="40000"):
        phantom_map(1, 50_000)
    with pytest.raises(ValueError, match="um per px"):
        phantom_map(1, 2_048, mpp=8.0)
    with pytest.raises(ValueError, match="carcinoma"):
        patches(1, "tumor", 1)
