"""Damaged and lying inputs of every kind are read or refused with a sentence: some seconds of benchmarks/fuzz.py."""

from pathlib import Path

import pytest

from benchmarks.fuzz import fuzz, seeds

READ_HERE = ("h5", "npy", "safetensors", "geojson", "csv", "json")


@pytest.mark.parametrize(("slides", "most"), [(True, 3), (False, 40)])
@pytest.mark.filterwarnings("ignore")
def test_nothing_crashes_hangs_or_looks_around(tmp_path: Path, slides: bool, most: int):
    kinds = {kind: good for kind, good in seeds(tmp_path, None).items() if (kind not in READ_HERE) == slides}
    found = fuzz(kinds, tmp_path, seconds=20, seed=0, most=most)
    assert [line for outcome in found.values() for line in outcome.failed] == []
    assert sum(outcome.read for outcome in found.values()) > 0
