"""The door of a server: what is turned away before Gradio sees it, and who has left.

Gradio checks logins, but believes any Host (so a page elsewhere whose name is rebound to 127.0.0.1 gets in), fetches
URLs that it is given for files, reads requests of any length, asks nobody who wants MCP or a heartbeat to log in, and
queues all that comes.
"""

import asyncio
import json
import os
import re
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterator, MutableMapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MOST_ASKED = 1 << 20  # bytes of a request that is no upload; a long chat comes to some 100 kB
MOST_PARTS = 6_000  # lists and objects in it: each takes 30 times its two bytes, for as long as it waits
LONGEST_NAME = 128  # characters of a session's name; it is remembered for a while
PATIENCE = 30.0  # s until a request has come whole, or an upload's next bytes
MOST_WAITING, MOST_OF_ADDRESS, MOST_OF_ALL = 12, 48, 96  # events of a session, an address, all; a slide takes six
MOST_UNHEARD = 12  # sessions that asked and have not listened yet: whoever floods the queue listens to nothing
GONE_AFTER = 1.0  # s without a stream of answers that was broken off; a page opens the next one at once
STREAMS_OF_ADDRESS, STREAMS_OF_ALL = 256, 1024  # that are open; a page has two
LISTEN_WITHIN = 10.0  # s until who asked for something wants to hear the answer
TRIES = 4  # wrong passwords in a row that are answered at once
PAUSE, SLOWEST = 1.0, 60.0  # s until the next password is looked at; twice as many after each wrong one, up to
ENDED = "x-sparsewsi-streams"  # header that tells a page how many of its streams have ended; viewer/hear.js
END = b'"msg":"close_stream"'  # what Gradio sends last: from then on it hears of nothing through this stream
CALLER = "x-sparsewsi-caller"  # header that tells calls of MCP apart, which all come through one client of Gradio's
API = re.compile(r"/gradio_api/(.*)", re.DOTALL)
BEFORE_LOGIN = ("user", "login_check", "startup-events", "token", "theme.css")  # below /gradio_api/
# What the page, gradio_client, plain HTTP and MCP need of Gradio; it has much more, none of which is for strangers.
OPEN = {
    "GET": (
        *BEFORE_LOGIN,
        *("app_id", "call/", "heartbeat/", "info", "mcp", "openapi.json", "queue/", "slide/", "upload_progress"),
    ),
    "POST": ("call/", "cancel", "mcp", "queue/join", "reset", "run/", "upload"),
    "DELETE": ("mcp",),
}
CLOSED = ("/monitoring", "/docs", "/redoc")
PAGE = re.compile(r"/?|.*/(config|info|openapi[.]json)/?")  # what Gradio makes anew for everybody, in 0.1 s of work
MOST_PAGES = 64  # that wait to be made
OLD_MCP = ("mcp/sse", "mcp/messages")  # its calls cannot be told apart
Refusal = tuple[int, str]  # status, sentence


class Sessions(Protocol):
    """Who is told of callers: the desk."""

    def arrive(self, session: str) -> None: ...
    def ask(self, session: str) -> None: ...
    def heed(self, session: str, listens: bool) -> None: ...
    def leave(self, session: str) -> None: ...
    def forget(self, session: str) -> None: ...


