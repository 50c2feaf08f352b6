"""The app in a real browser, behind a path prefix; tests are named by the requirement they show (1 to 15).

One page is opened and asked once; the tests look at it in turn. What needs no server is in test_viewer.py.
Pictures of every state go to screenshots/, for people to look at.
"""

import csv
import io
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from sparsewsi import case, phantom

ROOT = Path(__file__).resolve().parents[1]
LOOKS = ROOT / "screenshots"
PREFIX = "/desk"
PATIENCE = 240_000  # ms; umap's first compilation on a busy machine
SECRETS = ("MUSTERMANN", "1950-12-24", "ACC-4711")
pytestmark = pytest.mark.browser


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def behind_prefix(upstream: str) -> Iterator[str]:
    """A proxy that serves an app under PREFIX, as hospitals and hubs do; yields the address of the page."""
    import httpx
    import uvicorn
    from starlette.applications import Starlette
    from starlette.background import BackgroundTask
    from starlette.requests import Request
    from starlette.responses import StreamingResponse
    from starlette.routing import Route

    port = free_port()
    client = httpx.AsyncClient(base_url=upstream, timeout=None)

    async def forward(request: Request) -> StreamingResponse:
        path = request.url.path.removeprefix(PREFIX) or "/"
        headers = [(name, value) for name, value in request.headers.raw if name != b"host"]
        headers += [(b"x-forwarded-host", f"127.0.0.1:{port}".encode()), (b"x-forwarded-proto", b"http")]
        url = httpx.URL(path=path, query=request.url.query.encode())
        answer = await client.send(
            client.build_request(request.method, url, headers=headers, content=request.stream()), stream=True
        )
        kept = {k: v for k, v in answer.headers.items() if k not in ("content-length", "transfer-encoding")}
        return StreamingResponse(answer.aiter_raw(), answer.status_code, kept, background=BackgroundTask(answer.aclose))

    page = Route(PREFIX + "{path:path}", forward, methods=["GET", "POST", "HEAD"])
    server = uvicorn.Server(uvicorn.Config(Starlette(routes=[page]), port=port, log_level="critical"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{port}{PREFIX}/"
    server.should_exit = True
    thread.join(10)


@pytest.fixture(scope="module")
def cached_phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder with a small phantom in place of the bundled example."""
    home = tmp_path_factory.mktemp("home")
    name = f"phantom-{phantom.EXAMPLE_SEED}-{phantom.EXAMPLE_SIZE}-v{phantom.VERSION}.tiff"
    phantom.write_phantom(home / name, seed=3, size=2048)
    return home


@contextmanager
def running(home: Path, model: Path, *flags: str, **environment: str) -> Iterator[tuple[str, Path]]:
    """The app in its own process: its address and what it printed."""
    (home / "tmp").mkdir(exist_ok=True)
    port = free_port()
    given = {"SPARSEWSI_CACHE": str(home), "TMPDIR": str(home / "tmp"), "PYTHONUNBUFFERED": "1", **environment}
    environ = {name: value for name, value in os.environ.items() if name != "GRADIO_TEMP_DIR"} | given
    command = [sys.executable, "app.py", "--port", str(port), "--model", str(model), *flags]
    with (home / "out").open("w") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=out, stderr=out)
    try:
        for _ in range(1200):
            if process.poll() is not None or "served at" in (home / "out").read_text():
                break
            time.sleep(0.2)
        assert "served at" in (home / "out").read_text(), (home / "out").read_text()
        yield f"http://127.0.0.1:{port}/", home / "out"
    finally:
        process.terminate()
        process.wait(20)
    assert "Traceback" not in (home / "out").read_text()
    assert not list((home / "tmp").glob("sparsewsi-*")), "what was private is gone with the process"


@pytest.fixture(scope="module")
def served(browser, tiny_model: Path, cached_phantom: Path) -> Iterator[SimpleNamespace]:
    """The app behind a prefix."""
    home = cached_phantom
    environment = {"SPARSEWSI_LOG": str(home / "log.jsonl"), "GRADIO_ROOT_PATH": PREFIX}
    with running(home, tiny_model, **environment) as (address, out), behind_prefix(address.rstrip("/")) as url:
        yield SimpleNamespace(url=url, home=home, example=next(home.glob("phantom-*.tiff")), out=out)


def open_page(browser, served, address: str = "", **settings):
    """A page of the app that listens: before the load event Gradio may still set a field back to its first value."""
    page = new_page(browser, **settings)
    with page.expect_request(re.compile("/queue/join")):
        page.goto(served.url + address)
    return page


def new_page(browser, **settings):
    page = browser.new_page(viewport={"width": 1440, "height": 900}, **settings)
    page.set_default_timeout(PATIENCE)
    page.sent, page.hosts, page.problems = [], set(), []
    page.on("request", lambda request: page.sent.append((request.method, request.url)))
    page.on("request", lambda r: page.hosts.add(r.url.split("/")[2]) if "://" in r.url else None)
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    return page


@pytest.fixture(scope="module")
def desk(browser, served) -> Iterator:
    """A page with the phantom analysed and one multiple-choice question answered and weighed."""
    LOOKS.mkdir(exist_ok=True)
    page = open_page(browser, served)
    page.wait_for_selector("#phantom")
    page.screenshot(path=LOOKS / "empty.png")
    page.fill("#question textarea", "Which tissue is this?")
    page.press("#question textarea", "Enter")
    page.wait_for_selector("text=Open a slide first")
    assert page.input_value("#question textarea") == "Which tissue is this?"
    page.click("#phantom")
    page.wait_for_function("document.querySelector('.viewer').dataset.scale")
    page.screenshot(path=LOOKS / "analysing.png")
    page.wait_for_selector(".item")
    page.get_by_text(case.PRESENT_QUESTION, exact=True).first.click()
    page.wait_for_function("document.querySelector('#options textarea').value.includes('\\n')")
    page.press("#question textarea", "Enter")
    page.wait_for_selector('#chat .bot a[href*="#patch-"]')
    page.wait_for_function("document.querySelector('.features .title').innerText.includes('UMAP')")
    page.screenshot(path=LOOKS / "answered.png", full_page=True)
    yield page
    assert page.hosts == {served.url.split("/")[2]}, "no request to another host"
    assert not page.problems
    page.close()


def download(page, name: str) -> str:
    found = "[...document.querySelectorAll('.files a')].find(link => link.href.endsWith(name))"
    return page.evaluate(f"name => fetch({found}.href).then(answer => answer.text())", name)


def timed(page, deed: str, done: str) -> float:
    """Milliseconds until JS finds `done` true after `deed`, frame by frame; least of three: the machine may be busy."""
    script = f"""() => new Promise(resolve => {{
        const began = performance.now();
        const look = () => ({done}) ? resolve(performance.now() - began) : requestAnimationFrame(look);
        {deed}; look();
    }})"""
    return min(page.evaluate(script) for _ in range(3))


def test_01_a_citation_lands_on_the_evidence(desk):
    link = desk.locator('#chat .bot a[href*="#patch-"]').first
    number = link.inner_text().removeprefix("#")
    marked = "document.querySelector('.item[aria-current=\"true\"] b').innerText"
    at_once = link.evaluate(f"link => {{ link.click(); return {marked}; }}")
    assert at_once == f"#{number}", "before any answer of the server could come"
    desk.wait_for_function("document.querySelector('.viewer').dataset.waiting === '0'")
    desk.screenshot(path=LOOKS / "evidence.png")
    took = timed(
        desk,
        "document.querySelector('.slide').focus(); document.querySelector('#chat .bot a[href*=\"#patch-\"]').click()",
        f"document.querySelector('.viewer').dataset.current === '{number}' && "
        "document.querySelector('.viewer').dataset.waiting === '0'",
    )
    print(f"citation to sharp picture: {took:.0f} ms")
    assert took < 500


def test_02_tiles_are_the_pixels_of_level_0(desk, served):
    from sparsewsi.slide import open_slide

    shown = desk.evaluate(
        """async () => {
          const address = document.querySelector('.item img').src.replace(/patch.*/, '0/1_1.jpg');
          const picture = await createImageBitmap(await (await fetch(address)).blob());
          const canvas = new OffscreenCanvas(512, 512), pen = canvas.getContext('2d');
          pen.drawImage(picture, 0, 0);
          return [...pen.getImageData(0, 0, 512, 512).data];
        }"""
    )
    with open_slide(served.example) as slide:
        wanted = slide.read_level(0, (512, 512), (512, 512))
    assert np.abs(np.reshape(shown, (512, 512, 4))[..., :3] - wanted.astype(int)).mean() < 4


def test_03_what_answered_is_named_wherever_an_answer_is_shown(desk):
    facts = desk.inner_text("#facts")
    assert all(words in facts for words in ("phantom 3", "tiny-model", "efficientnet-lite0", "6 of", "% of the tissue"))
    notice = "Demo model, research use only, not for diagnosis."
    assert notice in desk.inner_text("#chat .bot >> nth=0")
    assert notice in download(desk, "report.html")
    assert notice in json.loads(download(desk, "selection.json"))["notice"]


def test_05_and_06_strip_keys_and_map_move_one_selection(desk):
    desk.locator(".slide").focus()
    desk.keyboard.press("n")
    first = desk.evaluate("document.querySelector('.viewer').dataset.current")
    desk.keyboard.press("n")
    desk.wait_for_function(f"document.querySelector('.viewer').dataset.current !== '{first}'")
    box = desk.locator(".map").bounding_box()
    desk.mouse.move(box["x"] + 4, box["y"] + 4)
    desk.mouse.down()
    for x, y in ((0.98, 0.02), (0.98, 0.98), (0.02, 0.98), (0.02, 0.03)):
        desk.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"], steps=3)
    desk.mouse.up()
    assert re.match(r"\d+ patches in the lasso, 6 of them selected", desk.inner_text(".members b"))
    desk.screenshot(path=LOOKS / "lasso.png", full_page=True)
    desk.click('[data-do="clear"]')


def test_07_scores_of_all_patches_and_the_doubts_about_the_cut(desk):
    desk.click('[data-do="heat"]')
    desk.wait_for_selector(".colours:visible")
    desk.screenshot(path=LOOKS / "scores.png")
    desk.click('[data-do="heat"]')
    assert re.search(r"6 of \d+ patches", desk.inner_text(".count"))
    assert "⚠" in desk.inner_text("#facts")


def ask_with(page, patches: int) -> None:
    """Ask again from so many patches. Gradio sets a slider back once, a moment after its accordion was opened."""
    number = page.locator("#k input[type=number]")
    for _ in range(4):
        number.fill(str(patches))
        number.press("Tab")
        page.click("#again")
        page.wait_for_selector("#compare .compare > div >> nth=1 >> a")
        shown = {number.input_value(), page.input_value("#k input[type=range]")}
        if shown == {str(patches)} and f"{patches} patches" in page.inner_text("#compare h4 >> nth=1"):
            return
        page.click("#own")
        page.wait_for_selector("#compare .compare", state="detached")
    raise AssertionError(f"asked for {patches} patches four times; the slider shows {shown}")


def test_08_what_if_shows_both_answers_beside_each_other(desk):
    try:
        desk.locator(".item").first.click()
        desk.click('[data-do="drop"]')
        desk.click("#what-if button >> nth=0")
        desk.wait_for_selector("#picked >> text=dropped: 1")
        assert desk.input_value("#k input[type=range]") == "8", "the model's own 6, as near as the slider goes"
        ask_with(desk, 16)
        assert "16 patches, learned, 1 dropped" in desk.inner_text("#compare h4 >> nth=1")
        assert desk.inner_text(".count").startswith("16 of ")
        assert "#1" not in desk.locator(".item b").all_inner_texts()
        desk.screenshot(path=LOOKS / "what-if.png", full_page=True)
    finally:
        desk.click("#own", timeout=5000)
    desk.wait_for_function("document.querySelector('.count').innerText.startsWith('6 of ')")


# How many answers stand in the chat: each ends with the notice.
ANSWERS = "(document.querySelector('#chat').innerText.split('not for diagnosis').length - 1)"


def wait_until_weighed(page, answers: int) -> None:
    """Until so many answers stand in the chat, nothing is being weighed and the next question may be asked."""
    page.wait_for_function(
        f"{ANSWERS} === {answers} && !document.querySelector('#chat').innerText.includes('Weighing')"
        " && document.querySelector('#question button.submit-button')"
    )


def ask(page, question: str) -> None:
    page.fill("#question textarea", question)
    page.press("#question textarea", "Enter")


def undo(page, question: str) -> None:
    """Take back the last question, which is this one."""
    page.locator("#chat button[aria-label='Undo']").last.click()
    page.wait_for_function("text => document.querySelector('#question textarea').value === text", arg=question)


def stop_in_time(page) -> bool:
    """Ask, and press Stop once words come; False where the answer was complete before."""
    import playwright.sync_api

    ask(page, "Describe this slide.")
    page.wait_for_function(f"{ANSWERS} === 2")
    began = time.time()
    try:
        page.locator("#question button.stop-button").click(timeout=5000)
        page.wait_for_selector("#question button.submit-button")
        print(f"stop: {time.time() - began:.2f} s")
    except playwright.sync_api.TimeoutError:
        pass
    wait_until_weighed(page, 2)
    return "was not weighed" in page.inner_text("#chat")


def test_09_stop_retry_and_undo(desk):
    wait_until_weighed(desk, 1)
    first = desk.inner_text("#chat .bot >> nth=0")
    try:
        for _ in range(5):
            if stop_in_time(desk):
                break
            undo(desk, "Describe this slide.")
            wait_until_weighed(desk, 1)
        else:
            raise AssertionError("no answer could be stopped")
        ask(desk, "Describe it.")
        wait_until_weighed(desk, 3)
        desk.locator("#chat button[aria-label='Retry']").last.click()
        desk.wait_for_function(f"{ANSWERS} === 2 || document.querySelector('#chat').innerText.includes('Weighing')")
        wait_until_weighed(desk, 3)
        for question, left in (("Describe it.", 2), ("Describe this slide.", 1)):
            undo(desk, question)
            wait_until_weighed(desk, left)
    finally:
        desk.fill("#question textarea", "")
    assert desk.inner_text("#chat .bot >> nth=0") == first
    strongest = desk.locator('#chat .bot a[href*="#patch-"]').first
    strongest.click()
    factor = float(strongest.evaluate("link => link.nextSibling.textContent.match(/[0-9.]+/)[0]"))
    shown = "parseFloat(document.querySelector('.inspect .what').innerText.split('evidence ')[1])"
    desk.wait_for_function(f"Math.abs({shown} / {factor} - 1) < 0.02")  # the viewer is back at this answer, too


def test_10_patches_go_to_qupath_and_regions_come_back(desk, tmp_path):
    found = json.loads(download(desk, "patches.geojson"))["features"]
    assert len(found) == 6
    x, y = found[0]["geometry"]["coordinates"][0][0]
    region = {
        **found[0],
        "geometry": {
            "type": "Polygon",
            "coordinates": [[[x, y], [x + 224, y], [x + 224, y + 224], [x, y + 224], [x, y]]],
        },
    }
    (tmp_path / "roi.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [region]}))
    desk.set_input_files("#regions input[type=file], input[accept*=geojson]", str(tmp_path / "roi.geojson"))
    desk.wait_for_selector(".members b >> text=1 patch in the imported regions, 1 of them selected")


def test_11_the_report_opens_offline_and_the_csv_is_one_row_a_patch(desk, browser, tmp_path):
    report = download(desk, "report.html")
    assert not re.search(r"(src|href)=.(?!data:|#)", report), "nothing is fetched"
    assert case.PRESENT_QUESTION in report
    (tmp_path / "report.html").write_text(report)
    page = browser.new_page()
    page.goto(f"file://{tmp_path / 'report.html'}")
    page.screenshot(path=LOOKS / "report.png", full_page=True)
    page.close()
    rows = list(csv.DictReader(io.StringIO(download(desk, "patches.csv"))))
    assert [row["rank"] for row in rows] == [str(rank) for rank in range(1, 7)]
    assert all(float(row["centre_x_um"]) > 0 for row in rows)


def test_12_the_log_says_what_was_opened_seen_and_asked(desk, served):
    desk.locator(".item").nth(1).click()
    desk.wait_for_function("location.search.includes('patch=')")
    assert "slide=phantom" in desk.url
    deadline = time.time() + 120
    while time.time() < deadline and '"look"' not in (served.home / "log.jsonl").read_text():
        desk.wait_for_timeout(500)
    lines = [json.loads(line) for line in (served.home / "log.jsonl").read_text().splitlines()]
    assert {"open", "ask", "look"} <= {line["event"] for line in lines}
    asked = next(line for line in lines if line["event"] == "ask")
    assert asked["question"] == case.PRESENT_QUESTION
    assert len(asked["effects"]) == 6
    assert '"event": "ask"' in download(desk, "log.jsonl")


def test_13_a_broken_slide_is_a_sentence_and_what_was_open_stays(desk, served):
    facts = desk.inner_text("#facts")
    junk = served.home / "junk.svs"
    junk.write_bytes(b"junk" * 1000)
    field = desk.locator("#path textarea, #path input")
    try:
        field.fill(str(junk))
        field.press("Enter")
        desk.wait_for_selector(".toast-body >> text=The file holds text")
        desk.screenshot(path=LOOKS / "error.png")
        assert desk.inner_text("#facts") == facts
        assert desk.locator(".item").count() == 6
    finally:
        field.fill("")


def test_14_dark_and_narrow(browser, served):
    page = open_page(browser, served, "?slide=phantom", color_scheme="dark")  # the address opens the example
    page.wait_for_selector(".item")
    page.wait_for_function("document.querySelector('.viewer').dataset.waiting === '0'")
    page.screenshot(path=LOOKS / "dark.png")
    page.set_viewport_size({"width": 390, "height": 844})
    page.wait_for_function("document.documentElement.scrollWidth <= 390")
    page.screenshot(path=LOOKS / "narrow.png", full_page=True)
    page.close()


def test_15_in_an_iframe_and_for_programs_it_is_the_same(desk, browser, served, tmp_path):
    client = pytest.importorskip("gradio_client").Client(served.url, verbose=False)
    found = client.predict(api_name="/analyze")
    shown = desk.evaluate("[...document.querySelectorAll('.item')].map(item => +item.dataset.index)")
    assert sorted(shown) == found["indices"]
    said = client.predict(found["case"], "Which tissue?", ["fat", "mucin"], api_name="/ask")
    assert sum(said["probabilities"]) == pytest.approx(1, abs=1e-4)
    weighed = client.predict(found["case"], "Which tissue?", "fat", ["fat", "mucin"], api_name="/evidence")
    assert len(weighed["effects"]) == 6
    with pytest.raises(Exception, match="phantom"):
        client.predict("/etc/hostname", api_name="/analyze")
    page = new_page(browser)
    hub = served.url.replace("127.0.0.1", "localhost").replace(PREFIX, "/hub")  # another origin than the app's
    page.route(
        hub,
        lambda route: route.fulfill(
            body=f'<iframe src="{served.url}?slide=phantom" width="1200" height="800"></iframe>',
            content_type="text/html",
        ),
    )
    page.goto(hub)
    inside = page.frame_locator("iframe")
    inside.locator(".item").first.wait_for()
    inside.locator(".item img").first.wait_for()
    assert inside.locator(".item img").first.evaluate("image => image.decode().then(() => image.naturalWidth)") > 0
    page.close()


def slide_with_secrets(path: Path) -> None:
    """An Aperio-like TIFF whose description and label hold what identifies a patient."""
    import tifffile

    picture = phantom.render(phantom.phantom_map(3, 1024), 0, 0, 1024, 1024)
    label = np.zeros((64, 64, 3), np.uint8)
    patient = "|".join(f"{key} = {secret}" for key, secret in zip(("Patient", "Birth", "ID"), SECRETS))
    words = f"Aperio Image Library\n1024x1024 |AppMag = 20|MPP = 0.5|{patient}"
    settings = {"photometric": "rgb", "metadata": None}
    with tifffile.TiffWriter(path) as file:
        file.write(picture, tile=(256, 256), compression="jpeg", description=words, **settings)
        file.write(picture[::8, ::8].copy(), description="Aperio Image Library thumbnail", **settings)
        file.write(label, description=f"Aperio Image Library\nlabel {SECRETS[0]}", subfiletype=1, **settings)


def test_04_nothing_identifying_is_shown_sent_or_kept(browser, served, tmp_path):
    path = tmp_path / f"{SECRETS[0]}_{SECRETS[2]}.svs"
    slide_with_secrets(path)
    page = new_page(browser)
    bodies: list[str] = []
    page.on("response", lambda r: bodies.append(r.text()) if "json" in r.headers.get("content-type", "") else None)
    with page.expect_request(re.compile("/queue/join")):
        page.goto(served.url)
    page.set_input_files("#upload input[type=file], input[type=file] >> nth=0", str(path))
    page.wait_for_selector(".item")
    root = next((served.home / "tmp").glob("sparsewsi-*"))
    assert len(list(root.rglob("*.svs"))) == 1, "the upload lies in one place"
    page.fill("#question textarea", "Describe this slide.")
    page.press("#question textarea", "Enter")
    page.wait_for_selector('#chat .bot a[href*="#patch-"]')
    texts = [page.content(), page.url, *bodies]
    texts += [
        download(page, name)
        for name in ("report.html", "patches.geojson", "patches.csv", "selection.json", "log.jsonl")
    ]
    raw = page.evaluate("document.querySelector('.item img').src").split("patch/")[0]
    assert all(
        page.evaluate("u => fetch(u).then(r => r.status)", raw + name) == 404 for name in ("slide.svs", "label.jpg")
    )
    kept = page.locator(".item").first.evaluate("item => item.querySelector('img').src")
    page.close()
    deadline = time.time() + 10
    while time.time() < deadline and list(root.rglob("*.svs")):
        time.sleep(0.2)
    assert not list(root.rglob("*.svs")), "deleted within 10 s of closing the tab"
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(kept)
    texts += [served.out.read_text(), (served.home / "log.jsonl").read_text()]
    for secret in SECRETS:
        assert not [text[:200] for text in texts if secret in text], secret


def test_a_page_with_a_login_shows_nothing_without_it(browser, tiny_model, cached_phantom, tmp_path):
    cached = str(cached_phantom)
    with running(tmp_path, tiny_model, "--auth", "reader:correct horse", SPARSEWSI_CACHE=cached) as (url, _):
        page = new_page(browser)
        page.goto(url)

        def log_in(word: str) -> None:
            page.locator("input").first.fill("reader")
            page.locator("input[type=password]").fill(word)
            page.get_by_role("button", name="Login").click()

        log_in("wrong")
        page.wait_for_selector(".creds")
        page.screenshot(path=LOOKS / "login.png")
        assert page.locator("#phantom").count() == 0
        with page.expect_request(re.compile("/queue/join")):
            log_in("correct horse")
        page.click("#phantom")
        page.wait_for_selector(".item")
        assert page.locator("#path").count() == 0, "who may look in may not read the server's disk"
        tile = page.locator(".item img").first.get_attribute("src").split("patch/")[0]
        token = tile.rstrip("/").split("/")[-1]
        assert len(token) >= 32, "192 random bits: a tile's address is its own key"
        stranger = browser.new_context().request
        assert stranger.get(url + "config").status == 401
        guess = tile.replace(token, "A" * len(token))
        assert stranger.get(guess + "0/0_0.jpg").status == 404
        with pytest.raises(Exception, match=r"(?i)credentials|auth|401"):
            pytest.importorskip("gradio_client").Client(url, verbose=False)
        page.close()
        stranger.dispose()


def test_on_a_real_slide(browser, served, shared_data):
    path = shared_data / "slides" / "CMU-1-Small-Region.svs"
    page = open_page(browser, served)
    page.fill("#path textarea, #path input", str(path))
    started = time.time()
    page.press("#path textarea, #path input", "Enter")
    page.wait_for_function("document.querySelector('.viewer').dataset.scale")
    seen = time.time() - started
    page.wait_for_selector(".item")
    print(f"slide on screen after {seen:.1f} s, selected after {time.time() - started:.1f} s")
    assert "0.499 µm/px (openslide)" in page.inner_text("#facts")
    page.locator(".item").first.click()
    page.locator(".slide").focus()
    page.keyboard.press("5")
    page.wait_for_function("Math.abs(document.querySelector('.viewer').dataset.scale - 20 * 0.499 / 10) < 1e-3")
    page.wait_for_function("document.querySelector('.viewer').dataset.waiting === '0'")
    page.screenshot(path=LOOKS / "real.png")
    page.close()
