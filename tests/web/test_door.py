"""What is turned away before Gradio sees it, on a real server of this machine with one small function."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gradio as gr
import httpx
import pytest
from gradio.events import api
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from sparsewsi.web import door as door_module
from sparsewsi.web import uploads as uploads_module
from sparsewsi.web.door import Door, read_logins
from sparsewsi.web.limits import check_question, read_told
from sparsewsi.web.uploads import Uploads


class Told:
    """What the door tells of sessions."""

    def __init__(self) -> None:
        self.log: list[tuple[str, str]] = []
        self.files: list = []
        self.running = threading.Event()
        self.address = ""
        self.folder = Path()

    def arrive(self, session: str) -> None:
        self.log.append(("arrive", session))

    def ask(self, session: str) -> None:
        self.log.append(("ask", session))

    def leave(self, session: str) -> None:
        self.log.append(("leave", session))

    def forget(self, session: str) -> None:
        self.log.append(("forget", session))

    def heed(self, session: str, listens: bool) -> None:
        self.log.append(("listens" if listens else "does not listen", session))

    def heard(self, *event: str, seconds: float = 2.0) -> bool:
        ends = time.monotonic() + seconds
        while event not in self.log and time.monotonic() < ends:
            time.sleep(0.02)
        return event in self.log


def serve(home: Path, auth: list[tuple[str, str]] | None = None, quota: int = 1 << 30, **settings: Any) -> tuple:
    """A server with a slow function, a file's function and a tile, behind a door."""
    told = Told()
    told.folder = home / "gradio"
    told.folder.mkdir()

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
        demo.unload(lambda: None)
    front = Middleware(Door, sessions=told, uploads=told.folder, **settings)
    routes = [*Uploads(told.folder, home, quota).routes(), Route("/gradio_api/slide/{rest:path}", tile)]
    _, address, _ = demo.queue(default_concurrency_limit=None, api_open=False).launch(
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
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Told]:
    demo, told = serve(tmp_path_factory.mktemp("home"), names=("127.0.0.1", "localhost", "::1"))
    yield told
    demo.close(verbose=False)


def join(address: str, data: list, session: str, fn_index: int = 0, **headers: str) -> httpx.Response:
    body = {"data": data, "fn_index": fn_index, "session_hash": session}
    return httpx.post(f"{address}/gradio_api/queue/join", json=body, timeout=60, headers=headers)


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
    "place", ["/etc/hostname", "/tmp", "{folder}", "{folder}/x", "{upload}/..", "{upload}/../..", "a\0b", ""]
)
def test_only_uploads_are_named_as_files(served, place):
    kept = Path(upload(served.address, "a.svs").json()[0])
    path = place.format(folder=served.folder, upload=kept.parent)
    answer = join(served.address, [{"path": path, "meta": {"_type": "gradio.FileData"}}], "s", 1)
    assert (answer.status_code, "is uploaded first" in answer.text) == (403, True)
    answer = join(served.address, [{"path": str(kept), "meta": {"_type": "gradio.FileData"}}], "s", 1)
    assert answer.status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        *("file=http://127.0.0.1:1/a", "file=HTTPS://example.org", "proxy=https://a.hf.space/b", "file=/etc/hostname"),
        *("file=../../etc/hostname", "file//etc/hostname"),
    ],
)
def test_no_file_and_no_address_of_others_is_given(served, path):
    for way in (httpx.get, httpx.head):
        assert way(f"{served.address}/gradio_api/{path}").status_code in (403, 404)