class Door:
    """ASGI middleware. Sentences for what is turned away; `sessions` are told who has come, who has left.

    names: host names that the server may be asked by; none: any
    embed: origins whose pages may show this one in a frame, besides its own
    uploads: where what is uploaded lies; no other file may be named. None: whatever Gradio lets in
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        sessions: Sessions,
        names: Collection[str] = (),
        embed: Sequence[str] = (),
        uploads: Path | None = None,
    ) -> None:
        self._app, self._sessions, self._uploads = app, sessions, uploads
        self._names = {name.lower().strip("[]") for name in names}
        self._frames = " ".join(["frame-ancestors", *(["*"] if "*" in embed else ["'self'", *embed])])
        self._wrong: dict[str, tuple[int, float]] = {}  # by address: wrong passwords in a row, and when the last was
        self._listening: Counter[str] = Counter()  # streams of answers, by session
        self._beating: Counter[str] = Counter()  # heartbeats, by session
        self._ended: Counter[str] = Counter()  # streams of answers that have ended, by session
        self._streams: Counter[str] = Counter()  # that are open, by address
        self._unheard: set[str] = set()  # sessions that asked for something and have held no connection open since
        self._joined: Counter[str] = Counter()  # things asked for, by session that may yet be found gone
        self._making, self._pages = asyncio.Lock(), 0  # how many pages are made or wait
        self._callers: dict[str, str] = {}  # calls of MCP that are under way, and the address of each

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # Gradio speaks HTTP alone
            await send({"type": "websocket.close", "code": 1008})
            return
        found, method = API.search(scope["path"]), scope["method"]
        what, send = found[1] if found else "", self._framed(send)
        refused, body = self._refuse(scope, what, bool(found)), b""
        if refused is None and method == "POST" and not what.startswith("upload"):
            body = await _read(receive)
            refused = self._refuse_body(scope, what, body)
            receive = _again(body or b"", receive)
        if refused is not None:
            await PlainTextResponse(refused[1], refused[0])(scope, receive, send)
        elif method == "POST" and scope["path"].rstrip("/").endswith("/login"):
            await self._log_in(scope, receive, send)
        elif method == "POST" and what.startswith("mcp"):
            await self._call_tool(scope, receive, send)
        elif method == "POST" and what.startswith(("queue/join", "call/")):
            await self._join(_session_in(body or b""), scope, receive, send)
        elif method == "GET" and what.startswith(("queue/data", "call/", "heartbeat/", "mcp", "upload_progress")):
            await self._stream(what, scope, receive, send)
        elif PAGE.fullmatch(scope["path"]):
            await self._make_page(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _refuse(self, scope: Scope, what: str, api: bool) -> Refusal | None:
        """None for what may come in."""
        headers, method = Headers(scope=scope), "GET" if scope["method"] == "HEAD" else scope["method"]
        if self._names and _host(headers.get("host", "")) not in self._names:
            return 421, "This server is asked by another name than its own; start it with --name to allow it."
        origin = headers.get("origin")
        if self._names and method != "GET" and origin and _host(_place(origin)) not in self._names:
            return 403, "This server takes nothing from pages of others."
        if api and (not what.startswith(OPEN.get(method, ())) or what.startswith(OLD_MCP)):
            if re.match(r"(file|proxy)[=/]", what):
                return 403, "This server fetches nothing for others, and gives no file by its path."
            return (404, "Not there.") if method != "OPTIONS" else None
        if scope["path"].startswith(CLOSED):
            return 404, "Not there."
        if api and not what.startswith(BEFORE_LOGIN) and not _is_logged_in(scope):
            return 401, "Log in first."
        return None

    def _refuse_body(self, scope: Scope, what: str, body: bytes | None) -> Refusal | None:
        if body is None:
            return 413, f"A request may have {MOST_ASKED >> 20} MB at most and {PATIENCE:.0f} s; files are uploaded."
        queued = what.startswith(("queue/join", "call/"))
        if not what:
            return None
        if body.count(b"[") + body.count(b"{") > MOST_PARTS:  # everybody would wait while they are read
            return 413, f"A request may have {MOST_PARTS:,} lists and objects at most."
        try:
            asked = json.loads(body) if body.strip() else {}
        except (ValueError, RecursionError):
            return 400, "The request is not JSON."
        session = _session_named(asked)
        if (
            not isinstance(asked, dict | list)
            or not isinstance(session, str | None)
            or len(session or "") > LONGEST_NAME
        ):
            return 400, "The request is not what Gradio's are."
        if _names_file(asked, anywhere=what.startswith("mcp")):
            return 403, "A file is uploaded, not named by its address: this server fetches nothing for others."
        if self._uploads is not None and not _is_uploaded(asked, self._uploads):
            return 403, "A file is uploaded first, and then named as the upload answers; another one was named."
        if not queued or not isinstance(asked, dict) or scope["app"].blocks is None:
            return None
        number = asked.get("fn_index")
        if number is not None and (not isinstance(number, int) or number not in scope["app"].blocks.fns):
            return 400, "The page has no such function; load it anew."
        if Headers(scope=scope).get(CALLER) in self._callers:  # counted where they came in
            return None
        queue, address = scope["app"].blocks._queue, _address(scope)
        waiting = len(queue.pending_event_ids_session.get(_session_named(asked), ()))
        if waiting >= MOST_WAITING:
            return 429, f"{waiting} things are being done for this page already; wait for them."
        events = list(queue.event_ids_to_events.values())
        if len(events) >= MOST_OF_ALL:
            return 503, "The server is busy; try again in a few minutes."
        if self._is_here(_session_named(asked)):
            mine = [event for event in events if event.request.client and event.request.client.host == address]
            if waiting and len(mine) >= MOST_OF_ADDRESS:  # who has nothing to wait for yet is let in
                return 429, "Too much is being done for your address already; try again in a few minutes."
        elif session not in self._unheard and len(self._unheard) >= MOST_UNHEARD:
            return 429, "Too much is asked for that nobody listens to; try again in a few seconds."
        return None

    def _is_here(self, session: str | None) -> bool:
        """Whether a session holds a connection open: a heartbeat, or a stream of answers."""
        return session is not None and bool(self._beating[session] or self._listening[session])

    # ---- who is there, who has left

    async def _join(self, session: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Something is asked for. Who does not listen for the answer before long has left."""
        caller = Headers(scope=scope).get(CALLER)
        if caller is not None and caller not in self._callers:
            scope["headers"] = [pair for pair in scope["headers"] if pair[0] != CALLER.encode()]
        answer = bytearray()

        async def note(message: Message) -> None:
            if message["type"] == "http.response.body" and len(answer) < 1000:
                answer.extend(message.get("body", b""))
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[ENDED] = str(self._ended[session])
            await send(message)

        if session and caller is None:
            self._sessions.ask(session)
            if not self._is_here(session):
                self._unheard.add(session)
        try:
            await self._app(scope, receive, note)
        except BaseException:
            self._unheard.discard(session)
            raise
        session = session or _event_in(bytes(answer))  # a call through plain HTTP is a session of its own
        if session and caller is None:
            self._sessions.ask(session)
            self._joined[session] += 1
            if not self._is_here(session):
                self._unheard.add(session)
            asyncio.get_running_loop().call_later(LISTEN_WITHIN, self._check, session, self._joined[session])

    def _check(self, session: str, joined: int) -> None:
        """Whether anybody listens for what was asked for last."""
        if self._joined[session] != joined:
            return
        del self._joined[session]
        self._unheard.discard(session)
        if not self._is_here(session):
            del self._listening[session], self._ended[session]
            _tell(self._sessions.leave, session)

    async def _make_page(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A page, when it is its turn: one at a time and, while more wait, half of the time, as answers need it too."""
        if self._pages >= MOST_PAGES:
            await PlainTextResponse("The server is busy; try again in a minute.", 503)(scope, receive, send)
            return
        made = asyncio.Event()  # its sending may take as long as the caller likes

        async def note(message: Message) -> None:
            made.set()
            await send(message)

        async def make() -> None:
            try:
                await self._app(scope, receive, note)
            finally:
                made.set()

        self._pages += 1
        try:
            async with self._making:
                began, making = time.monotonic(), asyncio.create_task(make())
                await made.wait()
                if self._pages > 1:
                    await asyncio.sleep(time.monotonic() - began)
        finally:
            self._pages -= 1
        await making

    async def _stream(self, what: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Something that stays open: answers, heartbeats."""
        address = _address(scope)
        if len(_session_of(scope, what)) > LONGEST_NAME:
            await PlainTextResponse("The request is not what Gradio's are.", 400)(scope, receive, send)
            return
        if self._streams[address] >= STREAMS_OF_ADDRESS or self._streams.total() >= STREAMS_OF_ALL:
            await PlainTextResponse("Too many pages are open; close some.", 429)(scope, receive, send)
            return
        self._streams[address] += 1
        try:
            if what.startswith("heartbeat/"):
                session = what.removeprefix("heartbeat/").rstrip("/")
                self._sessions.arrive(session)
                await self._watch(self._beating, session, self._sessions.forget, scope, receive, send)
            elif what.startswith(("queue/data", "call/")):
                await self._watch(self._listening, _session_of(scope, what), self._sessions.leave, scope, receive, send)
            else:
                await self._app(scope, receive, send)
        finally:
            self._streams[address] -= 1
            if not self._streams[address]:
                del self._streams[address]

    async def _watch(
        self,
        open_streams: Counter[str],
        session: str,
        left: Callable[[str], None],
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        """A stream that ends whole, or is broken off: then, unless another has taken its place, its caller has left.

        Starlette and Gradio notice that only when they next send something.
        """
        whole = counted = ended = False
        answers = open_streams is self._listening

        def check(joined: int) -> None:
            # Whose page is open has not left: on a busy machine its next stream may take long to come. What was asked
            # for since then has a check of its own.
            stays = answers and (self._beating[session] or self._joined[session] != joined)
            if not open_streams[session] and not stays:
                del open_streams[session], self._ended[session]
                _tell(left, session)

        def count_end() -> None:
            nonlocal ended
            if answers and not ended:
                ended = True
                self._ended[session] += 1

        def end() -> None:
            nonlocal counted
            if counted:
                counted = False
                count_end()
                open_streams[session] -= 1
                self._sessions.heed(session, self._is_here(session))
                if not whole or open_streams is self._beating:  # a heartbeat ends with its page alone
                    asyncio.get_running_loop().call_later(GONE_AFTER, check, self._joined[session])
                elif not open_streams[session]:
                    del open_streams[session]
                    if not self._beating[session] and not self._joined[session]:
                        del self._ended[session]

        async def listen() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            end()

        async def watch(message: Message) -> None:
            nonlocal whole
            whole = whole or (message["type"] == "http.response.body" and not message.get("more_body"))
            if END in message.get("body", b""):
                count_end()
            await send(message)

        open_streams[session] += 1
        self._unheard.discard(session)
        self._sessions.heed(session, True)
        counted = True
        listener = asyncio.create_task(listen())
        try:
            await self._app(scope, receive, watch)
        finally:
            listener.cancel()
            end()

    async def _call_tool(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A request of MCP: each is a caller of its own, who has left when the request is broken off."""
        address, caller = _address(scope), f"mcp-{secrets.token_urlsafe(16)}"
        if list(self._callers.values()).count(address) >= MOST_WAITING:
            await PlainTextResponse("Wait for the calls that you have made already.", 429)(scope, receive, send)
            return
        headers = [pair for pair in scope["headers"] if pair[0] != CALLER.encode()]
        self._callers[caller] = address
        self._sessions.ask(caller)
        self._sessions.heed(caller, True)

        async def watch() -> Message:
            message = await receive()
            if message["type"] == "http.disconnect":
                _tell(self._sessions.leave, caller)
            return message

        waiting: asyncio.Task[Message] | None = None

        async def shared() -> Message:  # what the app reads and we watch: a disconnection is told to both
            nonlocal waiting
            if waiting is None or waiting.done():
                waiting = asyncio.ensure_future(watch())
            return await asyncio.shield(waiting)

        async def listen() -> None:
            while (await shared())["type"] != "http.disconnect":
                pass

        first = await receive()  # the body, which was read already
        sent = False

        async def give() -> Message:
            nonlocal sent
            if not sent:
                sent = True
                return first
            return await shared()

        listener = asyncio.create_task(listen())
        try:
            await self._app({**scope, "headers": [*headers, (CALLER.encode(), caller.encode())]}, give, send)
        finally:
            listener.cancel()
            self._sessions.heed(caller, False)
            self._callers.pop(caller, None)

    # ---- logins

    async def _log_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        """After a few wrong passwords in a row every further one is looked at only after a pause, longer each time."""
        address, now, status = _address(scope), time.monotonic(), 500
        wrong, last = self._wrong.get(address, (0, 0.0))
        pause = 0.0 if wrong < TRIES else min(PAUSE * 2.0 ** min(wrong - TRIES, 10), SLOWEST)
        if now < last + pause:
            sentence = f"Too many wrong passwords; try again in {last + pause - now:.0f} s."
            await PlainTextResponse(sentence, 429)(scope, receive, send)
            return
        self._wrong[address] = wrong + 1, now  # counted before, so that all at once is no way

        async def note(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        await self._app(scope, receive, note)
        if status < 400:
            self._wrong.pop(address, None)
        while len(self._wrong) > 10_000:
            self._wrong.pop(next(iter(self._wrong)))

    def _framed(self, send: Send) -> Callable[[MutableMapping[str, Any]], Awaitable[None]]:
        async def add(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.append("Content-Security-Policy", self._frames)
                if self._frames.endswith("'self'"):
                    headers["X-Frame-Options"] = "SAMEORIGIN"
            await send(message)

        return add


def hang_up(connections: Collection[Any], before: Collection[tuple]) -> set[tuple]:
    """Close the connections that have asked for nothing since the last look; returns those that ask for nothing now.

    connections: uvicorn's, which waits for ever for a request that was begun; before: what this returned last
    """
    silent = {(one, one.cycle) for one in list(connections) if one.cycle is None or one.cycle.response_complete}
    for one, _ in silent.intersection(before):
        one.loop.call_soon_threadsafe(one.transport.close)
    return silent


def hang_up_for_ever(connections: Collection[Any]) -> None:
    """Do so every PATIENCE."""
    silent: set[tuple] = set()
    while True:
        time.sleep(PATIENCE)
        silent = hang_up(connections, silent)


def _tell(deed: Callable[[str], None], session: str) -> None:
    """Do it in a thread: to end work and to delete files takes longer than everybody's requests can wait."""
    asyncio.get_running_loop().run_in_executor(None, deed, session)


def read_logins(text: str | None) -> list[tuple[str, str]] | None:
    """name:password[,name:password ...] as pairs. Raises ValueError where a part is empty: it would let anybody in."""
    if text is None:
        return None
    pairs = [tuple(pair.split(":", 1)) for pair in text.split(",")]
    if not all(len(pair) == 2 and pair[0].strip() and pair[1].strip() for pair in pairs):
        raise ValueError("--auth (or SPARSEWSI_AUTH) is name:password[,name:password ...], and no part may be empty.")
    return [(name.strip(), password) for name, password in pairs]


def _place(origin: str) -> str:
    """host[:port] of an origin; "" for what is none."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""


def _host(text: str) -> str:
    """The name of a host[:port]."""
    return re.sub(r":\d*$", "", text).lower().strip("[]")


def _address(scope: Scope) -> str:
    return (scope.get("client") or ("",))[0]


def _is_logged_in(scope: Scope) -> bool:
    """Whether the browser holds a login that has not been ended, where the app asks for one."""
    app = scope["app"]
    if getattr(app, "auth", None) is None:
        return True
    cookies = cookie_parser(Headers(scope=scope).get("cookie", ""))
    names = (f"access-token-{app.cookie_id}", f"access-token-unsecure-{app.cookie_id}")
    return any(cookies.get(name) in app.tokens for name in names)


def _session_of(scope: Scope, what: str) -> str:
    """Who listens to a stream of answers: a call through plain HTTP is a session of its own."""
    found = re.search(rb"(?:^|&)session_hash=([^&]*)", scope.get("query_string", b""))
    return found[1].decode(errors="replace") if found else what.rstrip("/").rsplit("/", 1)[-1]


def _session_in(body: bytes) -> str:
    """The session that a request for work names."""
    return _session_named(json.loads(body) if body.strip() else {}) or ""


def _session_named(asked: Any) -> Any:
    return asked.get("session_hash") if isinstance(asked, dict) else None


def _event_in(answer: bytes) -> str:
    """The event that Gradio gives a request for work."""
    found = re.search(rb'"event_id"\s*:\s*"(\w+)"', answer)
    return found[1].decode() if found else ""


async def _read(receive: Receive) -> bytes | None:
    """The whole body; None if it is too long or too slow, or was broken off."""
    body = bytearray()
    try:
        async with asyncio.timeout(PATIENCE):
            while True:
                message = await receive()
                if message["type"] != "http.request":
                    return None
                body += message.get("body", b"")
                if len(body) > MOST_ASKED:
                    return None
                if not message.get("more_body"):
                    return bytes(body)
    except TimeoutError:
        return None


def _again(body: bytes, receive: Receive) -> Receive:
    """A body that was read, for the next one to read."""
    sent = False

    async def give() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return give


def _names_file(asked: Any, anywhere: bool) -> bool:
    """Whether somewhere in it a file's path is a web address, which Gradio would fetch.

    anywhere: so, too, any path and any text that is an address: what MCP is given, Gradio itself uploads as a client
    """
    address = re.compile(r"\s*(https?|ftp|file):", re.IGNORECASE)
    for one in _objects(asked):
        path, several = one.get("path"), one.get("files")
        if isinstance(path, str) and (anywhere or address.match(path)):
            return True
        files = [one.get("file"), *(several if isinstance(several, list) else [several])]
        if anywhere and any(isinstance(file, str) and (address.match(file) or file[:5] == "data:") for file in files):
            return True
    return False


def _is_uploaded(asked: Any, uploads: Path) -> bool:
    """Whether every file that is named lies where uploads do, uploads/<digest>/<name>, and is no folder."""
    root = os.path.realpath(uploads)
    for one in _objects(asked):
        path, meta = one.get("path"), one.get("meta")
        if not isinstance(path, str) or not isinstance(meta, dict) or meta.get("_type") != "gradio.FileData":
            continue
        try:
            if os.path.dirname(os.path.realpath(os.path.dirname(path))) != root or os.path.isdir(path):
                return False
        except ValueError:  # a zero byte
            return False
    return True


def _objects(asked: Any) -> Iterator[dict]:
    """All of JSON's objects in it, however deep."""
    rest = [asked]
    while rest:
        one = rest.pop()
        if isinstance(one, dict):
            yield one
            rest += one.values()
        elif isinstance(one, list):
            rest += one
