"""Answers in a browser: what is shown before they are weighed, the question after them, what is asked by a tap."""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from sparsewsi import phantom
from sparsewsi.model.limits import Limit, Limits
from sparsewsi.readers.server import ServerReader
from sparsewsi.web.desk import Desk
from sparsewsi.web.page import build_page
from sparsewsi.web.serve import launch_settings

PATIENCE = 120_000  # ms
WEIGH = threading.Event()  # what is weighed waits for it, so that what is shown meanwhile can be seen
ORGAN = Limits((Limit("organ", (r"\borgan\b",), 21, 18, 0.44, 0.24, 0.68, least=1.0),))
READY = "document.querySelector('#question button.submit-button')"
pytestmark = pytest.mark.browser


@contextmanager
def serving(desk: Desk) -> Iterator[str]:
    """The page of a desk on this machine; yields its address."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(desk.uploads))
        demo = build_page(desk)
        _, address, _ = demo.launch(**launch_settings(desk, "127.0.0.1"), quiet=True, prevent_thread_lock=True)
        yield address
        demo.close(verbose=False)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slides") / "a.tiff"
    phantom.write_phantom(path, seed=5, size=1536)
    return path


@pytest.fixture(scope="module")
def unsure(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A page whose model says of itself that it is never sure of an organ."""
    desk = Desk(str(tiny_model), tmp_path_factory.mktemp("desk"), allow_paths=True)
    desk.warm_up()
    with pytest.MonkeyPatch.context() as patch:
        weigh = desk.model.leave_one_out
        patch.setattr(desk.model, "limits", ORGAN)
        patch.setattr(desk.model, "leave_one_out", lambda *given: (WEIGH.wait(PATIENCE / 1000), weigh(*given))[1])
        with serving(desk) as address:
            yield address


def open_slide(browser, address: str, path: Path, wait: bool = True):
    import playwright.sync_api

    page = browser.new_page(viewport={"width": 1440, "height": 900})
    page.set_default_timeout(PATIENCE)
    with page.expect_request(re.compile("/queue/join")):
        page.goto(address)
    for _ in range(5):  # on a busy machine the page may not listen yet, and set the field back
        page.fill("#path textarea, #path input", str(path))
        page.press("#path textarea, #path input", "Enter")
        with suppress(playwright.sync_api.TimeoutError):
            page.wait_for_function("document.querySelector('.viewer').dataset.scale", timeout=20_000)
            break
    if wait:
        page.wait_for_selector("#view .item")
    return page


def ask(page, question: str) -> None:
    page.fill("#question textarea", question)
    page.press("#question textarea", "Enter")


def answered(page, answers: int) -> None:
    """Until so many answers are there, all of them weighed or stopped."""
    page.wait_for_function(
        f"document.querySelectorAll('#chat .bot-row').length === {answers} && {READY}"
        " && !/Weighing|is coming/.test(document.querySelector('#chat').innerText)"
    )


def test_seen_a_bare_answer_that_became_not_sure_and_a_second_question_that_was_lost(browser, unsure, path):
    page = open_slide(browser, unsure, path)
    page.evaluate(
        """() => { window.seen = []; setInterval(() => {
          document.querySelectorAll("#chat .bot-row").forEach(row => window.seen.push(row.innerText.split("\\n")[0]));
        }, 20); }"""
    )
    WEIGH.clear()
    ask(page, "Which organ is this?")
    page.wait_for_function("document.querySelector('#chat').innerText.includes('Weighing')")
    ask(page, "Is it an organ at all?")
    page.wait_for_selector("#next >> text=Is it an organ at all?")
    assert page.input_value("#question textarea") == ""
    WEIGH.set()
    page.wait_for_function("document.querySelectorAll('#chat .user-row').length === 2")
    answered(page, 2)
    assert not page.locator("#next p").count()
    seen = {line for line in page.evaluate("window.seen") if line}
    assert seen
    assert all(line.startswith(("Not sure", "No answer: not sure")) for line in seen), seen
    WEIGH.clear()
    ask(page, "Which organ?")
    page.wait_for_function("document.querySelector('#chat').innerText.includes('Weighing')")
    ask(page, "And then?")
    page.wait_for_selector("#next p")
    page.click("#question button.stop-button")
    page.wait_for_function("document.querySelector('#question textarea').value === 'And then?'")
    WEIGH.set()
    answered(page, 3)
    assert page.input_value("#question textarea") == "And then?"
    assert not page.locator("#next p").count()
    page.close()