@pytest.mark.parametrize(
    "path",
    [
        *("deep_link", "runs", "run-history/records", "dev/reload", "vibe-code", "stream/a/b/1/playlist.m3u8"),
        *("custom_component/1/client/component/x.js", "profiling/traces", "/upload", "../upload"),
    ],
)
def test_what_the_page_does_not_need_is_not_there(served, path):
    assert httpx.get(f"{served.address}/gradio_api/{path}").status_code == 404
    assert httpx.post(f"{served.address}/gradio_api/{path}").status_code == 404
    for path in ("process_recording", "component_server", "vibe-edit", "api/wait"):
        assert httpx.post(f"{served.address}/gradio_api/{path}", json={}).status_code == 404
    assert httpx.get(f"{served.address}/monitoring").status_code == 404
    assert httpx.post(f"{served.address}/gradio_api/run/wait", json={"data": [0]}).status_code == 404, "past the queue"


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://127.0.0.1.evil.example:7860", "http://[::1", "http://[v1]x"]
)
def test_pages_of_others_can_ask_a_server_of_this_machine_nothing(served, origin):
    assert join(served.address, [0.0], "a", Origin=origin).status_code == 403
    upload = httpx.post(
        f"{served.address}/gradio_api/upload", files={"files": ("a.svs", b"x")}, headers={"Origin": origin}
    )
    assert upload.status_code == 403
    assert join(served.address, [0.0], "a", Origin=served.address).status_code == 200


@pytest.mark.parametrize("nothing", ["[]", "{}", '[[{"a":[]}]]'])
def test_what_would_take_far_more_memory_than_its_bytes_is_not_kept(served, nothing):
    body = json.dumps({"data": [json.loads(nothing)] * 20_000, "fn_index": 0, "session_hash": "s"})
    answer = httpx.post(f"{served.address}/gradio_api/queue/join", content=body, timeout=60)
    assert (answer.status_code, "lists and objects" in answer.text) == (413, True)


def test_a_session_whose_name_is_a_book_is_not_remembered(served):
    name = "s" * (door_module.LONGEST_NAME + 1)
    assert join(served.address, [0.0], name).status_code == 400
    for path in (f"heartbeat/{name}", f"queue/data?session_hash={name}", f"call/wait/{name}"):
        assert httpx.get(f"{served.address}/gradio_api/{path}", timeout=60).status_code == 400
    assert not any(session == name for _, session in served.log)
    assert join(served.address, [0.0], name[1:]).status_code == 200


def test_who_says_nothing_is_hung_up_on_and_who_waits_for_an_answer_is_not(tmp_path):
    demo, told = serve(tmp_path)
    connections = demo.server.server_state.connections
    host, port = told.address.removeprefix("http://").split(":")
    try:
        join(told.address, [3.0], "patient")
        with (
            httpx.stream("GET", f"{told.address}/gradio_api/queue/data?session_hash=patient", timeout=60) as stream,
            socket.create_connection((host, int(port)), timeout=5) as mute,
            socket.create_connection((host, int(port)), timeout=5) as half,
        ):
            half.sendall(b"POST /gradio_api/queue/join HTTP/1.1\r\nHost: 127.0.0.1\r\n")
            time.sleep(0.5)
            silent = door_module.hang_up(connections, ())
            assert len(silent) >= 2
            door_module.hang_up(connections, silent)
            assert mute.recv(10) == half.recv(10) == b""
            said = [json.loads(line[6:])["msg"] for line in stream.iter_lines() if line.startswith("data: ")]
            assert said[-1] == "close_stream"
    finally:
        demo.close(verbose=False)


@pytest.mark.parametrize("number", [-1, 10**30, 3, "0", [0], 0.5, {}])
def test_a_function_that_the_page_does_not_have_is_not_called(served, number):
    answer = join(served.address, [0.0], "s", number)
    assert (answer.status_code, "no such function" in answer.text) == (400, True)


def test_pages_are_made_a_few_at_a_time(served, monkeypatch):
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: httpx.get(served.address, timeout=60).status_code, range(32)))
    assert set(answers) == {200}
    host, port = served.address.removeprefix("http://").split(":")
    lines = []
    for _ in range(4):  # who asks for a page and does not read it is in nobody's way
        lines.append(socket.create_connection((host, int(port)), timeout=5))
        lines[-1].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        lines[-1].sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    assert httpx.get(served.address, timeout=20).status_code == 200
    for line in lines:
        line.close()
    monkeypatch.setattr(door_module, "MOST_PAGES", 0)
    answer = httpx.get(f"{served.address}/config")
    assert (answer.status_code, "busy" in answer.text) == (503, True)


