"""What is turned away before Gradio sees it, on a real server of this machine with one small function."""

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import httpx
import pytest
from gradio.events import api
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from sparsewsi.web import door as door_module
from sparsewsi.web.door import Door, read_logins
from sparsewsi.web.limits import check_question, check_told


def serve(uploads: Path, auth: list[tuple[str, str]] | None = None, **settings: Any) -> tuple[gr.Blocks, Any]:
    """A server with a slow function, a file's function and a tile, behind a door."""
    told = SimpleNamespace(left=[], files=[], running=threading.Event())

    def wait(seconds: float) -> str:
        told.running.set()
        time.sleep(seconds)
        return "done"

    def take(file: gr.FileData) -> str:
        told.files.append(file)
        return "taken"

    async def tile(_: Any) -> PlainTextResponse:
        return PlainTextResponse("tile")

    with gr.Blocks(analytics_enabled=False) as demo:
        api(wait, api_name="wait")
        api(take, api_name="take")
    front = Middleware(Door, leave=told.left.append, uploads=uploads, **settings)
    routes = [Route("/gradio_api/slide/{rest:path}", tile)]
    _, address, _ = demo.queue().launch(
        server_name="127.0.0.1",
        quiet=True,
        prevent_thread_lock=True,
        ssr_mode=False,
        auth=auth,
        app_kwargs={"middleware": [front], "routes": routes},
    )
    told.address = address.rstrip("/")
    return demo, told


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    demo, told = serve(tmp_path_factory.mktemp("uploads"), names=("127.0.0.1", "localhost", "::1"))
    yield told
    demo.close(verbose=False)


def join(address: str, data: list, session: str, fn_index: int = 0) -> httpx.Response:
    body = {"data": data, "fn_index": fn_index, "session_hash": session}
    return httpx.post(f"{address}/gradio_api/queue/join", json=body, timeout=60)


@pytest.mark.parametrize("name", ["evil.example", "evil.example:7860", "127.0.0.1.evil.example", "", "0.0.0.0"])
def test_another_name_than_ours_is_turned_away(served, name):
    answer = httpx.get(served.address, headers={"Host": name})
    assert answer.status_code in (400, 421)
    assert httpx.get(served.address, headers={"Host": "LOCALHOST:1"}).status_code == 200
    assert httpx.get(served.address, headers={"Host": "[::1]:7860"}).status_code == 200


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/a", "HTTPS://example.org/a", " http://example.org", "ftp://a.b/c"])
def test_the_server_fetches_nothing_for_others(served, url):
    for data in ([{"path": url}], [{"path": url, "meta": {"_type": "gradio.FileData"}}], [[{"deep": {"path": url}}]]):
        answer = join(served.address, data, "s", 1)
        assert (answer.status_code, "fetches nothing" in answer.text) == (403, True)
        answer = httpx.post(f"{served.address}/gradio_api/call/take", json={"data": data})
        assert answer.status_code == 403
    assert not served.files


@pytest.mark.parametrize(
    "path", ["file=http://127.0.0.1:1/a", "file=HTTPS://example.org", "proxy=https://a.hf.space/b"]
)
def test_addresses_of_others_are_not_passed_on(served, path):
    assert httpx.get(f"{served.address}/gradio_api/{path}").status_code == 403


def test_requests_and_queues_are_bounded(served):
    assert join(served.address, ["x" * (3 << 20)], "s").status_code == 413
    assert httpx.post(f"{served.address}/gradio_api/queue/join", content=b"{", timeout=60).status_code == 400
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: join(served.address, [0.01], "many").status_code, range(60)))
    assert answers.count(200) <= door_module.MOST_WAITING + 8  # those that came at once
    assert answers.count(429) == 60 - answers.count(200)
    assert join(served.address, [0.01], "another").status_code == 200


