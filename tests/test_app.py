"""The app: what it imports, how it is served, what its handlers promise, and one session in a real browser."""

import ast
import functools
import hashlib
import http.server
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import pytest
import torch

import app
from sparsewsi import phantom
from sparsewsi.bag import Bag
from sparsewsi.config import SparseWSIConfig
from sparsewsi.llm import load_llm
from sparsewsi.model import Selection, SparseWSI
from sparsewsi.prompt import format_question

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMIUM_ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


@pytest.fixture(scope="module")
def tiny_model(tiny_llm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained artefact on the tiny LLM and the default patch encoder."""
    folder = tmp_path_factory.mktemp("models") / "tiny-model"
    llm, tokenizer = load_llm(str(tiny_llm))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = SparseWSIConfig(llm=str(tiny_llm), dim=32, heads=4, num_tokens=6, demo=True)
        SparseWSI(config, llm, tokenizer).save_pretrained(folder)
    return folder


# ---- what imports what

# Higher may import lower or equal, never the other way (design.md, "Layers").
LEVELS = {
    "app": 6,
    "sparsewsi.__main__": 6,
    **dict.fromkeys(("train.run", "train.evaluate", "train.extract"), 6),
    **dict.fromkeys(("train.checkpoint", "train.data", "train.mosaic"), 5),
    **dict.fromkeys(("train.benchmarks", "train.scoring"), 5),
    **dict.fromkeys(("sparsewsi.model", "sparsewsi.viewer", "sparsewsi.viewer.viewer"), 4),
    **dict.fromkeys(("sparsewsi.case", "sparsewsi.chat"), 4),
    **dict.fromkeys(("sparsewsi.evidence", "sparsewsi.export", "sparsewsi.novelty", "sparsewsi.plots"), 3),
    "sparsewsi.bag": 2,
    "sparsewsi.tiff": 0,
}


def imports_of(path: Path) -> set[str]:
    """Modules a file imports anywhere in it, also inside functions; not those under `if TYPE_CHECKING`."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def modules() -> dict[str, Path]:
    """Our modules by name, without tests and benchmarks."""
    files = [ROOT / "app.py", *(ROOT / "sparsewsi").rglob("*.py"), *(ROOT / "train").rglob("*.py")]
    names = {file: ".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files}
    return {name.removesuffix(".__init__"): file for file, name in names.items()}


@functools.cache
def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: {i for i in imports_of(file) if i in known and i != "sparsewsi"} for name, file in known.items()}


def test_what_is_released_never_imports_train():
    for name, wanted in graph().items():
        if not name.startswith("train"):
            assert not [other for other in wanted if other.split(".")[0] == "train"], name


def test_only_slide_py_knows_openslide():
    users = {name for name, file in modules().items() if any(i.split(".")[0] == "openslide" for i in imports_of(file))}
    assert users == {"sparsewsi.slide"}


def test_imports_only_point_down():
    def level(name: str) -> int:
        default = 6 if name.startswith("train") and name not in ("train.sparselearn", "train.config") else 1
        return LEVELS.get(name, default)

    for name, wanted in graph().items():
        for other in wanted - {"train"}:
            assert level(other) <= level(name), f"{name} imports {other}"


def test_imports_have_no_circles():
    known, done = graph(), set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name not in done:
            for other in known[name]:
                visit(other, (*path, name))
            done.add(name)

    for name in known:
        visit(name, ())


def test_importing_the_app_loads_neither_train_nor_the_model():
    code = (
        "import sys, app\n"
        "assert not [name for name in sys.modules if name.split('.')[0] == 'train']\n"
        "assert 'umap' not in sys.modules and 'matplotlib.pyplot' not in sys.modules\n"
        "assert app._load.cache_info().currsize == 0\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- how it is served


def test_it_is_served_to_this_machine_and_keeps_no_record():
    settings = app.launch_settings("127.0.0.1", None)
    wanted = {
        "server_name": "127.0.0.1",
        "share": False,
        "ssr_mode": False,
        "run_history": False,
        "enable_monitoring": False,
        "allowed_paths": [],
        "max_file_size": "8gb",
    }
    assert {key: settings[key] for key in wanted} == wanted
    assert all(font not in str(settings["theme"].font) for font in ("Google", "http"))


@pytest.mark.parametrize("allowed", [True, False])
def test_a_path_can_be_opened_only_where_that_is_allowed(allowed, tiny_model, monkeypatch):
    monkeypatch.setenv("SPARSEWSI_MODEL", str(tiny_model))
    demo = app.build(allow_paths=allowed)
    assert (app.open_path in [fn.fn for fn in demo.fns.values()]) == allowed
    assert not demo.analytics_enabled
    assert all(fn.api_visibility == "private" for fn in demo.fns.values() if fn.fn is not None)


# ---- uploads


def test_an_upload_moves_to_a_folder_of_its_session_that_only_we_can_read(tmp_path):
    source = tmp_path / "Mustermann_1950.svs"
    source.write_bytes(b"slide")
    for session in ("../../escape", "abc", None):
        source.write_bytes(b"slide")
        kept = app.keep_upload(source, session)
        assert not source.exists()
        assert kept.name == "slide.svs"
        assert kept.parent.parent == app.private_root()
        for folder in (kept.parent, app.private_root()):
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    app.forget(SimpleNamespace(session_hash="abc"))  # type: ignore[arg-type]
    assert not app.private_folder("abc").exists()
    assert app.private_folder("../../escape").exists()


def test_a_second_upload_replaces_the_first(tmp_path):
    for name in ("one.svs", "two.tiff"):
        (tmp_path / name).write_bytes(b"slide")
        kept = app.keep_upload(tmp_path / name, "same")
    assert [path.name for path in kept.parent.iterdir()] == ["slide.tiff"]


# ---- the sample slide


@pytest.fixture
def site(tmp_path: Path) -> Iterator[str]:
    """A web server on this machine with one file, `sample`."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sample").write_bytes(b"pixels" * 100)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, directory=str(tmp_path / "site"), **kwargs)

        def log_message(self, format, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_the_sample_is_kept_only_when_its_digest_is_right(site, tmp_path):
    good = hashlib.sha256(b"pixels" * 100).hexdigest()
    with pytest.raises(ValueError, match="another file"):
        app.fetch_sample(tmp_path / "cache", f"{site}/sample", "0" * 64)
    assert not (tmp_path / "cache").exists()
    path = app.fetch_sample(tmp_path / "cache", f"{site}/sample", good)
    assert path.read_bytes() == b"pixels" * 100
    assert app.fetch_sample(tmp_path / "cache", "http://127.0.0.1:9/gone", good) == path, "fetched once, then kept"
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == [path.name]


@pytest.mark.parametrize("address", ["http://127.0.0.1:9/x", "http://no-such-host.invalid/x", "SITE/missing"])
def test_no_network_is_one_sentence(address, site, tmp_path):
    with pytest.raises(ValueError, match="could not be fetched") as caught:
        app.fetch_sample(tmp_path, address.replace("SITE", site), timeout=5)
    assert "\n" not in str(caught.value)


# ---- words and turns


@pytest.mark.parametrize("options", [[], ["Yes", "No"], ["a. b", "C. fat", "-"]])
def test_a_turn_is_read_back_as_it_was_asked(options):
    text = format_question("Which tissue?\nLook closely.", options)
    assert app.read_turn(text) == ("Which tissue?\nLook closely.", options)


def test_resolution_takes_a_decimal_comma_and_refuses_words():
    assert app.read_mpp(" 0,25 ") == 0.25
    assert app.read_mpp("") is None
    with pytest.raises(ValueError, match="number of µm/px"):
        app.read_mpp("40x")


@pytest.mark.parametrize(
    "error", [ValueError("bad\nslide. Pass slide_mpp=, e.g. 0.25"), OSError(28, "No space"), RuntimeError("x")]
)
def test_what_goes_wrong_is_one_sentence_on_the_page(error):
    with pytest.raises(gr.Error) as caught, app.sentences():
        raise error
    assert "\n" not in caught.value.message
    assert "slide_mpp" not in caught.value.message


def test_a_question_without_a_slide_stays_in_the_box():
    with pytest.raises(gr.Error, match="Open a slide first"):
        app.add_turn("What is it?", "", None, [])


def test_undo_gives_the_words_back_and_edit_drops_what_came_after():
    chat = [
        {"role": "user", "content": format_question("Which?", ["fat", "mucin"])},
        {"role": "assistant", "content": [{"type": "text", "text": "fat"}, {"type": "text", "text": "Demo model"}]},
        {"role": "user", "content": [{"type": "text", "text": "Why?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Because."}]},
    ]
    assert app.undo(chat) == (chat[:2], "Why?", "")
    assert app.undo(chat[:2]) == ([], "Which?", "fat\nmucin")
    assert app.back_to_question(chat) == chat[:3]
    edited, _ = app.edit(chat, SimpleNamespace(index=2, value="How?"))  # type: ignore[arg-type]
    assert edited == [*chat[:2], {"role": "user", "content": "How?"}]
    assert app.text_of(chat[1]) == "fat", "the notice is not said to the model"


def test_the_ground_truth_names_foci_and_what_was_selected():
    truth = phantom.ground_truth(3, 1024)
    coords = torch.tensor([[x, y] for y in range(0, 800, 224) for x in range(0, 800, 224)])
    bag = Bag(torch.zeros(len(coords), 4), coords, 224, 0.5, "efficientnet-lite0", "phantom 3", 0.5)
    selection = Selection(torch.arange(5), torch.arange(16.0), torch.zeros(5, 4), 16)
    text = app.planted(truth, app.Opened(bag, selection))
    assert app.words(truth.dominant) in text
    assert all(app.words(kind) in text for kind in truth.present)
    counts = [int(n) for n in re.findall(r"(\d+) \w", text.splitlines()[-1].split(":")[1])]
    assert sum(counts) == 5
    question, options = app.questions_for(truth)[-1]
    assert question == app.PRESENT_QUESTION
    assert [option for option in options if option in {app.words(kind) for kind in truth.present}] == [
        app.words(truth.present[0])
    ]
    assert app.planted(None, app.Opened(bag, selection)) == ""
    assert app.questions_for(None) == list(app.QUESTIONS)


def test_an_answer_streams_with_its_notice_and_ends_with_probabilities(tiny_model, monkeypatch):
    monkeypatch.setenv("SPARSEWSI_MODEL", str(tiny_model))
    model, _ = app.loaded()
    bag = Bag(torch.randn(9, 1280), torch.zeros(9, 2, dtype=torch.int32), 224, 0.5, "efficientnet-lite0", "slide 1")
    opened = app.Opened(bag, model.select(bag))
    chat = [{"role": "user", "content": format_question("Which?", ["fat", "liver"])}]
    steps = list(app.reply(opened, chat))
    for answered, _ in steps[:-1]:
        assert answered[-1]["content"][1] == "Demo model, research use only, not for diagnosis."
    assert sum(steps[-1][1].values()) == pytest.approx(1, abs=1e-5)
    assert set(steps[-1][1]) == {"fat", "liver"}


# ---- one session in a browser


@pytest.fixture(scope="module")
def served(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """The app in its own process, with a small phantom where the bundled example is cached."""
    home = tmp_path_factory.mktemp("home")
    example = home / f"phantom-{phantom.EXAMPLE_SEED}-{phantom.EXAMPLE_SIZE}-v{phantom.VERSION}.tiff"
    phantom.write_phantom(example, seed=3, size=1024)
    (home / "tmp").mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "SPARSEWSI_CACHE": str(home), "TMPDIR": str(home / "tmp"), "PYTHONUNBUFFERED": "1"}
    environment.pop("GRADIO_TEMP_DIR", None)
    command = [sys.executable, "app.py", "--port", str(port), "--model", str(tiny_model)]
    with (home / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
    try:
        for _ in range(600):
            if process.poll() is not None or "served at" in (home / "log").read_text():
                break
            time.sleep(0.2)
        assert "served at" in (home / "log").read_text(), (home / "log").read_text()
        yield SimpleNamespace(url=f"http://127.0.0.1:{port}", home=home, example=example, log=home / "log")
    finally:
        process.terminate()
        process.wait(20)


@pytest.mark.browser
def test_from_click_to_patches_and_answer_in_a_browser(served):
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    sync_api = pytest.importorskip("playwright.sync_api")
    looks = ROOT / "screenshots"
    looks.mkdir(exist_ok=True)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_ARGS)
        page = browser.new_page(viewport={"width": 1440, "height": 900})
        page.set_default_timeout(240_000)  # umap's first compilation on a busy machine
        hosts: set[str] = set()
        page.on("request", lambda request: hosts.add(request.url.split("/")[2]) if "://" in request.url else None)
        page.goto(served.url)
        page.wait_for_selector("#phantom")
        page.screenshot(path=looks / "empty.png")
        assert "No slide open" in page.inner_text("#facts")

        page.fill("#question textarea", "Which tissue is this?")
        page.press("#question textarea", "Enter")
        page.wait_for_selector("text=Open a slide first")
        assert page.input_value("#question textarea") == "Which tissue is this?"

        page.click("#phantom")
        page.wait_for_selector("#overview img")
        facts = page.inner_text("#facts")
        assert "phantom 3" in facts
        assert "6 of" in facts
        assert "0.5 µm/px (tiff resolution)" in facts
        assert page.locator("#patches .thumbnail-item").count() == 6
        assert page.locator("#patches .caption-label").first.inner_text().startswith("#1")

        page.get_by_text(app.PRESENT_QUESTION, exact=True).first.click()
        page.wait_for_function("document.querySelector('#options textarea').value.includes('\\n')")
        page.press("#question textarea", "Enter")
        page.wait_for_selector("#chat .bot >> text=Demo model, research use only, not for diagnosis.")
        page.wait_for_selector("#probs")
        page.wait_for_selector("#map img", state="attached")
        page.click("text=What the generator planted")
        page.wait_for_selector("#planted >> text=Hidden foci")
        page.screenshot(path=looks / "answered.png", full_page=True)

        junk = served.home / "junk.svs"
        junk.write_bytes(b"junk" * 1000)
        page.fill("#path textarea, #path input", str(junk))
        page.press("#path textarea, #path input", "Enter")
        page.wait_for_selector(".toast-body >> text=slide")
        page.screenshot(path=looks / "error.png")
        assert page.inner_text("#facts") == facts, "what was open stays open"
        assert page.locator("#overview img").is_visible()

        page.set_input_files("#upload input[type=file], input[type=file]", str(served.example))
        root = next((served.home / "tmp").glob("sparsewsi-*"))
        deadline = time.time() + 60
        while not list(root.glob("*/slide.tiff")) and time.time() < deadline:
            page.wait_for_timeout(200)
        assert list(root.glob("*/slide.tiff")), "the upload lies in a private folder"
        assert not [p for p in (served.home / "tmp").rglob("*.tiff") if p.name != "slide.tiff"], "and nowhere else"
        page.close()
        while list(root.glob("*/slide.tiff")) and time.time() < deadline + 60:
            time.sleep(0.3)
        assert not list(root.glob("*/slide.tiff")), "it is deleted when the tab is closed"
        browser.close()
    assert hosts == {served.url.split("/")[2]}, "no request to another host"
    assert "Traceback" not in served.log.read_text()
