"""What programs ask, over HTTP, gradio_client and MCP, of the real app on this machine."""

import ast
import asyncio
import contextlib
import json
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import gradio_client
import httpx
import pytest
from gradio_client.exceptions import AppError

from sparsewsi import phantom
from sparsewsi.model.limits import Limit, Limits
from sparsewsi.web.desk import Desk
from sparsewsi.web.page import build_page
from sparsewsi.web.serve import launch_settings, log_in_tools

LEAVES_WITHIN = 20  # s: gradio_client hangs up at the next heartbeat
JSON = {"Content-Type": "application/json"}
ASKED = ("Which tissue?", ["fat", "liver"])


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder with a small phantom in place of the bundled example."""
    home = tmp_path_factory.mktemp("home")
    name = f"phantom-{phantom.EXAMPLE_SEED}-{phantom.EXAMPLE_SIZE}-v{phantom.VERSION}.tiff"
    phantom.write_phantom(home / name, seed=3, size=1024)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSEWSI_CACHE", str(home))
        yield home


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slide that takes seconds to encode."""
    path = tmp_path_factory.mktemp("large") / "Mustermann.tiff"
    phantom.write_phantom(path, seed=4, size=4096)
    return path


@pytest.fixture(scope="module")
def two_slides(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two small slides, scanned at different resolutions."""
    folder = tmp_path_factory.mktemp("two")
    paths = [folder / f"Mustermann {seed}.tiff" for seed in (5, 6)]
    phantom.write_phantom(paths[0], seed=5, size=1024)
    phantom.write_phantom(paths[1], seed=6, size=1536, mpp=0.25)
    return paths


def launch(desk: Desk, patch: pytest.MonkeyPatch, auth: str | None = None, mcp: bool = False) -> SimpleNamespace:
    patch.setenv("GRADIO_TEMP_DIR", str(desk.uploads))
    demo = build_page(desk)
    settings = launch_settings(desk, "127.0.0.1", auth=auth, mcp=mcp)
    _, address, _ = demo.launch(**settings, quiet=True, prevent_thread_lock=True)
    log_in_tools(demo, address, auth)
    return SimpleNamespace(demo=demo, desk=desk, address=address.rstrip("/"))


@pytest.fixture(scope="module")
def app(tiny_model, home, tmp_path_factory) -> Iterator[SimpleNamespace]:
    with pytest.MonkeyPatch.context() as patch:
        served = launch(Desk(str(tiny_model), tmp_path_factory.mktemp("desk")), patch)
        yield served
        served.demo.close(verbose=False)


def client(app: SimpleNamespace, **settings) -> gradio_client.Client:
    return gradio_client.Client(app.address, verbose=False, httpx_kwargs={"timeout": 60}, **settings)


def soon(true: Callable[[], bool], seconds: float) -> bool:
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        with contextlib.suppress(FileNotFoundError):  # a folder that goes while it is listed
            if true():
                return True
        time.sleep(0.02)
    return true()


def test_callers_do_not_take_each_others_slides(app):
    clients = [client(app) for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda one: one.predict(api_name="/analyze"), clients))
        assert len({one["case"] for one in found}) == 3
        asked = list(pool.map(lambda i: clients[i].predict(found[i]["case"], *ASKED, api_name="/ask"), range(3)))
    assert all(len(one["probabilities"]) == 2 for one in asked)
    clients[0].close()
    assert soon(lambda: found[0]["case"] not in app.desk._opened, LEAVES_WITHIN)
    with pytest.raises(ValueError, match="not known"):
        app.desk.find_case(found[0]["case"])
    assert clients[1].predict(found[1]["case"], *ASKED, api_name="/ask")["answer"]
    assert clients[1].predict(found[1]["case"], ASKED[0], "fat", api_name="/evidence")["effects"]
    for one in clients[1:]:
        one.close()


def test_two_slides_are_one_case(app, two_slides):
    one = client(app)
    files = [gradio_client.handle_file(str(path)) for path in two_slides]
    found = one.predict(files=files, api_name="/analyze")
    assert [slide["number"] for slide in found["slides"]] == [1, 2]
    assert [slide["mpp"] for slide in found["slides"]] == pytest.approx([0.5, 0.25], rel=0.01)
    first = found["slides"][0]["num_patches"]
    assert found["num_patches"] == first + found["slides"][1]["num_patches"]
    assert found["slide_numbers"] == [1 if index < first else 2 for index in found["indices"]]
    for (x, y), number in zip(found["coords"], found["slide_numbers"]):
        width, height = found["slides"][number - 1]["size"]
        assert (0 <= x < width, 0 <= y < height) == (True, True), "on its own slide"
    assert "Mustermann" not in json.dumps(found)
    said = one.predict(found["case"], *ASKED, api_name="/ask")
    weighed = one.predict(found["case"], ASKED[0], said["answer"], ASKED[1], api_name="/evidence")
    assert weighed["slide_numbers"] == found["slide_numbers"]
    assert weighed["rests"] in ("strongly", "partly", "not")
    assert weighed["headline"].startswith("The slide does not decide it") == (weighed["rests"] == "not")
    assert weighed["headline"].endswith(said["answer"])
    assert set(weighed["slides"]) <= {"1", "2"}
    assert len(list(app.desk.folder.rglob("slide.tiff"))) == 2
    with pytest.raises(AppError, match="in the case already"):
        one.predict(slides=["phantom", "phantom"], api_name="/analyze")
    with pytest.raises(AppError, match="Slide 2: The slide must be"):
        one.predict(slides=["phantom", str(two_slides[0])], api_name="/analyze")
    with pytest.raises(AppError, match="at most 12 slides, and this would be 13"):
        one.predict(slides=["phantom"] * 13, api_name="/analyze")
    one.close()
    assert soon(lambda: not list(app.desk.folder.rglob("*.tiff")), LEAVES_WITHIN)


def test_seen_a_bare_answer_for_programs(app, monkeypatch):
    one = client(app)
    kinds = (Limit("organ", (r"\borgan\b",), 21, 18, 0.44, 0.24, 0.68, least=1.0),)
    monkeypatch.setattr(app.desk.model, "limits", Limits(kinds))
    found = one.predict(slides=["phantom"], api_name="/analyze")
    said = one.predict(found["case"], "Which organ is this?", ["skin", "colon"], api_name="/ask")
    assert re.fullmatch(r"Not sure: (skin or colon|colon or skin)", said["headline"])
    assert said["limit"].startswith("Not sure")
    assert next(iter(said)) == "headline", "read first"
    one.close()


def test_an_answer_that_contradicts_one_before_it_says_so_in_its_notice(app):
    one = client(app)
    found = one.predict(slides=["phantom"], api_name="/analyze")
    first = one.predict(found["case"], "Which is it?", ["carcinoma", "malignant melanoma"], api_name="/ask")
    second = one.predict(found["case"], "What is it?", ["normal tissue", "healthy tissue"], api_name="/ask")
    less = [found["case"], "What is it?", ["normal tissue", "healthy tissue"], found["ranks"][:1]]
    assert first["notice"] == one.predict(*less, api_name="/ask")["notice"] == found["notice"], "of other patches"
    assert f'"Which is it?" {first["answer"]}; "What is it?" {second["answer"]}. {found["notice"]}' in second["notice"]
    one.close()


def call(app: SimpleNamespace, name: str, *data: object) -> tuple[str, object]:
    """A call through plain HTTP: the event's name and its data."""
    posted = httpx.post(f"{app.address}/gradio_api/call/{name}", json={"data": data}, timeout=60)
    event = posted.raise_for_status().json()["event_id"]
    said = httpx.get(f"{app.address}/gradio_api/call/{name}/{event}", timeout=60).text
    lines = [line.split(": ", 1)[1] for line in said.splitlines() if line]
    return lines[-2], json.loads(lines[-1])


def test_a_caller_without_a_session_gets_one_of_its_own(app):
    found = [call(app, "analyze", "phantom", None, 0, "learned", None, None) for _ in range(2)]
    cases = [data[0]["case"] for _, data in found]  # type: ignore[index]
    assert len({app.desk.slides.owner_of(case) for case in cases}) == 2
    for case in cases:
        kind, data = call(app, "ask", case, *ASKED, None)
        assert (kind, data[0]["answer"] in ASKED[1]) == ("complete", True)  # type: ignore[index]


@pytest.mark.parametrize("kind", ["a file", "a folder", "the uploads", "another's slide", "a link", "beside", "a URL"])
def test_a_file_is_the_callers_own_upload_or_nothing(app, kind, tmp_path):
    desk = app.desk
    folder = desk.folder_of("victim")
    folder.mkdir(exist_ok=True)
    (folder / "slide.tiff").write_bytes(b"theirs")
    (tmp_path / "private.tiff").write_bytes(b"private")
    (desk.uploads / "mine").mkdir(parents=True, exist_ok=True)
    link = desk.uploads / "mine" / "link.tiff"
    link.unlink(missing_ok=True)
    link.symlink_to(tmp_path / "private.tiff")
    paths = {
        "a file": tmp_path / "private.tiff",
        "a folder": desk.uploads / "mine",
        "the uploads": desk.uploads,
        "another's slide": folder / "slide.tiff",
        "a link": link,
        "beside": f"{desk.uploads}/mine/../../{folder.name}/slide.tiff",
        "a URL": "http://127.0.0.1:9/slide.tiff",
    }
    for given in (("", {"path": str(paths[kind]), "meta": {"_type": "gradio.FileData"}}), (str(paths[kind]), None)):
        try:
            said, _ = call(app, "analyze", *given, 0, "learned", None, None)
        except httpx.HTTPStatusError as error:
            said = "error" if error.response.status_code == 403 else str(error)
        assert said == "error"
    assert (folder / "slide.tiff").read_bytes() == b"theirs"
    assert (tmp_path / "private.tiff").exists()
    assert link.is_symlink()
    shutil.rmtree(link.parent)
    desk.forget("victim")


def test_an_upload_is_its_uploaders_until_the_client_is_closed(app, large):
    one = client(app)
    found = one.predict(file=gradio_client.handle_file(str(large)), slide_mpp=0.9, api_name="/analyze")
    kept = list(app.desk.folder.rglob("*.tiff"))
    assert [path.name for path in kept] == ["slide.tiff"], "its name is lost, and there is no second copy"
    assert "Mustermann" not in json.dumps(found)
    one.close()
    assert soon(lambda: not list(app.desk.folder.rglob("*.tiff")), LEAVES_WITHIN)


@pytest.mark.parametrize("given", ["NaN", 1e-5, 32.0, -1.0])
def test_a_resolution_that_nothing_has_is_refused_at_once(app, given):
    began, body = time.monotonic(), f'{{"data": ["phantom", null, {given}, "learned", null, null]}}'
    posted = httpx.post(f"{app.address}/gradio_api/call/analyze", content=body, timeout=60, headers=JSON)
    if posted.status_code == 200:
        event = posted.json()["event_id"]
        said = httpx.get(f"{app.address}/gradio_api/call/analyze/{event}", timeout=60).text
        assert "event: error" in said
        assert any(word in said for word in ("m/px", "resolution"))
    else:
        assert (given, posted.status_code) == ("NaN", 422)
    assert time.monotonic() - began < 10


def encode_slowly(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Let the desk's encoder take 0.2 s a batch, so that a caller can leave meanwhile; set once it encodes."""
    encoded, encoder = threading.Event(), desk.load()[1]

    class Slow:
        name, dim = encoder.name, encoder.dim

        def __call__(self, pixels):
            encoded.set()
            time.sleep(0.2)
            return encoder(pixels[:1]).expand(len(pixels), -1)

    monkeypatch.setattr(desk, "_loaded", (desk.model, Slow()))
    return encoded


@pytest.mark.parametrize("how", ["leaves", "closes the client", "never listens"])
def test_what_is_done_for_who_has_gone_ends_within_two_seconds(app, large, how, monkeypatch):
    desk = app.desk
    uploaded = httpx.post(f"{app.address}/gradio_api/upload", files={"files": ("a.tiff", large.read_bytes())}).json()[0]
    encoded = encode_slowly(desk, monkeypatch)
    if how == "closes the client":
        one = client(app)
        one.submit(slide=uploaded, slide_mpp=0.5, api_name="/analyze")
        assert encoded.wait(60)
        one.close()
        limit = 3.0
    else:
        posted = httpx.post(
            f"{app.address}/gradio_api/call/analyze",
            json={"data": [uploaded, None, 0.5, "learned", None, None]},
            timeout=60,
        )
        event, limit = posted.json()["event_id"], 12.0
        if how == "leaves":
            with httpx.stream("GET", f"{app.address}/gradio_api/call/analyze/{event}", timeout=60):
                assert encoded.wait(60)
            limit = 2.0
        assert encoded.wait(60)
    assert soon(lambda: not desk.jobs._jobs, limit)
    assert how != "closes the client" or soon(lambda: not list(desk.folder.rglob("*.tiff")), LEAVES_WITHIN)
    for session in list(desk._asked):
        desk.forget(session)


def test_a_thousand_events_are_refused_not_run(app):
    body = {"data": ["phantom", None, 0, "learned"], "session_hash": "many"}
    body["fn_index"] = next(i for i, fn in app.demo.fns.items() if fn.api_name == "analyze")

    def send(events: int) -> list[int]:
        with httpx.Client(timeout=60) as sender:
            return [sender.post(f"{app.address}/gradio_api/queue/join", json=body).status_code for _ in range(events)]

    with ThreadPoolExecutor(16) as pool:
        answers = [status for statuses in pool.map(send, [63] * 16) for status in statuses]
    assert answers.count(429) > 900
    assert soon(lambda: not app.desk.jobs.busy("many"), 30)
    one = client(app)
    assert one.predict(api_name="/analyze")["case"]
    one.close()


# ---- MCP


def use_tools(address: str, cookies: dict[str, str], deed) -> list:
    """Run a coroutine function on a session of MCP."""
    mcp = pytest.importorskip("mcp")
    http = pytest.importorskip("mcp.client.streamable_http")

    async def run() -> list:
        headers = {"Cookie": "; ".join(f"{name}={value}" for name, value in cookies.items())} if cookies else {}
        async with (
            http.streamablehttp_client(f"{address}/gradio_api/mcp/", headers=headers) as (reads, writes, _),
            mcp.ClientSession(reads, writes) as session,
        ):
            await session.initialize()
            return await deed(session)

    return asyncio.run(run())


@pytest.fixture(scope="module")
def tools(tiny_model, home, tmp_path_factory) -> Iterator[SimpleNamespace]:
    pytest.importorskip("mcp")
    with pytest.MonkeyPatch.context() as patch:
        desk = Desk(str(tiny_model), tmp_path_factory.mktemp("desk"))
        served = launch(desk, patch, auth="me:secret", mcp=True)
        yield served
        served.demo.close(verbose=False)


def read(result) -> dict:
    assert not result.isError, result.content[0].text
    return ast.literal_eval(result.content[0].text)  # Gradio writes what Python does


def test_tools_are_for_who_is_logged_in(tools):
    asked = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}
    accept = {"Accept": "application/json, text/event-stream"}
    for path in ("mcp", "mcp/", "mcp/http"):
        assert httpx.post(f"{tools.address}/gradio_api/{path}", json=asked, headers=accept).status_code == 401
    assert httpx.get(f"{tools.address}/gradio_api/mcp/schema").status_code == 401
    for path in ("mcp/sse", "mcp/messages/"):
        assert httpx.get(f"{tools.address}/gradio_api/{path}").status_code == 404


def test_tools_answer_and_callers_of_tools_do_not_take_each_others_slides(tools):
    with httpx.Client() as visitor:
        visitor.post(f"{tools.address}/login", data={"username": "me", "password": "secret"}).raise_for_status()
        cookies = dict(visitor.cookies)

    async def analyse_twice(session) -> list[dict]:
        names = [tool.name for tool in (await session.list_tools()).tools]
        assert sorted(names) == ["analyze", "ask", "evidence"]
        cases = [read(await session.call_tool("analyze", {"slide": "phantom"})) for _ in range(2)]
        return [
            read(await session.call_tool("ask", {"case": case["case"], "question": "Which?", "options": ["a", "b"]}))
            for case in cases
        ]

    assert all(said["answer"] in "ab" for said in use_tools(tools.address, cookies, analyse_twice))

    strange = ("http://127.0.0.1:9/a.svs", "file:///etc/hostname", {"path": "/etc/hostname"}, "data:,x")
    for arguments in [given for file in strange for given in ({"file": file}, {"files": ["phantom", file]})]:
        asked = {"name": "analyze", "arguments": arguments}
        body = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": asked}
        headers = {"Accept": "application/json, text/event-stream"}
        answer = httpx.post(f"{tools.address}/gradio_api/mcp/", json=body, headers=headers, cookies=cookies)
        assert (answer.status_code, "fetches nothing" in answer.text) == (403, True)


def test_a_tool_whose_caller_leaves_ends_within_two_seconds(tools, large, monkeypatch):
    with httpx.Client(timeout=60) as visitor:
        visitor.post(f"{tools.address}/login", data={"username": "me", "password": "secret"}).raise_for_status()
        sent = visitor.post(f"{tools.address}/gradio_api/upload", files={"files": ("a.tiff", large.read_bytes())})
        desk, encoded = tools.desk, encode_slowly(tools.desk, monkeypatch)
        asked = {"name": "analyze", "arguments": {"slide": sent.json()[0], "slide_mpp": 0.5}}
        body = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": asked}
        headers = {"Accept": "application/json, text/event-stream"}
        with visitor.stream("POST", f"{tools.address}/gradio_api/mcp/", json=body, headers=headers):
            assert encoded.wait(60)
            assert desk.jobs._jobs
    assert soon(lambda: not desk.jobs._jobs, 2)
    shutil.rmtree(desk.uploads, ignore_errors=True)