def test_an_upload_says_its_length_and_finds_room(served, monkeypatch):
    def parts() -> Iterator[bytes]:
        yield b"--x\r\n\r\n"

    upload = f"{served.address}/gradio_api/upload"
    assert httpx.post(upload, content=parts(), timeout=60).status_code == 411
    assert httpx.post(upload, files={"files": ("a.svs", b"slide")}, timeout=60).status_code == 200
    monkeypatch.setattr(door_module, "ROOM", 1 << 60)
    assert httpx.post(upload, files={"files": ("a.svs", b"slide")}, timeout=60).status_code == 507


def test_who_breaks_off_has_left_within_two_seconds_and_who_hears_all_has_not(served):
    join(served.address, [0.0], "patient")
    with httpx.stream("GET", f"{served.address}/gradio_api/queue/data?session_hash=patient", timeout=60) as stream:
        said = [json.loads(line[6:])["msg"] for line in stream.iter_lines() if line.startswith("data: ")]
    assert said[-1] == "close_stream"
    served.running.clear()
    join(served.address, [4.0], "hasty")
    with httpx.stream("GET", f"{served.address}/gradio_api/queue/data?session_hash=hasty", timeout=60):
        assert served.running.wait(10)
    ends = time.monotonic() + 2
    while "hasty" not in served.left and time.monotonic() < ends:
        time.sleep(0.05)
    assert served.left == ["hasty"]


def test_others_show_it_in_a_frame_only_where_that_is_allowed(served, tmp_path):
    headers = httpx.get(served.address).headers
    assert headers["Content-Security-Policy"] == "frame-ancestors 'self'"
    assert headers["X-Frame-Options"] == "SAMEORIGIN"
    demo, told = serve(tmp_path, embed=("https://example.org",))
    headers = httpx.get(
        told.address, headers={"Host": "any.example"}
    ).headers  # a public server does not know its names
    demo.close(verbose=False)
    assert headers["Content-Security-Policy"] == "frame-ancestors 'self' https://example.org"
    assert "X-Frame-Options" not in headers


def test_who_is_not_logged_in_sees_nothing_and_guessing_takes_time(tmp_path):
    demo, told = serve(tmp_path, auth=[("me", "secret")])
    try:
        paths = ("slide/token/0/0_0.jpg", "heartbeat/s", "mcp/sse", "queue/data?session_hash=s", "info")
        for path in paths:
            assert httpx.get(f"{told.address}/gradio_api/{path}").status_code == 401
        began = time.monotonic()
        for _ in range(3):
            wrong = httpx.post(f"{told.address}/login", data={"username": "me", "password": "x"}, timeout=60)
            assert wrong.status_code == 400
        assert time.monotonic() - began > 3  # 0.5 + 1 + 2 s
        with httpx.Client(base_url=told.address, timeout=60) as visitor:
            assert visitor.post("/login", data={"username": "me", "password": "secret"}).status_code == 200
            assert visitor.get("/gradio_api/slide/token/0/0_0.jpg").text == "tile"
            cookies = dict(visitor.cookies)
            visitor.get("/logout")
        assert httpx.get(f"{told.address}/gradio_api/slide/x", cookies=cookies).status_code == 401
    finally:
        demo.close(verbose=False)


@pytest.mark.parametrize("text", ["", ":", "me:", ":secret", "me", "me: ", "me:secret,", "me:secret,you:"])
def test_a_login_that_lets_anybody_in_is_refused(text):
    with pytest.raises(ValueError, match="no part may be empty"):
        read_logins(text)
    assert read_logins(None) is None
    assert read_logins("a:b:c,d:e") == [("a", "b:c"), ("d", "e")]


def test_what_is_too_long_is_said():
    check_question("Which tissue?", ["liver", "skin"], "skin")
    too_much: list[Any] = [("x" * 2001,), ("x", ["y"] * 27), ("x", ["y" * 1001] * 2), ("x", [], "y" * 2001), ("x", [3])]
    for asked in too_much:
        with pytest.raises(ValueError, match=r"^The .*\.$|^A question"):
            check_question(*asked)
    check_told({"views": [{"x": 1.5}] * 200})
    with pytest.raises(ValueError, match="64 kB"):
        check_told({"views": ["x" * 70_000]})
