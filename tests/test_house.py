"""The house: folders are the road that a slide takes, and each imports only what lies before it.

All imports are walked: at the top of a file, inside functions, and under `if TYPE_CHECKING`.
"""

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A room, and the rooms that it may import besides itself. The road is in the order of the rows.
ROAD = {
    "files": "",
    "presets": "",
    "slides": "files",
    "bags": "files slides",
    "phantom": "files slides",
    "cohort": "files slides bags",
    "model": "files slides bags",
    "readers": "files slides bags model",
    "report": "files slides bags phantom model readers",
    "web": "files slides bags phantom model readers report",
    "doctor": "files bags model presets",
}
ENTRANCES = ("sparsewsi", "sparsewsi.__main__", "app")  # public names and command lines: they may import any room
STORIES = {"recipe": "data eval", "data": "recipe", "eval": "recipe data", "studies": "recipe data eval"}  # of train/


# ---- reading the imports


@functools.cache
def modules() -> dict[str, Path]:
    """Our modules by name, without tests, benchmarks and examples."""
    files = [ROOT / "app.py", *(ROOT / "sparsewsi").rglob("*.py"), *(ROOT / "train").rglob("*.py")]
    names = {file: ".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files}
    return {name.removesuffix(".__init__"): file for file, name in names.items()}


@functools.cache
def imported(name: str) -> frozenset[str]:
    """What a module imports, ours and others': `from a import b` is a, and a.b where that is a module."""
    found: set[str] = set()
    for node in ast.walk(parsed(name)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively, line {node.lineno}"
            parts = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= parts & modules().keys()
            if parts - modules().keys():  # a package is entered only for what its __init__.py holds
                found.add(str(node.module))
    return frozenset(found)


@functools.cache
def parsed(name: str) -> ast.Module:
    return ast.parse(modules()[name].read_text(encoding="utf-8"))


def ours(name: str) -> set[str]:
    """Modules of ours that a module imports."""
    return {other for other in imported(name) if other in modules()}


def room(name: str) -> str:
    """The folder of sparsewsi/ (or the file beside them) that a module belongs to."""
    return name.split(".")[1]


def story(name: str) -> str:
    """The folder of train/ that a module belongs to; the files on top are the recipe."""
    folder = name.split(".")[1] if name.count(".") else ""
    return folder if folder in STORIES else "recipe"


def in_package() -> list[str]:
    return [name for name in modules() if name.startswith("sparsewsi.") and name not in ENTRANCES]


def defines(name: str) -> set[str]:
    return {node.name for node in parsed(name).body if isinstance(node, ast.ClassDef)}


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ---- who may import whom


def test_what_is_imported_of_ours_is_there() -> None:
    """Also in functions, which fail only when they are called, and in tests and benchmarks."""
    others = [file for folder in ("tests", "benchmarks", "examples") for file in (ROOT / folder).rglob("*.py")]
    for file in [*modules().values(), *others]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in ("sparsewsi", "train", "app"):
                module = str(node.module)
                assert module in modules(), f"{file}, line {node.lineno}: {module}"
                missing = {a.name for a in node.names} - bound(module)
                missing = {name for name in missing if f"{module}.{name}" not in modules()}
                assert module == "sparsewsi" or not missing, f"{file}, line {node.lineno}: {missing}"


@functools.cache
def bound(name: str) -> frozenset[str]:
    """Names that a module binds anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(parsed(name)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
    return frozenset(found)


def test_every_file_is_in_a_room() -> None:
    assert {room(name) for name in in_package()} <= set(ROAD)


def back_on_the_road(name: str) -> Iterator[str]:
    for start in (start for start in in_package() if room(start) == name):
        allowed = {name, *ROAD[name].split()}
        yield from (f"{start} imports {other}" for other in ours(start) if not is_inside(other, allowed))


def is_inside(other: str, rooms: set[str]) -> bool:
    return other.startswith("sparsewsi.") and other not in ENTRANCES and room(other) in rooms


@pytest.mark.parametrize("name", ROAD)
def test_a_room_imports_only_rooms_before_it(name: str) -> None:
    assert not list(back_on_the_road(name))


def test_no_file_is_in_a_circle() -> None:
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name not in done:
            for other in sorted(ours(name)):
                visit(other, (*path, name))
            done.add(name)

    for name in modules():
        visit(name, ())


def test_what_is_released_never_imports_train() -> None:
    for name in modules():
        if not name.startswith("train"):
            assert not {other for other in imported(name) if other.split(".")[0] == "train"}, name


def test_the_recipe_never_knows_a_study() -> None:
    for name in (name for name in modules() if name.startswith("train.")):
        allowed = {story(name), *STORIES[story(name)].split()}
        for other in ours(name):
            assert not other.startswith("train.") or story(other) in allowed, f"{name} imports {other}"


def test_only_slides_knows_openslide() -> None:
    users = {name for name in modules() for other in imported(name) if other.split(".")[0] == "openslide"}
    assert users
    assert {room(name) for name in users} == {"slides"}


def test_only_web_and_the_app_know_gradio() -> None:
    users = {
        name for name in modules() for other in imported(name) if other.split(".")[0] in ("gradio", "gradio_client")
    }
    assert {name for name in users if name != "app" and room(name) != "web"} <= set(ENTRANCES)


def test_no_file_imports_by_a_string() -> None:
    """An import that is computed would escape these tests; the public names are the one exception."""
    for name in modules():
        calls = {ast.unparse(node.func) for node in ast.walk(parsed(name)) if isinstance(node, ast.Call)}
        wanted = {"importlib.import_module"} if name == "sparsewsi" else set()
        assert calls & {"importlib.import_module", "import_module", "__import__"} == wanted, name


# ---- what an import costs


VALUES = ("Bag", "Selection", "Answer", "Case")


def test_importing_the_package_loads_nothing_and_importing_a_value_no_model() -> None:
    homes = [name for value in VALUES for name in in_package() if value in defines(name)]
    assert len(homes) == len(VALUES)
    run(
        "import importlib, sys, sparsewsi\n"
        "heavy = {'transformers', 'peft', 'gradio', 'umap', 'train'}\n"
        "assert not (heavy | {'torch', 'openslide', 'matplotlib'}) & set(sys.modules)\n"
        "sparsewsi.hard_topk, sparsewsi.load_bag\n"
        f"for home in {homes}:\n"
        "    importlib.import_module(home)\n"
        "    assert not heavy & set(sys.modules), (home, heavy & set(sys.modules))"
    )


def test_importing_the_app_loads_no_model_and_makes_no_desk() -> None:
    run(
        "import gc, sys, app\n"
        "assert not {'transformers', 'peft', 'umap', 'matplotlib.pyplot', 'train'} & set(sys.modules)\n"
        "torch = sys.modules.get('torch')\n"
        "for thing in gc.get_objects():\n"
        "    assert type(thing).__name__ != 'Desk', thing\n"
        "    assert torch is None or not isinstance(thing, torch.nn.Module), thing"
    )


# ---- where state and configuration live


def test_a_server_keeps_its_state_in_one_object() -> None:
    """No name of a module of the server is bound anew by a function, and none is an empty container to be filled."""
    for name in ["app", *(name for name in in_package() if room(name) == "web")]:
        for node in ast.walk(parsed(name)):
            assert not isinstance(node, ast.Global), f"{name}, line {node.lineno}: {ast.unparse(node)}"
        for node in parsed(name).body:
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                text = ast.unparse(node.value)
                empty = text in ("{}", "[]", "set()", "dict()", "list()")
                made = any(
                    word in text for word in ("Lock(", "Event(", "Semaphore(", "Desk(", "Queue(", "defaultdict(")
                )
                assert not empty, f"{name}, line {node.lineno}: {ast.unparse(node)}"
                assert not made, f"{name}, line {node.lineno}: {ast.unparse(node)}"


def test_configuration_is_not_passed_through_the_environment() -> None:
    """What is written to os.environ is named where it is written, and is another library's setting, not ours."""
    for name in modules():
        for node in ast.walk(parsed(name)):
            keys = list(written_to_environment(node))
            for key in keys:
                assert isinstance(key, ast.Constant), f"{name}, line {key.lineno}: {ast.unparse(node)}"
                assert not str(key.value).startswith("SPARSEWSI"), f"{name}, line {key.lineno}: {ast.unparse(node)}"


def written_to_environment(node: ast.AST) -> Iterator[ast.expr]:
    if isinstance(node, ast.Assign):
        for target in node.targets:
            if isinstance(target, ast.Subscript) and ast.unparse(target.value) in ("os.environ", "environ"):
                yield target.slice
    elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
        "os.environ.setdefault",
        "os.environ.update",
        "os.putenv",
    ):
        yield node.args[0] if node.args else ast.Name("**", lineno=node.lineno)
