"""A bag is a value, and its file is whole or absent."""

import copy
import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparsewsi.bags.bag import Bag, check_bag, save_bag
from sparsewsi.bags.foreign import load_bag


def test_a_bag_is_a_value(bag: Bag, assert_same):
    assert_same(bag, copy.deepcopy(bag))
    assert_same(bag, pickle.loads(pickle.dumps(bag)))
    rounded = replace(bag, features=bag.features.double(), coords=bag.coords.long())
    assert_same(bag, rounded)


def test_a_bag_refuses_what_does_not_fit(bag: Bag):
    with pytest.raises(ValueError, match=r"coords must be \(N, 2\)"):
        replace(bag, coords=bag.coords[:4])
    with pytest.raises(ValueError, match="floating-point"):
        replace(bag, features=bag.features.int())
    with pytest.raises(ValueError, match="patch_size"):
        replace(bag, patch_size=0)
    for value in (float("nan"), float("inf"), 1e6):  # 1e6 is beyond float16
        features = bag.features.float().clone()
        features[3, 2] = value
        with pytest.raises(ValueError, match=r"1 of 5 patches .* row 3"):
            replace(bag, features=features)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"coords": torch.tensor([[2**31 + 5, 0]])}, "within 32 bits"),
        ({"coords": torch.tensor([[0.5, 0.0]])}, "fractions"),
        ({"coords": torch.tensor([[float("nan"), 0.0]])}, "NaN"),
        ({"coords": torch.tensor([[True, False]])}, "whole numbers"),
        ({"patch_size": 224.5}, "patch_size"),
        ({"patch_size": float("nan")}, "patch_size"),
        ({"patch_size": float("inf")}, "patch_size"),
        ({"mpp": -1.0}, "mpp"),
        ({"slide_mpp": float("nan")}, "slide_mpp"),
    ],
)
def test_a_bag_refuses_what_nothing_can_have(changes: dict, match: str):
    facts = {"features": torch.zeros(1, 4), "coords": torch.zeros(1, 2, dtype=torch.int32), "patch_size": 224}
    with pytest.raises(ValueError, match=match):
        Bag(**facts | {"mpp": 0.5, "encoder": "e", "slide": "s"} | changes)


def test_check_bag_compares_encoder_and_dimension(bag: Bag):
    check_bag(bag, "conch", 8)
    check_bag(replace(bag, encoder="unknown"), "conch", 8)
    with pytest.raises(ValueError, match="encoded with conch, but the model was trained on uni"):
        check_bag(bag, "uni", 8)
    with pytest.raises(ValueError, match=r"dimension 8 .* takes 512"):
        check_bag(replace(bag, encoder="unknown"), "conch", 512)


# ---- its file


def test_round_trip(bag: Bag, tmp_path: Path, assert_same):
    for suffix in (".safetensors", ".bag"):  # the content decides, not the name
        path = tmp_path / f"new folder/ä{suffix}"
        save_bag(bag, path)
        assert_same(bag, load_bag(path))
        assert [entry.name for entry in path.parent.iterdir() if "partial" in entry.name] == []


def test_a_bag_of_another_version_is_refused(bag: Bag, tmp_path: Path):
    from safetensors.torch import save_file

    tensors = {"features": bag.features, "coords": bag.coords}
    save_file(tensors, tmp_path / "a", metadata={"sparsewsi_bag": json.dumps({"slide_size": None, "colour": 1})})
    with pytest.raises(ValueError, match="cannot read"):
        load_bag(tmp_path / "a")
    save_file(tensors, tmp_path / "b")
    with pytest.raises(ValueError, match="no bag"):
        load_bag(tmp_path / "b")


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_a_killed_writer_leaves_no_partial_file(bag: Bag, tmp_path: Path, assert_same):
    """Killed when everything is written but nothing is renamed: no new file, and the old one untouched."""
    old = tmp_path / "old.safetensors"
    save_bag(bag, old)
    program = f"""
        import os, threading, time, torch
        from pathlib import Path
        from sparsewsi.bags.bag import Bag, save_bag
        from sparsewsi.bags.foreign import write_trident_h5
        reached = threading.Semaphore(0)
        def stuck(handle):
            reached.release()
            time.sleep(600)
        os.fsync = stuck
        folder = Path({str(tmp_path)!r})
        bag = Bag(torch.ones(1000, 64), torch.zeros(1000, 2), 224, 0.5, "conch", "slide")
        for write, name in ((save_bag, "old.safetensors"), (save_bag, "new.safetensors"),
                            (write_trident_h5, "new.h5")):
            threading.Thread(target=write, args=(bag, folder / name)).start()
        for _ in range(3):
            reached.acquire()
        print("written", flush=True)
        time.sleep(600)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "written"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert len(list(tmp_path.glob("*.partial")) + list(tmp_path.glob(".*.partial"))) >= 3  # it did write
    assert not (tmp_path / "new.safetensors").exists()
    assert not (tmp_path / "new.h5").exists()
    assert_same(bag, load_bag(old))


def test_a_failed_write_cleans_up(bag: Bag, tmp_path: Path, monkeypatch):
    def full(handle: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_bag(bag, tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []
