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
from tests.web.waits import note_wait

PATIENCE = 240_000  # ms
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
    times["open to the first slide's patches"], began = time.time() - began, time.time()
    page.click("#add-slide")
    page.fill("#path textarea, #path input", str(app.paths[1]))
    page.press("#path textarea, #path input", "Enter")
    page.wait_for_function("document.querySelector('.viewer').dataset.slide === '2'")
    times["second slide added, on screen"] = time.time() - began
    analysed(page, 2)
    times["second slide added, to the patches of both"], began = time.time() - began, time.time()
    assert "Case of 2 slides" in page.inner_text("#facts")
    assert not page.is_checked("#beside input"), "the next slide is a case of its own again"
    page.fill("#options textarea", "fat\nliver")
    page.fill("#question textarea", "Which tissue is this?")
    page.press("#question textarea", "Enter")
    link = page.locator('#chat .bot a[href*="#patch-"]').first
    link.wait_for()
    times["question to both, to its evidence"] = time.time() - began
    for what, seconds in times.items():
        note_wait(f"two-slide case: {what}", "phantom", seconds)
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
    page.click("#earlier summary")
    assert "Which tissue is this?" in page.inner_text("#earlier"), "and stay, marked as such"
    assert "1 answer about the slides of before" in page.inner_text("#earlier")
    assert page.locator("#earlier a").count() == 0, "its patches have other numbers now"
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
    note_wait("two-slide case: side by side", "phantom", time.time() - began)
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
    page.locator("#chat .compare .other .rests").first.wait_for()
    assert page.locator("#chat .compare h4").all_inner_texts() == ["Slide 1", "Slide 2"]
    page.click(".aside [data-do=leave]")
    page.wait_for_selector("#other", state="detached")
    analysed(page, 2)
    assert page.locator("#view .item").count() == kept
    assert page.inner_text("#view .features .title").startswith("UMAP"), "the map is there again"
    assert page.locator("#chat .bot-row").count() == 0


def ask(page, question: str = "Which tissue is this?") -> None:
    page.fill("#options textarea", "fat\nliver")
    page.fill("#question textarea", question)
    page.press("#question textarea", "Enter")
    page.locator("#chat .bot .rests").first.wait_for()


def load_anew(page) -> None:
    with page.expect_request(re.compile("/queue/join")):
        page.reload()


def test_seen_a_reload_forgot_the_slides_and_the_chat_without_a_word(page, app):
    page.fill("#path textarea, #path input", "\n".join(map(str, app.paths)))
    page.press("#path textarea, #path input", "Enter")
    analysed(page, 2)
    ask(page)
    page.wait_for_function("document.querySelector('#question button.submit-button')")
    page.locator("#view .item").nth(1).click()
    page.locator("#view .slide").focus()
    page.keyboard.press("a")
    page.fill("#called textarea, #called input", "Case 7")
    page.press("#called textarea, #called input", "Enter")
    page.wait_for_timeout(800)
    look = "['x', 'y', 'scale', 'slide', 'current'].map(key => document.querySelector('#view .viewer').dataset[key])"
    seen, said = page.evaluate(look), page.inner_text("#chat .bot >> nth=0")
    began = time.time()
    load_anew(page)
    page.wait_for_selector("#chat .bot-row")
    note_wait("two-slide case: loaded anew, to slides and chat", "phantom", time.time() - began)
    assert page.inner_text("#chat .bot >> nth=0") == said
    page.wait_for_function(f"seen => {look}.join() === seen.join()", arg=seen)
    assert page.locator("#view .item u", has_text="+").count() == 1, "what the reader said of patches"
    page.wait_for_function("document.querySelector('#called textarea, #called input').value === 'Case 7'")
    assert "Mustermann" not in page.url + page.evaluate("JSON.stringify({...sessionStorage, ...localStorage})")
    ask(page, "Is it fat?")
    page.wait_for_function("document.querySelectorAll('#chat .bot-row').length === 2")


def test_seen_a_reload_lost_an_upload_without_a_word(page, app):
    page.set_input_files("#upload input[type=file], input[type=file][multiple]", str(app.paths[0]))
    page.wait_for_selector("#view .item")
    load_anew(page)
    page.wait_for_selector("#lost >> text=uploaded is deleted")
    assert not page.locator("#reopen").is_visible()
    page.fill("#path textarea, #path input", str(app.paths[0]))
    page.press("#path textarea, #path input", "Enter")
    page.wait_for_selector("#view .item")
    page.click("#open-menu")
    assert not page.locator("#lost").is_visible()


def test_seen_a_wrong_path_was_told_in_a_toast_that_flew_past_and_toasts_piled_up(page, app):
    field = page.locator("#path textarea, #path input")
    field.fill("/nowhere/slide.svs")
    field.press("Enter")
    page.wait_for_selector("#wrong >> text=There is no file at the path given")
    boxes = [page.locator(part).bounding_box() for part in ("#path", "#wrong")]
    assert 0 <= boxes[1]["y"] - boxes[0]["y"] - boxes[0]["height"] < 40, "where it was typed"
    assert field.input_value() == "/nowhere/slide.svs"
    assert page.locator(".toast-body").count() == 0
    for _ in range(3):
        page.fill("#question textarea", "Which tissue?")
        page.press("#question textarea", "Enter")
        page.wait_for_timeout(500)
    page.wait_for_selector(".toast-body")
    assert sum(one.is_visible() for one in page.locator(".toast-message-item").all()) == 1
    field.fill(str(app.paths[0]))
    field.press("Enter")
    page.wait_for_selector("#view .item")
    assert page.locator("#wrong p").count() == 0
    page.evaluate(DROP, "no slide")
    page.wait_for_selector("#wrong p")
    assert page.locator("#wrong").is_visible(), "the panel opens for what was dropped on the slide"