def test_who_listens_is_told_from_the_first_stream_to_the_last(served):
    for path in ("heartbeat/hears", "queue/data?session_hash=hears"):
        served.log.clear()
        join(served.address, [3.0], "hears")
        assert not any(event == "listens" for event, _ in served.log)
        with httpx.stream("GET", f"{served.address}/gradio_api/{path}", timeout=60) as stream:
            lines = stream.iter_lines()  # httpx closes a stream whose iterator is gone
            next(lines)
            assert served.heard("listens", "hears")
            assert ("does not listen", "hears") not in served.log
        assert served.heard("does not listen", "hears")


def test_requests_and_queues_are_bounded(served, monkeypatch):
    assert join(served.address, ["x" * (3 << 20)], "s").status_code == 413
    assert httpx.post(f"{served.address}/login", content=b"x" * (3 << 20), timeout=60).status_code == 413
    for content in (b"{", b"3", b"[" * 5_000, b'{"session_hash": {}}', b'{"session_hash": ["a"]}', b"9" * 5000):
        for path in ("queue/join", "call/wait", "run/wait", "cancel"):
            answer = httpx.post(f"{served.address}/gradio_api/{path}", content=content, timeout=60)
            assert answer.status_code == 400
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: join(served.address, [2.0], "many").status_code, range(60)))
    assert answers.count(200) <= door_module.MOST_WAITING + 8  # those that came at once
    assert answers.count(429) == 60 - answers.count(200)
    with httpx.stream("GET", f"{served.address}/gradio_api/heartbeat/another", timeout=60) as stream:
        beats = stream.iter_lines()
        next(beats)
        assert join(served.address, [0.01], "another").status_code == 200, "a page that is open"
    monkeypatch.setattr(door_module, "MOST_UNHEARD", 1)
    while join(served.address, [9.0], "session").status_code == 429:  # until what nobody listens to has ended
        time.sleep(0.2)
    monkeypatch.setattr(door_module, "MOST_UNHEARD", 5)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda i: join(served.address, [9.0], f"session {i}").status_code, range(40)))
    assert answers.count(200) <= 5, "however quickly what they ask for is refused"
    assert set(answers) == {200, 429}
    monkeypatch.setattr(door_module, "MOST_UNHEARD", 1000)
    monkeypatch.setattr(door_module, "MOST_OF_ALL", 2)
    answer = join(served.address, [0.0], "one more")
    assert (answer.status_code, "busy" in answer.text) == (503, True)


# ---- uploads


def upload(address: str, name: str = "Mustermann 1950.svs", content: bytes = b"slide", **fields: Any) -> httpx.Response:
    return httpx.post(f"{address}/gradio_api/upload", files={"files": (name, content)}, data=fields, timeout=60)


@pytest.mark.parametrize(
    ("name", "kept"), [("a.svs", "slide.svs"), ("../../a.tiff", "slide.tiff"), ("a", "slide"), ("é.<b>", "slide")]
)
def test_an_upload_gets_a_folder_that_only_its_uploader_is_told(served, name, kept):
    one, other = (Path(upload(served.address, name).json()[0]) for _ in range(2))
    assert one.name == other.name == kept
    assert one.parent.parent == served.folder
    assert one.parent != other.parent, "the same content is not the same upload"
    assert one.read_bytes() == b"slide"
    assert one.parent.stat().st_mode & 0o777 == 0o700


def test_the_files_of_one_case_get_a_folder_each(served):
    two = [("files", ("a.svs", b"x")), ("files", ("Mustermann.tiff", b"yy"))]
    kept = [Path(path) for path in httpx.post(f"{served.address}/gradio_api/upload", files=two).json()]
    assert [path.name for path in kept] == ["slide.svs", "slide.tiff"]
    assert [path.read_bytes() for path in kept] == [b"x", b"yy"]
    assert len({path.parent for path in kept}) == 2
    assert all(path.parent.parent == served.folder for path in kept)


def test_an_upload_that_cannot_be_kept_leaves_nothing(served):
    before = set(served.folder.iterdir())
    assert upload(served.address, note="x").status_code == 400, "a field would be kept in memory"
    many = [("files", ("a.svs", b"x"))] * 13
    assert httpx.post(f"{served.address}/gradio_api/upload", files=many).status_code == 400
    assert httpx.post(f"{served.address}/gradio_api/upload", content=b"x").status_code == 400

    def parts() -> Iterator[bytes]:
        yield b"--x\r\n\r\n"

    assert httpx.post(f"{served.address}/gradio_api/upload", content=parts(), timeout=60).status_code == 411
    assert set(served.folder.iterdir()) == before


