"""What README and docs/ say can be done: their commands parse, README's run, their links lead somewhere.

README's blocks run as they stand, on phantoms and an untrained model; where training is meant, with short settings.
"""

import argparse
import contextlib
import importlib
import json
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sparsewsi import phantom

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
DOCS = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

# Programs that are not ours: what is installed or who starts several of us. None runs here.
OUTSIDE = {
    "pip": "needs a network",
    "python3.11": "makes a venv",
    ".": "enters a venv",
    "pytest": "runs these tests",
    "hf": "needs a network",
}
STARTERS = ("torchrun", "srun", "sbatch")
# Added to a command of README, so that it takes seconds.
SHORT = {
    "train.run own-stage1": "--steps 2 --accumulation 1 --llm LLM --dim 32 --num_tokens 4",
    "train.run own-stage2": "--steps 2 --accumulation 1 --llm LLM",
    "train.evaluate file": "--rows learned random",
}


# ---- reading the documents


def fenced(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S)


def commands(block: str) -> Iterator[list[str]]:
    """The words of each command of a shell block."""
    for line in block.replace("\\\n", " ").splitlines():
        for part in line.split(" && "):
            if words := shlex.split(part, comments=True):
                yield words


def entrance(words: list[str]) -> tuple[str, list[str]] | None:
    """The module whose main() a command calls, and its arguments; None for programs that are not ours."""
    if words[0] == "sbatch":
        words = shlex.split(words[words.index("--wrap") + 1])
    elif words[0] in STARTERS:
        first = next(place for place, word in enumerate(words) if word in ("-m", "python"))
        words = words[first:] if words[first] == "python" else ["python", *words[first:]]
    if words[0] == "sparsewsi":
        return "sparsewsi.__main__", words[1:]
    if words[0] != "python":
        assert words[0] in OUTSIDE, f"what is {words[0]}?"
        return None
    if words[1] == "-m":
        return ("sparsewsi.__main__" if words[2] == "sparsewsi" else words[2]), words[3:]
    if words[1] == "app.py":
        return "sparsewsi.__main__", ["app", *words[2:]]
    return words[1].removesuffix(".py").replace("/", "."), words[2:]


def named(path: Path) -> Iterator[list[str]]:
    """Every command of ours that a document names, in a block or in a sentence."""
    text = path.read_text(encoding="utf-8")
    for block in re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S):
        yield from commands(block)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    for code in re.findall(r"`([^`]+)`", prose):
        code = " ".join(code.split())
        if code.startswith(("python -m ", "python app.py", "sparsewsi ", "torchrun ")) and "..." not in code:
            yield from commands(code)


# ---- running and parsing them


class Parsed(Exception):
    pass


def parse(module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Call a command's main() up to where its arguments are parsed. SystemExit if they are refused."""
    whole, depth = argparse.ArgumentParser.parse_known_args, [0]

    def parse_known_args(self: argparse.ArgumentParser, *given: Any, **more: Any) -> Any:
        depth[0] += 1
        try:
            found, extra = whole(self, *given, **more)
        finally:
            depth[0] -= 1
        if depth[0]:  # a subcommand's
            return found, extra
        if extra:
            self.error(f"unrecognized arguments: {' '.join(extra)}")
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_known_args)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    with pytest.raises(Parsed):
        importlib.import_module(module).main()