DROP = """text => {
  const dropped = new DataTransfer();
  dropped.items.add(new File([text], "a.svs"));
  document.dispatchEvent(new DragEvent("drop", { dataTransfer: dropped, bubbles: true }));
}"""


def test_seen_the_chat_had_170_px_beside_what_was_planted(page, app):
    page.fill("#path textarea, #path input", str(app.paths[0]))
    page.press("#path textarea, #path input", "Enter")
    page.wait_for_selector("#view .item")
    ask(page)
    page.click("#secret > button")
    page.wait_for_timeout(600)
    room, chat, planted = (page.locator(part).bounding_box()["height"] for part in ("#ask", "#chat", "#secret"))
    assert chat > 0.38 * room, (room, chat, planted)
    assert page.locator("#question").is_visible()
    assert page.evaluate("document.documentElement.scrollHeight <= innerHeight"), "one screen"


def test_seen_labels_covered_a_third_of_small_pictures(page, app):
    page.fill("#path textarea, #path input", "\n".join(map(str, app.paths)))
    page.press("#path textarea, #path input", "Enter")
    analysed(page, 2)
    ask(page)
    covered = page.evaluate(
        """() => [...document.querySelectorAll('#chat a[href*="#patch-"], #chat a[href*="#focus-"]')].map(link => {
          const [box, label] = [link, link.firstElementChild].map(part => part.getBoundingClientRect());
          return Math.max(0, box.top + box.width - label.top) / box.width;
        })"""
    )
    assert covered
    assert max(covered) < 0.05, "a citation's name is below its picture"
    film = page.evaluate(
        """() => [...document.querySelectorAll('#view .item')].map(item => {
          const [picture, tag] = ['img', 'i'].map(part => item.querySelector(part).getBoundingClientRect());
          return tag.width * tag.height / (picture.width * picture.height);
        })"""
    )
    assert max(film) < 0.1


def test_seen_a_real_scans_card_was_captioned_drawing(page):
    caption = page.evaluate("getComputedStyle(document.querySelector('#cmu-1 .picture'), '::after').content")
    assert "scan" in caption


def test_seen_the_empty_state_was_two_blank_boxes(page):
    cards = page.locator("#gallery .slide-card")
    assert cards.count() == 2
    assert all(card.locator("span").last.inner_text() for card in cards.all()), "what each teaches"
    drawn = "[...document.querySelectorAll('#gallery .picture')].map(p => getComputedStyle(p).backgroundImage)"
    assert all(picture.startswith("url(") for picture in page.evaluate(drawn))
    assert page.locator("#gallery [data-tour]").is_visible()
    assert page.locator("#gallery .public summary").is_visible()


def test_seen_by_a_pathologist(page, app):
    """Seen: seconds over the tabs, an arrow over a label, answers named by their HTML, a chat that was gone."""
    page.fill("#path textarea, #path input", str(app.paths[0]))
    page.press("#path textarea, #path input", "Enter")
    page.wait_for_selector("#view .item")
    assert not page.locator("#back").is_visible()
    assert page.evaluate("getComputedStyle(document.querySelector('.corner')).display") != "none"
    ask(page)
    page.wait_for_function("document.querySelector('#question button.submit-button')")
    page.wait_for_function(
        """() => { const named = [...document.querySelectorAll('#chat [aria-label*="s message: "]')];
        return named.length > 1 && named.every(one => !/[<>]/.test(one.getAttribute('aria-label'))); }"""
    )
    page.click('[role=tab][data-tab="what-if"]')
    page.click("#again")
    page.wait_for_selector("#compare .compare")
    assert "asked again: Which tissue is this?" in page.inner_text("#compare")
    page.click('[role=tab][data-tab="ask"]')
    assert "hidden, not lost" in page.inner_text("#hidden-chat")
    page.locator("#view .aside button").click()
    page.wait_for_selector(".badge", state="hidden")
    assert not page.locator("#hidden-chat").is_visible()
    page.locator("#view .item").nth(1).click()
    page.locator("#view .slide").focus()
    page.keyboard.press("a")
    said = page.inner_text("#chat .bot >> nth=0")
    page.click("#open-menu")
    page.fill("#path textarea, #path input", str(app.paths[1]))
    page.press("#path textarea, #path input", "Enter")
    page.wait_for_selector("#back:not(.hidden)")
    page.wait_for_function("document.querySelectorAll('#chat .bot-row').length === 0")
    page.wait_for_selector("#view .item")
    page.click("#back")
    page.wait_for_selector("#chat .bot-row")
    assert page.inner_text("#chat .bot >> nth=0") == said
    page.wait_for_function("[...document.querySelectorAll('#view .item u')].some(one => one.textContent.includes('+'))")
