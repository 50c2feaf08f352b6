"""The flow "two-slide case" in a browser: a second slide is added, one question goes to both, a slide goes again."""

import re
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from sparsewsi import phantom
from sparsewsi.web.desk import Desk
from sparsewsi.web.page import build_page
from sparsewsi.web.serve import launch_settings

PATIENCE = 120_000  # ms
pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def app(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """The app on this machine, and two small slides, scanned at 0.5 and 0.25 um/px."""
    folder = tmp_path_factory.mktemp("slides")
    paths = [folder / f"Mustermann {seed}.tiff" for seed in (5, 6)]
    phantom.write_phantom(paths[0], seed=5, size=1536)
    phantom.write_phantom(paths[1], seed=6, size=1536, mpp=0.25)
    desk = Desk(str(tiny_model), tmp_path_factory.mktemp("desk"), allow_paths=True)
    desk.warm_up()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(desk.uploads))
        demo = build_page(desk)
        _, address, _ = demo.launch(**launch_settings(desk, "127.0.0.1"), quiet=True, prevent_thread_lock=True)
        yield SimpleNamespace(address=address, paths=paths, desk=desk)
        demo.close(verbose=False)


@pytest.fixture
def page(browser, app) -> Iterator:
    opened = browser.new_page(viewport={"width": 1280, "height": 720})
    opened.set_default_timeout(PATIENCE)
    problems: list[str] = []
    opened.on("pageerror", lambda error: problems.append(str(error)))
    with opened.expect_request(re.compile("/queue/join")):
        opened.goto(app.address)
    yield opened
    assert not problems
    opened.close()


def analysed(page, slides: int) -> None:
    """Until so many slides are in the case, all of them analysed."""
    page.wait_for_function(
        "count => { const cells = [...document.querySelectorAll('#view .slides em')]; "
        "return cells.length === count && cells.every(cell => cell.textContent.includes('of')); }",
        arg=slides,
    )


def test_two_slide_case(page, app):
    began, times = time.time(), {}
    page.fill("#path textarea, #path input", str(app.paths[0]))
    page.press("#path textarea, #path input", "Enter")
    page.wait_for_selector("#view .item")
    assert not page.locator("#view .slides").is_visible(), "one slide is no film"
    times["first slide"], began = time.time() - began, time.time()
    page.click("#add-slide")
    page.fill("#path textarea, #path input", str(app.paths[1]))
    page.press("#path textarea, #path input", "Enter")
    page.wait_for_function("document.querySelector('.viewer').dataset.slide === '2'")
    times["second slide on screen"] = time.time() - began
    analysed(page, 2)
    times["case of two"], began = time.time() - began, time.time()
    assert "Case of 2 slides" in page.inner_text("#facts")
    assert not page.is_checked("#beside input"), "the next slide is a case of its own again"
    page.fill("#options textarea", "fat\nliver")
    page.fill("#question textarea", "Which tissue is this?")
    page.press("#question textarea", "Enter")
    link = page.locator('#chat .bot a[href*="#patch-"]').first
    link.wait_for()
    times["question to its evidence"] = time.time() - began
    print({what: round(seconds, 2) for what, seconds in times.items()})
    number, rank = re.findall(r"Slide (\d), #(\d+)", link.inner_text())[0]
    page.locator("#view .slides .look").nth(2 - int(number)).click()  # the other one
    link.click()
    page.wait_for_function(
        "([slide, rank]) => { const seen = document.querySelector('.viewer').dataset; "
        "return seen.slide === slide && seen.current === rank && seen.waiting === '0'; }",
        arg=[number, rank],
    )
    picture = page.locator("#view .item[aria-current=true] img")
    assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") > 0
    assert page.evaluate("document.documentElement.scrollHeight <= innerHeight"), "one screen"
    page.locator("#view .slides .out").first.click()
    page.wait_for_function("!document.querySelector('#view .slides').checkVisibility()")
    page.wait_for_selector("#facts >> text=phantom 6")
    assert page.locator("#chat .bot-row").count() == 0, "its answers were about two slides"
    assert "Mustermann" not in page.content()


def test_files_that_are_chosen_together_are_one_case(page, app):
    page.set_input_files("#upload input[type=file], input[type=file][multiple]", [str(path) for path in app.paths])
    analysed(page, 2)
    names = page.evaluate("[...document.querySelectorAll('#view .slides .look')].map(cell => cell.title)")
    assert all(name.startswith("slide ") for name in names)
    page.keyboard.press("Escape")
    page.locator("#view .slide").focus()
    shown = page.evaluate("document.querySelector('.viewer').dataset.slide")
    page.keyboard.press("s")
    page.wait_for_function("shown => document.querySelector('.viewer').dataset.slide !== shown", arg=shown)


def test_two_slides_stand_side_by_side_and_one_button_restores_the_case(page, app):
    page.fill("#path textarea, #path input", "\n".join(map(str, app.paths)))
    page.press("#path textarea, #path input", "Enter")
    analysed(page, 2)
    page.locator("#view .slides .look").first.click()
    kept = page.locator("#view .item").count()
    page.wait_for_function("document.querySelector('#view .features .title').textContent.includes('UMAP')")
    began = time.time()
    page.click("#view .slides .compare")
    page.wait_for_selector("#other .item")
    print(f"two slides side by side: {time.time() - began:.2f} s")
    assert page.inner_text("#view .badge") == "Slide 1"
    assert page.inner_text("#other .badge") == "Slide 2"
    page.locator("#view .slide").focus()
    page.keyboard.press("5")  # 20x, in both, which were scanned at 0.5 and at 0.25 um/px
    page.wait_for_timeout(200)
    scales = page.evaluate("[...document.querySelectorAll('.viewer')].map(v => +v.dataset.scale)")
    assert scales[0] == pytest.approx(2 * scales[1], rel=0.01)
    page.fill("#options textarea", "fat\nliver")
    page.fill("#question textarea", "Which tissue is this?")
    page.press("#question textarea", "Enter")
    page.locator("#chat .compare .other a[href*='#patch-']").first.wait_for()
    assert page.locator("#chat .compare h4").all_inner_texts() == ["Slide 1", "Slide 2"]
    page.click(".aside [data-do=leave]")
    page.wait_for_selector("#other", state="detached")
    analysed(page, 2)
    assert page.locator("#view .item").count() == kept
    assert page.inner_text("#view .features .title").startswith("UMAP"), "the map is there again"
    assert page.locator("#chat .bot-row").count() == 0
