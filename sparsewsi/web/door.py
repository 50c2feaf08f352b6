"""The door of a server: what is turned away before Gradio sees it, and who has left.

Gradio checks logins and origins, but believes any Host (so a page elsewhere whose name is rebound to 127.0.0.1 gets
in), fetches URLs that it is given for files, asks nobody who wants MCP or a heartbeat to log in, and queues all that
comes.
"""

import asyncio
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MOST_ASKED = 2 << 20  # bytes of a request that is no upload; a long chat comes to some 100 kB
MOST_WAITING = 12  # events of a session in the queue; opening a slide takes six
ROOM = 2 << 30  # bytes that stay free on the disk of the uploads
GONE_AFTER = 1.0  # s without a stream of answers that was broken off; a page opens the next one at once
SLOWEST = 8.0  # s until a wrong password is called wrong, after several
API = re.compile(r"/gradio_api/(.*)", re.DOTALL)
OPEN_TO_ALL = ("user", "login_check", "startup-events", "token")  # below /gradio_api/, before a login


class Door:
    """ASGI middleware. Sentences for what is turned away; `leave` is called with a session whose caller is gone.

    names:   host names that the server may be asked by; none: any
    embed:   origins whose pages may show this one in a frame, besides its own
    uploads: the folder on whose disk uploads need room
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        leave: Callable[[str], None],
        uploads: Path,
        names: Collection[str] = (),
        embed: Sequence[str] = (),
    ) -> None:
        self._app, self._leave, self._uploads = app, leave, uploads
        self._names = {name.lower().strip("[]") for name in names}
        self._frames = " ".join(["frame-ancestors", *(["*"] if "*" in embed else ["'self'", *embed])])
        self._wrong: dict[str, int] = {}  # by address: wrong passwords in a row
        self._listening: Counter[str] = Counter()  # streams of answers, by session

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        found = API.search(scope["path"])
        what, method = found[1] if found else "", scope.get("method", "GET")
        refused = self._refuse(scope, what)
        if refused is None and method == "POST" and what and not what.startswith(("upload", "mcp")):
            body = await _read(receive)
            refused = _refuse_body(scope["app"], body, queued=what.startswith(("queue/join", "call/")))
            receive = _again(body or b"", receive)
        if refused is not None:
            await PlainTextResponse(refused[1], refused[0])(scope, receive, send)
        elif method == "POST" and scope["path"].rstrip("/").endswith("/login"):
            await self._log_in(scope, receive, send)
        elif method == "GET" and what.startswith(("queue/data", "call/")):
            await self._stream(_session_of(scope, what), scope, receive, self._framed(send))
        else:
            await self._app(scope, receive, self._framed(send))

    def _refuse(self, scope: Scope, what: str) -> tuple[int, str] | None:
        """(status, sentence), or None for what may come in."""
        headers = Headers(scope=scope)
        name = re.sub(r":\d*$", "", headers.get("host", "")).lower().strip("[]")
        if self._names and name not in self._names:
            return 421, "This server is asked by another name than its own; start it with --name to allow it."
        if re.match(r"(file|proxy)=https?:", what, re.IGNORECASE) or what.startswith("proxy="):
            return 403, "This server fetches nothing for others."
        if what and not what.startswith(OPEN_TO_ALL) and not _is_logged_in(scope):
            return 401, "Log in first."
        if what.startswith("upload") and scope.get("method") == "POST":
            length = headers.get("content-length", "")
            if not length.isdigit():
                return 411, "An upload must say how long it is."
            self._uploads.mkdir(mode=0o700, parents=True, exist_ok=True)
            if shutil.disk_usage(self._uploads).free - int(length) < ROOM:
                return 507, "The server has no room for this file now; try again later."
        return None

    async def _stream(self, session: str, scope: Scope, receive: Receive, send: Send) -> None:
        """A stream of answers. Its caller has left if it is broken off and no other takes its place.

        Starlette and Gradio notice that only when they next send something.
        """
        whole = counted = False

        def end() -> None:
            nonlocal counted
            if counted:
                counted = False
                self._listening[session] -= 1
                if not whole:
                    asyncio.get_running_loop().call_later(GONE_AFTER, self._check, session)
                elif not self._listening[session]:
                    del self._listening[session]

        async def listen() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            end()

        async def watch(message: Message) -> None:
            nonlocal whole
            whole = whole or (message["type"] == "http.response.body" and not message.get("more_body"))
            await send(message)

        self._listening[session] += 1
        counted = True
        listener = asyncio.create_task(listen())
        try:
            await self._app(scope, receive, watch)
        finally:
            listener.cancel()
            end()

    def _check(self, session: str) -> None:
        if not self._listening[session]:
            del self._listening[session]
            self._leave(session)

    async def _log_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Every wrong password in a row is answered later than the one before."""
        address, held = (scope.get("client") or ("",))[0], []

        async def hold(message: Message) -> None:
            held.append(message)

        tries = self._wrong[address] = self._wrong.get(address, 0) + 1  # counted before, so that all at once is no way
        await self._app(scope, receive, hold)
        if held and held[0].get("status", 500) < 400:
            self._wrong.pop(address, None)
        else:
            await asyncio.sleep(min(0.25 * 2 ** min(tries, 10), SLOWEST))
        for message in held:
            await self._framed(send)(message)
        while len(self._wrong) > 10_000:
            self._wrong.pop(next(iter(self._wrong)))

    def _framed(self, send: Send) -> Send:
        async def add(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.append("Content-Security-Policy", self._frames)
                if self._frames.endswith("'self'"):
                    headers["X-Frame-Options"] = "SAMEORIGIN"
            await send(message)

        return add


def read_logins(text: str | None) -> list[tuple[str, str]] | None:
    """name:password[,name:password ...] as pairs. Raises ValueError where a part is empty: it would let anybody in."""
    if text is None:
        return None
    pairs = [tuple(pair.split(":", 1)) for pair in text.split(",")]
    if not all(len(pair) == 2 and pair[0].strip() and pair[1].strip() for pair in pairs):
        raise ValueError("--auth (or SPARSEWSI_AUTH) is name:password[,name:password ...], and no part may be empty.")
    return [(name.strip(), password) for name, password in pairs]


def _is_logged_in(scope: Scope) -> bool:
    """Whether the browser holds a login that has not been ended, where the app asks for one."""
    app = scope["app"]
    if getattr(app, "auth", None) is None:
        return True
    cookies = cookie_parser(Headers(scope=scope).get("cookie", ""))
    names = (f"access-token-{app.cookie_id}", f"access-token-unsecure-{app.cookie_id}")
    return any(cookies.get(name) in app.tokens for name in names)


def _session_of(scope: Scope, what: str) -> str:
    """Who listened to a stream of answers: a call through plain HTTP is a session of its own."""
    found = re.search(rb"(?:^|&)session_hash=([^&]*)", scope.get("query_string", b""))
    return found[1].decode() if found else what.rstrip("/").rsplit("/", 1)[-1]


async def _read(receive: Receive) -> bytes | None:
    """The whole body; None if it is too long, or was broken off."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        body += message.get("body", b"")
        if len(body) > MOST_ASKED:
            return None
        if not message.get("more_body"):
            return bytes(body)


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


def _refuse_body(app: Any, body: bytes | None, queued: bool) -> tuple[int, str] | None:
    if body is None:
        return 413, f"A request may have {MOST_ASKED >> 20} MB at most; files are uploaded."
    try:
        asked = json.loads(body) if body.strip() else {}
    except (ValueError, RecursionError):
        return None if not queued else (400, "The request is not JSON.")
    if _names_url(asked):
        return 403, "A file is uploaded, not named by its address: this server fetches nothing for others."
    if queued and isinstance(asked, dict) and app.blocks is not None:
        waiting = app.blocks._queue.pending_event_ids_session.get(asked.get("session_hash"), ())
        if len(waiting) >= MOST_WAITING:
            return 429, f"{len(waiting)} things are being done for this page already; wait for them."
    return None


def _names_url(asked: Any) -> bool:
    """Whether somewhere in it a file's path is a web address, which Gradio would fetch."""
    rest = [asked]
    while rest:
        one = rest.pop()
        if isinstance(one, dict):
            path = one.get("path")
            if isinstance(path, str) and re.match(r"\s*(https?|ftp):", path, re.IGNORECASE):
                return True
            rest += one.values()
        elif isinstance(one, list):
            rest += one
    return False
