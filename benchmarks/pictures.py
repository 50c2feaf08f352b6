"""The pictures of README: the app on the example phantom, its question answered, in a real browser.

    python -m benchmarks.pictures --model assets/demo-model --out assets/readme

    python -m benchmarks.pictures --states screenshots/states
    python -m benchmarks.pictures --cards sparsewsi/web/viewer/cards

Needs Chromium and Playwright. Starts the app on a free port and ends it; the example is generated on first use.
--states makes pictures of every state of the page, of five sizes and in both themes, to be looked at. --cards draws the
pictures of the gallery: the example phantom, and patches of the tissues that a phantom has.
"""

import argparse
import itertools
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from sparsewsi import phantom
from sparsewsi.phantom.paint import patches
from sparsewsi.slides.slide import open_slide

SIZE = (1440, 900)  # px
SIZES = ((1920, 1080), (1440, 900), (1280, 720), (768, 1024), (390, 844))
UNUSUAL = "0.96"  # um/px of the example, at which it has 4,000 patches and none is cached
QUALITY = 80
PATIENCE = 300_000  # ms
ANALYSED = "#view .slides .look:not([title*=analysed])"  # slides of a case that have been
QUESTION = 2  # of the questions to start with: which of these tissues is present


@contextmanager
def running(model: str) -> Iterator[str]:
    """The app in its own process; yields its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "app.py", "--port", port, "--model", model]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if found := re.search(r"served at (\S+)", line):
            break
    else:
        raise SystemExit("The app did not start.")
    threading.Thread(target=process.stdout.read, daemon=True).start()
    try:
        yield found[1]
    finally:
        process.terminate()
        process.wait(30)


@contextmanager
def browse(address: str) -> Iterator:
    """The page in a browser, once it listens."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": SIZE[0], "height": SIZE[1]})
        page.set_default_timeout(PATIENCE)
        with page.expect_request(re.compile("/queue/join")):
            page.goto(address)
        yield page
        browser.close()


def show_tab(page, name: str) -> None:
    page.click(f'[role=tab][data-tab="{name}"]')


def open_phantom(page) -> None:
    page.click("#phantom")
    page.wait_for_selector(".item")
    page.wait_for_function("document.querySelector('.features .title').textContent.includes('UMAP')")


def ask(page) -> None:
    page.locator("#examples .gallery-item").nth(QUESTION).click()
    page.wait_for_selector("#chat .bot .rests")


def draw(address: str, out: Path) -> None:
    """Open, ask, follow the evidence, read the map, ask what if; a picture of each."""
    with browse(address) as page:

        def shoot(name: str) -> None:
            page.wait_for_function("document.querySelector('.viewer').dataset.waiting === '0'")
            page.wait_for_timeout(800)
            raw = out / f"{name}.png"
            page.screenshot(path=raw)
            Image.open(raw).convert("RGB").save(out / f"{name}.jpg", quality=QUALITY, optimize=True)
            raw.unlink()

        open_phantom(page)
        ask(page)
        shoot("app")
        page.locator('#chat .bot a[href*="#patch-"]').first.click()
        shoot("app-evidence")
        page.focus(".slide")
        page.keyboard.press("0")
        show_tab(page, "map")
        shoot("app-map")


def open_path(page, path: str | Path) -> None:
    page.fill("#path textarea, #path input", str(path))
    page.press("#path textarea, #path input", "Enter")


