"""The pictures of README: the app on the example phantom, its question answered, in a real browser.

    python -m benchmarks.pictures --model assets/demo-model --out assets/readme

    python -m benchmarks.pictures --cards sparsewsi/web/viewer/cards

Needs Chromium and Playwright. Starts the app on a free port and ends it; the example is generated on first use.
--cards draws the pictures of the gallery instead: the example phantom, and patches of the tissues that a phantom has.
"""

import argparse
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from sparsewsi import phantom
from sparsewsi.phantom.paint import patches
from sparsewsi.slides.slide import open_slide

SIZE = (1440, 900)  # px
QUALITY = 80
PATIENCE = 300_000  # ms
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


def draw(address: str, out: Path) -> None:
    """Open, ask, follow the evidence, read the map, ask what if; a picture of each."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": SIZE[0], "height": SIZE[1]})
        page.set_default_timeout(PATIENCE)

        def shoot(name: str) -> None:
            page.wait_for_function("document.querySelector('.viewer').dataset.waiting === '0'")
            page.wait_for_timeout(800)
            raw = out / f"{name}.png"
            page.screenshot(path=raw)
            Image.open(raw).convert("RGB").save(out / f"{name}.jpg", quality=QUALITY, optimize=True)
            raw.unlink()

        with page.expect_request(re.compile("/queue/join")):
            page.goto(address)
        page.click("#phantom")
        page.wait_for_selector(".item")
        page.wait_for_function("document.querySelector('.features .title').textContent.includes('UMAP')")
        page.locator("#examples .gallery-item").nth(QUESTION).click()
        page.wait_for_function("document.querySelector('#options textarea').value.includes('\\n')")
        page.press("#question textarea", "Enter")
        page.wait_for_selector('#chat .bot a[href*="#patch-"]')
        shoot("app")
        page.locator('#chat .bot a[href*="#patch-"]').first.click()
        shoot("app-evidence")
        page.focus(".slide")
        page.keyboard.press("0")
        page.click('[role=tab][data-tab="map"]')
        shoot("app-map")
        browser.close()


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
    given = parser.parse_args()
    if given.cards:
        return draw_cards(given.cards)
    with running(given.model) as address:
        draw(address, given.out)
    for path in sorted(given.out.glob("app*.jpg")):
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