HALF = (
    b"POST /gradio_api/upload HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: multipart/form-data; boundary=x\r\n"
    b"Content-Length: 100000\r\n\r\n"
    b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.svs"\r\n\r\nhalf a slide'
)


@pytest.mark.parametrize("how", ["breaks off", "stands still", "trickles"])
def test_an_upload_that_breaks_off_or_is_too_slow_leaves_nothing(served, how, monkeypatch):
    if how != "breaks off":
        monkeypatch.setattr(uploads_module, "PATIENCE", 1.0 if how == "stands still" else 0.2)
    before = set(served.folder.iterdir())
    host, port = served.address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as line:
        line.sendall(HALF)
        ends = time.monotonic() + 5
        while set(served.folder.iterdir()) == before and time.monotonic() < ends:
            time.sleep(0.01)
        assert set(served.folder.iterdir()) != before
        if how == "trickles":
            for _ in range(20):
                line.sendall(b"x")
                time.sleep(0.1)
        if how != "breaks off":
            assert b"408" in line.recv(100)
    ends = time.monotonic() + 5
    while set(served.folder.iterdir()) != before and time.monotonic() < ends:
        time.sleep(0.05)
    assert set(served.folder.iterdir()) == before


def test_uploads_keep_to_their_quota_and_leave_room_on_the_disk(tmp_path, monkeypatch):
    demo, told = serve(tmp_path, quota=100_000)
    try:
        assert upload(told.address, content=b"x" * 10_000).status_code == 200
        answer = upload(told.address, content=b"x" * 20_000)
        assert (answer.status_code, "not opened yet" in answer.text) == (507, True)
        for opened in told.folder.iterdir():  # and lies in its session's folder now
            opened.rename(tmp_path / "session")
        assert upload(told.address, content=b"x" * 20_000).status_code == 200
        (tmp_path / "session" / "more").write_bytes(b"x" * 78_000)
        answer = upload(told.address, content=b"x" * 4_000)
        assert (answer.status_code, "no room" in answer.text) == (507, True)
        (tmp_path / "session" / "more").unlink()
        assert upload(told.address, content=b"x" * 1_000).status_code == 200
        monkeypatch.setattr(uploads_module, "FREE", 1 << 60)
        assert upload(told.address, content=b"x" * 1_000).status_code == 507
        monkeypatch.setattr(uploads_module, "LARGEST", 500)
        assert upload(told.address, content=b"x" * 1_000).status_code == 413
    finally:
        demo.close(verbose=False)


# ---- who has left


def test_who_breaks_off_has_left_within_two_seconds_and_who_hears_all_has_not(served):
    join(served.address, [0.0], "patient")
    with httpx.stream("GET", f"{served.address}/gradio_api/queue/data?session_hash=patient", timeout=60) as stream:
        said = [json.loads(line[6:])["msg"] for line in stream.iter_lines() if line.startswith("data: ")]
    assert said[-1] == "close_stream"
    served.running.clear()
    join(served.address, [4.0], "hasty")
    with httpx.stream("GET", f"{served.address}/gradio_api/queue/data?session_hash=hasty", timeout=60):
        assert served.running.wait(10)
    assert served.heard("leave", "hasty")
    assert ("leave", "patient") not in served.log
    assert ("forget", "hasty") not in served.log, "another stream of the same page may come"


def test_who_has_the_page_open_has_not_left_however_long_the_next_stream_takes(served, monkeypatch):
    monkeypatch.setattr(door_module, "GONE_AFTER", 0.1)
    monkeypatch.setattr(door_module, "LISTEN_WITHIN", 0.2)
    served.running.clear()
    with httpx.stream("GET", f"{served.address}/gradio_api/heartbeat/slow", timeout=60) as stream:
        beats = stream.iter_lines()
        next(beats)
        join(served.address, [2.0], "slow")
        with httpx.stream("GET", f"{served.address}/gradio_api/queue/data?session_hash=slow", timeout=60):
            assert served.running.wait(10)
        time.sleep(1.0)
        assert ("leave", "slow") not in served.log
    assert served.heard("forget", "slow")


