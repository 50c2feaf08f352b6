"""What is installed: requirements.txt pins what pyproject.toml asks for, and a wheel holds the whole package."""

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


def test_the_wheel_holds_every_room_and_the_demonstration_model() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    moved = settings["package-dir"]
    rooms = {folder: ".".join(folder.relative_to(ROOT).parts) for folder in (ROOT / "sparsewsi").rglob("*")}
    wanted = {"sparsewsi", *(name for folder, name in rooms.items() if list(folder.glob("*.py")))}
    (name,) = moved
    model = ROOT / moved[name]
    wanted |= {".".join([name, *folder.relative_to(model).parts]) for folder in [model, *model.rglob("*/")]}
    assert set(settings["packages"]) == wanted
    patterns = settings["package-data"]["*"]
    for folder in (ROOT / "sparsewsi", model):
        for file in (file for file in folder.rglob("*") if file.is_file() and "__pycache__" not in file.parts):
            assert file.suffix in (".py", ".pyc") or any(file.match(pattern) for pattern in patterns), file
