"""requirements.txt is the base install of pyproject.toml with exact pins."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]


def test_requirements_pin_what_pyproject_asks_for() -> None:
    asked = [
        Requirement(text) for text in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    ]
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    pinned = {canonicalize_name(r.name): r for r in map(Requirement, filter(None, lines))}
    assert {canonicalize_name(r.name) for r in asked} == set(pinned)
    for requirement in asked:
        (pin,) = pinned[canonicalize_name(requirement.name)].specifier
        assert pin.operator == "=="
        assert requirement.specifier.contains(pin.version), f"{requirement} does not admit {pin}"


def test_the_base_install_stays_free_of_what_it_must_not_need() -> None:
    text = (ROOT / "requirements.txt").read_text().lower()
    for unwanted in ("torchvision", "timm", "opencv"):
        assert unwanted not in text