def draw_states(address: str, out: Path) -> None:
    """Every state of the page, as it looks in each of SIZES, light and dark."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, browse(address) as page:
        second = Path(folder) / "second.tiff"
        phantom.write_phantom(second, seed=6, size=3072)

        def shoot(state: str) -> None:
            for theme, (width, height) in itertools.product(("light", "dark"), SIZES):
                page.evaluate("dark => document.body.classList.toggle('dark', dark)", theme == "dark")
                page.set_viewport_size({"width": width, "height": height})
                page.wait_for_timeout(700)
                page.screenshot(path=out / f"{state}-{width}x{height}-{theme}.png", full_page=width < 900)
            page.set_viewport_size({"width": SIZE[0], "height": SIZE[1]})

        page.wait_for_selector("#phantom")
        shoot("1-empty")
        open_path(page, "/slides/absent.svs")
        page.wait_for_selector("#wrong p")
        shoot("1-refused")
        page.click("#gallery .public summary")
        shoot("1-gallery")
        page.click("#gallery .public summary")
        page.fill("#path textarea, #path input", "")
        page.fill("#mpp input, #mpp textarea", UNUSUAL)
        page.click("#phantom")
        page.wait_for_selector(".viewer[data-provisional]")
        shoot("2-working")
        page.click('[data-do="cancel"]')
        page.wait_for_selector(".failed:not([hidden])")
        shoot("3-cancelled")
        page.click("#open-menu")
        shoot("4-menu")
        open_phantom(page)
        shoot("5-open")
        ask(page)
        shoot("6-answer")
        page.locator('#chat .bot a[href*="#patch-"]').first.click()
        show_tab(page, "patches")
        shoot("7-evidence")
        page.focus(".slide")
        page.keyboard.press("0")
        show_tab(page, "map")
        page.select_option(".features select", "word")
        shoot("8-map")
        page.focus(".slide")
        page.keyboard.press("h")
        page.click('[data-do="layers"]')
        shoot("9-layers")
        page.click('[data-do="layers"]')
        page.focus(".slide")
        page.keyboard.press("h")
        show_tab(page, "what-if")
        page.locator("#selector input").click()
        page.get_by_role("option", name="random").click()
        page.click("#again")
        page.wait_for_selector("#compare .compare > div >> nth=1 >> .rests")
        shoot("10-what-if")
        page.click("#own")
        page.wait_for_selector(".badge", state="hidden")
        page.locator("#selector input").click()
        page.get_by_role("option", name="random").click()
        page.click("#both")
        show_tab(page, "ask")
        page.wait_for_selector("#chat .compare .other .rests")
        shoot("11-side-by-side")
        page.click(".aside [data-do=leave]")
        page.wait_for_selector("#other", state="detached")
        page.click("#add-slide")
        open_path(page, second)
        page.wait_for_function(f"document.querySelectorAll('{ANALYSED}').length === 2")
        page.wait_for_function("document.querySelector('#facts').innerText.includes('Case of 2')")
        ask(page)
        page.click("#earlier summary")
        shoot("12-case")
        with page.expect_request(re.compile("/queue/join")):
            page.reload()
        page.wait_for_selector("#chat .bot .rests")
        shoot("13-loaded-anew")


def draw_cards(out: Path) -> None:
    """What the cards of the gallery show, as JPEG."""

    def save(picture: Image.Image, name: str, side: int) -> None:
        picture.resize((side, side), Image.Resampling.LANCZOS).save(out / f"{name}.jpg", quality=QUALITY, optimize=True)

    out.mkdir(parents=True, exist_ok=True)
    with open_slide(phantom.example_slide()) as slide:
        whole = Image.fromarray(slide.thumbnail(640)[0])
    save(whole.crop((80, 50, 592, 562)), "phantom", 280)
    for kind in ("adipose", "lymphoid", "normal_mucosa_colon", "smooth_muscle"):
        save(Image.fromarray(patches(5, kind, 1, size=448, mixed=0.0)[0]), kind, 112)
    save(Image.fromarray(patches(5, "stroma_fibrous", 1, size=672, mixed=0.0)[0]), "stroma_fibrous", 224)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="assets/demo-model")
    parser.add_argument("--out", type=Path, default=Path("assets/readme"))
    parser.add_argument("--cards", type=Path, help="folder for the pictures of the gallery, which are drawn instead")
    parser.add_argument("--states", type=Path, help="folder for pictures of every state, which are made instead")
    given = parser.parse_args()
    if given.cards:
        return draw_cards(given.cards)
    with running(given.model) as address:
        if given.states:
            return draw_states(address, given.states)
        draw(address, given.out)
    for path in sorted(given.out.glob("app*.jpg")):
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