def test_seen_suggested_questions_that_only_filled_the_box_and_back_before_any_what_if(browser, unsure, path):
    page = open_slide(browser, unsure, path, wait=False)
    if not page.locator("#view .item").count():  # else it was analysed too fast to be tapped early
        page.locator("#examples .gallery-item").first.click()
        page.wait_for_function("document.querySelector('#question textarea').value !== ''")
        page.fill("#question textarea", "")
    page.wait_for_selector("#view .item")
    assert not page.locator("#chat .user-row").count()
    WEIGH.set()
    page.locator("#examples .gallery-item").first.click()  # the last one is refused: of no kind that was validated
    answered(page, 1)
    page.click('[role=tab][data-tab="what-if"]')
    assert not page.locator("#own").is_visible()
    WEIGH.clear()
    page.click("#again")
    page.wait_for_selector("#compare .compare")
    page.click("#own")  # while it is still weighed
    page.wait_for_selector(".badge", state="hidden")
    assert not page.locator("#own").is_visible()
    page.click('[role=tab][data-tab="ask"]')
    WEIGH.set()
    page.wait_for_timeout(1000)
    answered(page, 1)
    page.close()


def test_seen_an_answer_that_scrolled_out_of_sight_when_its_pictures_came(browser, unsure, path):
    WEIGH.set()
    page = open_slide(browser, unsure, path)
    page.set_viewport_size({"width": 1280, "height": 720})
    for answers in (1, 2):
        ask(page, "Describe what you see.")
        answered(page, answers)
        page.wait_for_timeout(500)
        gap, more = page.evaluate(
            """() => { const pane = document.querySelector('#chat .bubble-wrap');
              const last = [...pane.querySelectorAll('.user-row')].pop();
              return [last.getBoundingClientRect().top - pane.getBoundingClientRect().top,
                      pane.scrollHeight - pane.clientHeight]; }"""
        )
        assert more > 0, "longer than its room"
        assert -1 <= gap < 40, "the question, and below it what the answer begins with"
    page.close()


def test_a_page_that_learns_late_of_the_end_of_its_stream_hears_every_answer(browser, unsure, path):
    late = """(() => {
      const ask = window.fetch;
      window.fetch = async (asked, given) => {
        const reply = await ask(asked, given);
        if (!/queue.data/.test(asked.url ?? asked)) return reply;
        const slow = new TransformStream({async transform(part, out) {
          const text = new TextDecoder("latin1").decode(part), at = text.indexOf('data: {"msg":"close_stream"');
          if (at >= 0) {
            out.enqueue(part.slice(0, at));
            window.late = (window.late ?? 0) + 1;
            await new Promise(go => setTimeout(go, 500));
          }
          out.enqueue(part.slice(Math.max(at, 0)));
        }});
        return new Response(reply.body.pipeThrough(slow), {status: reply.status, headers: reply.headers});
      };
    })()"""
    WEIGH.set()
    page = browser.new_page()
    page.add_init_script(late)
    page.goto(unsure)
    page.wait_for_function("window.late")
    page.wait_for_timeout(1000)
    page.fill("#path textarea, #path input", str(path))  # once: whoever asks again hears what was said before
    page.press("#path textarea, #path input", "Enter")
    page.wait_for_selector("#view .item", timeout=60_000)
    for answers in (1, 2):
        ask(page, "Which organ is this?")
        answered(page, answers)
    assert page.evaluate("window.late") > 3
    page.close()


def test_a_reader_that_cannot_be_measured_is_asked_again_without_a_focus_by_one_tap(
    browser, path, tiny_model, stand_in_server, tmp_path
):
    reader = ServerReader("m", stand_in_server.endpoint, first_wait=0.01)
    with serving(Desk(str(tiny_model), tmp_path, allow_paths=True, reader=reader)) as address:
        page = open_slide(browser, address, path)
        stand_in_server.say("Fat.")
        ask(page, "Which tissue is this?")
        answered(page, 1)
        assert "To ask again without a focus takes one more request" in page.inner_text("#chat")
        chip = page.locator("#chat .again a").first
        told = re.match(r"focus (\w) \((\d+) pictures\)", chip.inner_text())
        assert told
        assert "One more request" in chip.get_attribute("title")
        stand_in_server.say("Liver.")
        chip.click()
        page.wait_for_selector(f".badge >> text=without focus {told[1]}")
        page.wait_for_selector("#compare >> text=Liver.", state="attached")
        assert len(stand_in_server.received) == 2
        assert stand_in_server.received[1][2].count(b"image_url") // 2 == int(told[2])
        page.close()
