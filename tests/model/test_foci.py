"""Foci: kept patches that look alike belong together, the more so if they touch."""

import torch

from sparsewsi.model.foci import find_foci, name_focus


def make(kinds: list[int], coords: list[tuple[int, int]]) -> list:
    """Foci of patches whose features point where their kind does, with a little noise; ranks in the given order."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.eye(64)[torch.tensor(kinds)]
    features = directions + 0.05 * torch.randn(len(kinds), 64, generator=generator)
    places = torch.tensor(coords)
    return find_foci(places, features, 224, list(range(1, len(kinds) + 1)))


def test_what_looks_alike_is_one_focus_and_what_does_not_is_none():
    foci = make([0, 1, 0, 1, 2], [(0, 0), (5000, 0), (9000, 0), (0, 9000), (3000, 3000)])
    assert [(focus.name, focus.places) for focus in foci] == [("A", (0, 2)), ("B", (1, 3))]


def test_patches_that_touch_are_one_focus_sooner():
    apart, touching = [(0, 0), (5000, 0), (9000, 9000)], [(0, 0), (224, 224), (9000, 9000)]
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])  # their mean is 0; cosine of the first two, too

    def count(coords: list[tuple[int, int]]) -> int:
        return len(find_foci(torch.tensor(coords), features, 224, [1, 2, 3]))

    assert (count(apart), count(touching)) == (0, 1)


def test_names_go_on_after_z():
    assert [name_focus(number) for number in (0, 25, 26)] == ["A", "Z", "A2"]
    assert make([0], [(0, 0)]) == []