def run(module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Call a command's main() in this process."""
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    try:
        status = importlib.import_module(module).main()
    except SystemExit as stopped:
        status = stopped.code
    assert not status, f"{module} {' '.join(arguments)} ended with {status}"


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_every_command_parses(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    for words in named(path):
        found = entrance(words)
        if found is None:
            continue
        module, arguments = found
        with monkeypatch.context() as patch:
            try:
                if not arguments or arguments in (["ask"], ["extract"], ["app"]):  # a command's name alone
                    patch.setattr(sys, "argv", [module, *arguments, "--help"])
                    with contextlib.suppress(SystemExit):
                        importlib.import_module(module).main()
                else:
                    parse(module, arguments, patch)
            except SystemExit:
                pytest.fail(f"{path.name}: {shlex.join(words)}: {capsys.readouterr().err}")


# ---- README runs


@pytest.fixture
def desk(tmp_path: Path, tiny_model: Path, tiny_llm: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what README's commands name: an (untrained) model, slides, captions and questions."""
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "demo-model").symlink_to(tiny_model)
    (tmp_path / "slides").mkdir()
    for seed in (3, 4):
        phantom.write_phantom(tmp_path / "slides" / f"slide-{seed}.tiff", seed, 1_024)
    (tmp_path / "slide.svs").write_bytes((tmp_path / "slides" / "slide-3.tiff").read_bytes())
    cache = tmp_path / "cache" / f"phantom-{phantom.EXAMPLE_SEED}-{phantom.EXAMPLE_SIZE}-v{phantom.VERSION}.tiff"
    phantom.write_phantom(cache, 5, 1_024)  # in the place of the example, which takes half a minute to encode
    captions = [{"slide": f"slide-{seed}", "question": "Describe it.", "answer": "Fat and mucin."} for seed in (3, 4)]
    closed = {"question": "What is there?", "options": ["mucin", "fat"], "answer": "fat", "category": "kind"}
    for name, records in {
        "captions": captions,
        "qa": [{"slide": f"slide-{seed}", **closed} for seed in (3, 4)],
        "test": [{"slide": "slide-4", **closed, "question": "What is it?"}],
    }.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(records))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPARSEWSI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SPARSEWSI_MODEL", str(tiny_model))
    return tmp_path


def test_readme_runs_from_the_shell(desk: Path, tiny_llm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = set()
    for words in (words for block in fenced(README, "sh") for words in commands(block)):
        found = entrance(words)
        if found is None or found[1][:1] == ["app"]:  # see below
            continue
        module, arguments = found
        short = SHORT.get(f"{module} {arguments[0]}", "").replace("LLM", str(tiny_llm))
        run(module, [*arguments, *shlex.split(short)], monkeypatch)
        ran.add(module)
    assert ran == {"sparsewsi.__main__", "train.data.questions", "train.run", "train.evaluate"}
    assert {"report.html", "overlay.png", "umap.png", "patches.csv", "patches.geojson", "selection.json"} <= {
        file.name for file in (desk / "out" / "slide").iterdir()
    }
    assert sorted(file.name for file in (desk / "features").glob("*.safetensors")) == [
        "slide-3.safetensors",
        "slide-4.safetensors",
    ]
    assert (desk / "runs" / "test" / "table.md").is_file()


def test_readme_runs_in_python(desk: Path, capsys: pytest.CaptureFixture) -> None:
    (block,) = (block for block in fenced(README, "python") if "gradio_client" not in block)
    exec(block, {})
    assert "tensor([" in capsys.readouterr().out  # the two options' probabilities


def test_readme_runs_over_http(desk: Path, capsys: pytest.CaptureFixture) -> None:
    (block,) = (block for block in fenced(README, "python") if "gradio_client" in block)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, str(ROOT / "app.py"), "--port", port]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ) as server:
        try:
            assert server.stdout is not None
            assert "127.0.0.1:" + port in server.stdout.readline()
            exec(block.replace("7860", port), {})
        finally:
            server.terminate()
    assert "'probabilities': [0." in capsys.readouterr().out


def test_the_python_of_docs_runs(desk: Path) -> None:
    blocks = [block for path in DOCS[1:] for block in fenced(path, "python")]
    assert blocks
    for block in blocks:
        exec(block, {})


def test_the_example_runs(desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    run("examples.slide_to_answer", ["slide.svs"], monkeypatch)
    said = capsys.readouterr().out
    assert "largest features:" in said
    assert "research use only" in said
    assert (desk / "out" / "example" / "report.html").is_file()


# ---- what they promise of themselves


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", text):
        target = "".join(target)
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.exists(), f"{path.name}: {target}"
        assert not anchor or anchor in anchors(file), f"{path.name}: {target}"


def anchors(path: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_no_path_leads_out_of_the_repository(path: Path) -> None:
    assert "../shared" not in path.read_text(encoding="utf-8")


def test_readme_is_short_and_in_order() -> None:
    text = README.read_text(encoding="utf-8").split("---\n", 2)[2]
    assert len(text.split()) <= 900
    assert re.findall(r"^## (.*)$", text, re.M) == [
        "Run it",
        "From the shell",
        "In Python",
        "What it can and cannot",
        "How it is built",
        "Train on your slides",
        "Host it",
        "Speed",
        "Contributing, citation, licences",
    ]
    assert text.index("Research use only") < text.index("## Run it")


def test_the_tree_of_readme_is_the_tree() -> None:
    (tree,) = (block for block in fenced(README, "text") if "train/" in block)
    named_rooms = set(re.findall(r"^  (\w+)/", tree, re.M))
    rooms = {folder.parent.name for folder in (ROOT / "sparsewsi").glob("*/__init__.py")}
    assert named_rooms == rooms