def test_who_closes_the_page_is_forgotten_within_two_seconds(served):
    with httpx.stream("GET", f"{served.address}/gradio_api/heartbeat/tab", timeout=60) as stream:
        beats = stream.iter_lines()
        next(beats)
        assert served.heard("arrive", "tab")
        with httpx.stream("GET", f"{served.address}/gradio_api/heartbeat/tab", timeout=60) as other:
            next(other.iter_lines())
        time.sleep(2 * door_module.GONE_AFTER)
        assert ("forget", "tab") not in served.log, "it is open twice"
    assert served.heard("forget", "tab")


def test_who_asks_again_before_the_first_look_has_not_left(served, monkeypatch):
    monkeypatch.setattr(door_module, "LISTEN_WITHIN", 5.0)

    def listen() -> None:
        where = f"{served.address}/gradio_api/queue/data?session_hash=steady"
        with httpx.stream("GET", where, timeout=60) as stream:
            assert list(stream.iter_lines())

    join(served.address, [0.0], "steady")
    listen()
    time.sleep(3.5)
    join(served.address, [1.0], "steady")
    time.sleep(2)  # the first look finds nobody listening just now
    listen()
    assert ("leave", "steady") not in served.log


@pytest.mark.parametrize("way", ["queue/join", "call/wait", "call/v2/wait"])
def test_who_asks_and_never_listens_has_left(served, way, monkeypatch):
    monkeypatch.setattr(door_module, "LISTEN_WITHIN", 0.5)
    if way == "queue/join":
        join(served.address, [3.0], "deaf")
        session = "deaf"
    else:
        body = {"seconds": 3.0} if "v2" in way else {"data": [3.0]}
        session = httpx.post(f"{served.address}/gradio_api/{way}", json=body).json()["event_id"]
    assert served.heard("ask", session)
    assert served.heard("leave", session)


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


def log_in(address: str, password: str) -> httpx.Response:
    return httpx.post(f"{address}/login", data={"username": "me", "password": password}, timeout=60)


def test_who_is_not_logged_in_sees_nothing_and_guessing_takes_time(tmp_path, monkeypatch):
    demo, told = serve(tmp_path, auth=[("me", "secret")])
    try:
        paths = ("slide/token/0/0_0.jpg", "heartbeat/s", "mcp/schema", "queue/data?session_hash=s", "info")
        for path in paths:
            assert httpx.get(f"{told.address}/gradio_api/{path}").status_code == 401
        for path in ("queue/join", "upload", "mcp/", "cancel", "call/wait", "run/wait", "reset"):
            assert httpx.post(f"{told.address}/gradio_api/{path}", json={}).status_code == 401
        monkeypatch.setattr(door_module, "TRIES", 2)
        monkeypatch.setattr(door_module, "PAUSE", 30.0)
        with ThreadPoolExecutor(8) as pool:  # all at once is no way
            tries = list(pool.map(lambda i: log_in(told.address, f"guess {i}").status_code, range(20)))
        assert tries.count(400) == 2
        assert set(tries) == {400, 429}
        assert log_in(told.address, "secret").status_code == 429, "not even looked at"
        monkeypatch.setattr(door_module, "PAUSE", 0.0)
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
    long, many = ["y" * 1001, "z" * 1001], list(map(str, range(27)))
    too_much: list[Any] = [("x" * 2001,), ("x", many), ("x", long), ("x", [], "y" * 1001), ("x", [3]), ("\udc00",)]
    for asked in too_much:
        with pytest.raises(ValueError, match=r"^The .*\.$|^A question"):
            check_question(*asked)
    assert len(read_told({"views": [{"x": 1.5}] * 200}, "views")) == 200
    with pytest.raises(ValueError, match="64 kB"):
        read_told({"views": ["x" * 70_000]}, "views")
    for told in ([], None, {"views": 3}, {"view": []}):
        with pytest.raises(ValueError, match="a list of views"):
            read_told(told, "views")
