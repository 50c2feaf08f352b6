"""Damaged and lying inputs of every kind are read or refused with a sentence: some seconds of benchmarks/fuzz.py."""

from pathlib import Path

import pytest

from benchmarks.fuzz import fuzz, opened_outside
from benchmarks.inputs import make_inputs

READ_HERE = ("h5", "npy", "safetensors", "geojson", "csv", "json")


@pytest.mark.parametrize(("slides", "most"), [(True, 3), (False, 40)])
@pytest.mark.filterwarnings("ignore")
def test_nothing_crashes_hangs_or_looks_around(tmp_path: Path, slides: bool, most: int):
    kinds = {kind: good for kind, good in make_inputs(tmp_path).items() if (kind not in READ_HERE) == slides}
    found = fuzz(kinds, tmp_path, seconds=20, seed=0, most=most)
    assert [line for outcome in found.values() for line in outcome.failed] == []
    assert sum(outcome.read for outcome in found.values()) > 0


def test_what_a_walled_process_or_its_thread_opens_elsewhere_is_seen():
    trace = [
        '7 openat(AT_FDCWD</>, "/etc/passwd", O_RDONLY) = 3</etc/passwd>',  # before the walls
        "7 landlock_restrict_self(3<anon_inode:[landlock-ruleset]>, 0) = 0",
        '7 openat(AT_FDCWD</>, "a.jpg", O_RDONLY) = 3</made/session/a.jpg>',
        "7 clone(child_stack=0x7f, flags=CLONE_VM|CLONE_THREAD) = 8",
        '8 openat(AT_FDCWD</>, "/made/session/../private/b", O_RDONLY <unfinished ...>',
        "8 <... openat resumed>) = 4</made/private/b>",
        '8 openat(AT_FDCWD</>, "/etc/shadow", O_RDONLY) = -1 EACCES (Permission denied)',
        "8 +++ exited with 0 +++",
        '8 openat(AT_FDCWD</>, "/etc/group", O_RDONLY) = 3</etc/group>',  # another process of this number
        "9 +++ exited with 0 +++",
        "7 clone(child_stack=0x7f, flags=CLONE_VM|CLONE_THREAD) = 9",  # told after its thread has ended
        '9 openat(AT_FDCWD</>, "/etc/group", O_RDONLY) = 3</etc/group>',
        "7 clone(child_stack=0x7f, flags=CLONE_VM|CLONE_THREAD) = 10",
        '10 execve("/usr/bin/python", ["python"], 0x7f /* 9 vars */) = 0',  # its end was not told
        '10 openat(AT_FDCWD</>, "/etc/group", O_RDONLY) = 3</etc/group>',
        "7 clone(child_stack=0x7f, flags=CLONE_VM|CLONE_THREAD) = 11",
        "5 clone3({flags=CLONE_VM|CLONE_THREAD} => {parent_tid=[11]}, 88) = 11",
        '11 openat(AT_FDCWD</>, "/etc/group", O_RDONLY) = 3</etc/group>',
    ]
    assert list(opened_outside(trace, Path("/made"))) == ["/made/private/b"]
