"""The command `serve`: OpenAI's chat completions about slides, for harnesses and chat clients.

    POST /v1/chat/completions   {"model": "sparsewsi", "messages": [{"role": "user", "content": [
                                   {"type": "image_url", "image_url": {"url": "slide://folder/slide.svs"}},
                                   {"type": "text", "text": "Which tissue is this?"}]}], "stream": true}
    GET /v1/models

One model answers one question at a time, the others wait. A caller who is gone is not answered.
"""

import argparse
import asyncio
import hmac
import json
import os
import re
import sys
import threading
import time
import traceback
import uuid
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from sparsewsi.bags.bag import own_coords
from sparsewsi.model.config import DEFAULT_MODEL, name_model
from sparsewsi.model.prompt import ROLES
from sparsewsi.readers.choice import add_reader_flags, choose_reader, open_reader
from sparsewsi.readers.pictures import ReaderError
from sparsewsi.report.answer import Answer
from sparsewsi.report.case import Case
from sparsewsi.report.record import describe_slides
from sparsewsi.report.scope import word_answer, word_tendency
from sparsewsi.slides.remote import ANY, OPEN, is_remote
from sparsewsi.web.library import Library
from sparsewsi.web.limits import MOST_TURNS, check_slides, check_turns

MODEL = "sparsewsi"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
MOST_ASKED = 2 << 20  # bytes of a request
MOST_WAITING = 32  # questions
EARLY = 5.0  # s in which what goes wrong is told by its status, before a stream begins
TICK = 0.25  # s between looks whether the caller is still there
IN_TEXT = re.compile(r"slide://(\S+)")
# Settings that would change what an answer is, and are not had.
NOT_HAD = ("tools", "functions", "logprobs", "stop", "logit_bias", "audio", "modalities")
NAME_ONE = (
    'Name a slide: a part {"type": "image_url", "image_url": {"url": "slide://NAME"}}, or slide://NAME in the text.'
)


class Refused(Exception):
    """What is not answered: the status, a sentence, and which part of the request is at fault."""

    def __init__(self, status: int, sentence: str, param: str | None = None, code: str | None = None):
        super().__init__(sentence)
        self.status, self.param, self.code = status, param, code

    @property
    def body(self) -> dict[str, Any]:
        """As OpenAI words an error."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class Gone(Exception):
    """The caller does not wait any more."""


# ---- what is asked


@dataclass(frozen=True)
class Asked:
    """A request.

    slides: (name, um/px or None) of each slide of the case; most: tokens of the answer, None: the model's own;
    usage: of a stream, whether tokens are counted
    """

    slides: tuple[tuple[str, float | None], ...]
    messages: tuple[dict[str, str], ...]
    options: tuple[str, ...] = ()
    stream: bool = False
    most: int | None = None
    evidence: bool = False
    usage: bool = False


def read_request(body: Any, models: Collection[str] = (MODEL,)) -> Asked:
    """The request in a parsed body, checked. Raises Refused."""
    if not isinstance(body, dict):
        raise Refused(400, "The request must be a JSON object.")
    if body.get("model") not in models:
        sentence = f"There is no model {str(body.get('model'))[:100]} here; ask for {next(iter(models))}."
        raise Refused(404, sentence, "model", "model_not_found")
    for name in NOT_HAD:
        if body.get(name):
            raise Refused(400, f"{name} is not had here; leave it out.", name, "unsupported_parameter")
    if body.get("n") not in (None, 1):
        raise Refused(400, "One answer is given to a request; leave n out.", "n", "unsupported_parameter")
    if (body.get("response_format") or {"type": "text"}) != {"type": "text"}:
        raise Refused(400, "Answers are plain text; leave response_format out.", "response_format")
    slides, messages = _read_messages(body.get("messages"))
    if body.get("slide"):
        slides.append(read_slide(body["slide"]))
    named = list(dict.fromkeys(slides))
    if not named:
        raise Refused(400, NAME_ONE, "messages")
    options = body.get("options") or []
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise Refused(400, "options must be a list of texts.", "options")
    try:
        check_turns(messages, options)
        check_slides(len(named))
    except ValueError as error:
        raise Refused(400, str(error), "messages") from None
    return Asked(
        tuple((slide, _read_mpp(body.get("slide_mpp"), mpp)) for slide, mpp in named),
        tuple(messages),
        tuple(options),
        stream=body.get("stream") is True,
        most=_read_most(body),
        evidence=body.get("evidence") is True,
        usage=isinstance(body.get("stream_options"), dict) and bool(body["stream_options"].get("include_usage")),
    )


def read_slide(text: Any) -> tuple[str, float | None]:
    """(name, um/px or None) of slide://NAME?mpp=0.25, a plain name, or the address of a slide. Raises Refused."""
    if not isinstance(text, str) or not text.strip() or "\0" in text:
        raise Refused(400, NAME_ONE, "messages")
    text = text.strip().removeprefix("slide://")
    if is_remote(text):
        return text, None
    if re.match(r"(data|https?|ftp|file):", text, re.IGNORECASE):
        raise Refused(400, f"Pictures are not taken, slides are. {NAME_ONE}", "messages", "unsupported_image")
    name, _, query = text.partition("?")
    given = parse_qs(query).get("mpp", [""])[0]
    return name, _read_mpp(given or None)


def _read_messages(given: Any) -> tuple[list[tuple[str, float | None]], list[dict[str, str]]]:
    """The slides that are named in a chat, and its turns without them."""
    if not isinstance(given, list) or not given or len(given) > MOST_TURNS:
        raise Refused(400, f"messages must be a list of 1 to {MOST_TURNS} messages.", "messages")
    slides, turns = [], []
    for number, message in enumerate(given):
        where = f"messages[{number}]"
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise Refused(400, f"{where} must have a role, {', '.join(ROLES[:-1])} or {ROLES[-1]}.", where)
        content = message.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list):
            raise Refused(400, f"{where} must have a content, text or a list of parts.", where)
        texts = []
        for part in parts:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind in ("text", "input_text") and isinstance(part.get("text"), str):
                slides += [read_slide(found.rstrip(".,;:!?)'\"")) for found in IN_TEXT.findall(part["text"])]
                texts.append(IN_TEXT.sub("", part["text"]).strip())
            elif kind in ("image_url", "slide", "image"):
                value = part.get(kind, part.get("url"))
                slides.append(read_slide(value.get("url") if isinstance(value, dict) else value))
            else:
                raise Refused(400, f"{where} has a part of type {kind!r}; text and slides are taken.", where)
        text = "\n".join(filter(None, texts))
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise Refused(400, f"{where} holds half a character (a lone surrogate).", where)
        turns.append({"role": message["role"], "content": text})
    if turns[-1]["role"] != "user" or not turns[-1]["content"]:
        raise Refused(400, "The last message must be the user's, with a question.", "messages")
    return slides, turns


def _read_mpp(*given: Any) -> float | None:
    value = next((one for one in given if one is not None), None)
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError):
        raise Refused(400, "slide_mpp must be a number of um/px, e.g. 0.25 for a 40x scan.", "slide_mpp") from None


def _read_most(body: Mapping[str, Any]) -> int | None:
    given = next((body[name] for name in ("max_completion_tokens", "max_tokens") if body.get(name) is not None), None)
    if given is not None and (isinstance(given, bool) or not isinstance(given, int) or given < 1):
        raise Refused(400, "max_tokens must be a positive whole number.", "max_tokens")
    return given


# ---- how it is answered


class Turn:
    """A question on its way: what comes of it, in order, for the one who waits."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self.stopped = False
        self.done = 0, 0  # patches encoded, of all
        self._loop, self._looked = loop, 0.0
        self._events: asyncio.Queue[str | dict[str, Any] | Exception] = asyncio.Queue()

    def look(self, *done: int) -> None:
        """Raise Gone once nobody waits."""
        if self.stopped:
            raise Gone
        if done:
            self.done = done[0], done[1]

    def tell(self, event: str | dict[str, Any] | Exception) -> None:
        """A piece of the answer, at the end what is known of it, or what went wrong."""
        self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def next(self, request: Request, seconds: float) -> str | dict[str, Any] | None:
        """The next event; None if there was none for so long. Raises Gone, Refused."""
        end = time.monotonic() + seconds
        while True:
            if time.monotonic() > self._looked + TICK:
                self._looked = time.monotonic()
                if await request.is_disconnected():
                    raise Gone
            try:
                event = await asyncio.wait_for(self._events.get(), TICK)
            except TimeoutError:
                if time.monotonic() > end:
                    return None
                continue
            if isinstance(event, Exception):
                raise event
            return event


class Answers:
    """The questions of one server: one is answered, the others wait in their order.

    with_notice: the notice stands under every answer, for clients that people read
    bare: answers are the model's own words, without what speaks against believing them, for harnesses that compare
    """

    def __init__(self, library: Library, with_notice: bool = False, bare: bool = False):
        self._library, self._with_notice, self._bare = library, with_notice, bare
        self._worker = ThreadPoolExecutor(1, "answers")
        self._waiting, self._lock = 0, threading.Lock()

    def begin(self, asked: Asked) -> Turn:
        """Put a question. Raises Refused if too many wait."""
        with self._lock:
            if self._waiting >= MOST_WAITING:
                sentence = f"{self._waiting} questions wait already; ask again later."
                raise Refused(429, sentence, code="rate_limit_exceeded")
            self._waiting += 1
        turn = Turn(asyncio.get_running_loop())
        future = self._worker.submit(self._work, turn, asked)
        future.add_done_callback(lambda _: self._end())
        return turn

    def close(self) -> None:
        self._worker.shutdown(wait=False, cancel_futures=True)

    def _end(self) -> None:
        with self._lock:
            self._waiting -= 1

    def _work(self, turn: Turn, asked: Asked) -> None:
        try:
            turn.look()
            turn.tell(self._answer(turn, asked))
        except Gone:
            pass
        except (ReaderError, ValueError, OSError, RuntimeError) as error:
            turn.tell(_word(error))
        except Exception:
            traceback.print_exc()  # a defect of ours
            turn.tell(Refused(500, "That failed, and the program is at fault; try again."))

    def _answer(self, turn: Turn, asked: Asked) -> dict[str, Any]:
        """Tell the pieces of an answer, none before it is judged; returns what is known of it."""
        library, options = self._library, list(asked.options)
        case = library.open(asked.slides, turn.look)
        pieces, reason = [], "stop"
        at_once = self._bare or not (options or asked.evidence)
        for piece in case.answer(library.reader, asked.messages, options):
            turn.look()
            pieces.append(piece)
            if at_once:
                turn.tell(piece if self._bare else case.continue_answer(library.reader, asked.messages, pieces))
            if len(pieces) == asked.most and not options:
                reason = "length"
                break
        text = "".join(pieces)
        how: dict[str, Any] = {"evidence": asked.evidence, "progress": turn.look}
        answer = case.measure(library.reader, asked.messages, text, asked.options, **how)
        if not at_once:
            said = [word_answer(answer, case.limits), word_tendency(answer, case.limits)]
            turn.tell("\n".join(filter(None, said)))
        if self._with_notice:
            turn.tell(f"\n\n{case.notice}")
        known = _describe(case, asked, answer)
        return {"finish_reason": reason, "usage": _count(library, case, asked, text), MODEL: known}


def _describe(case: Case, asked: Asked, answer: Answer) -> dict[str, Any]:
    """What OpenAI's protocol has no place for: the model's own words, probabilities, evidence, doubts, the notice."""
    kept = case.selection
    found = {"sentence": answer.evidence, "rests": answer.rests, "effects": list(answer.effects)}
    found |= {"slides": {slide.name: slide.effect for slide in answer.slides}}
    evidence = {"evidence": found} if asked.evidence else {}
    return {
        "answer": answer.text,
        "slide": case.bag.slide,
        "num_patches": kept.num_patches,
        "indices": kept.indices.tolist(),
        "ranks": kept.ranks.tolist(),
        "coords": own_coords(case.bag)[kept.indices].tolist(),
        "slide_numbers": (case.numbers + 1).tolist(),
        "slides": describe_slides(case.bag),
        "probabilities": list(answer.probs),
        "doubts": [*case.doubts, *filter(None, [answer.limit])],
        "notice": case.notice,
        **evidence,
    }


def _count(library: Library, case: Case, asked: Asked, text: str) -> dict[str, int] | None:
    found = library.count_tokens(case, asked.messages, list(asked.options), text)
    if found is None:
        return None
    return {"prompt_tokens": found[0], "completion_tokens": found[1], "total_tokens": sum(found)}


def _word(error: Exception) -> Refused:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    text = " ".join(text.split()).replace("Pass slide_mpp=", "Pass slide_mpp or slide://NAME?mpp=")
    status = 502 if isinstance(error, ReaderError) else 500 if isinstance(error, RuntimeError) else 400
    return Refused(status, text[:1].upper() + text[1:])


# ---- over HTTP


def build_app(
    answers: Answers, models: Sequence[str] = (MODEL,), key: str | None = None, names: Collection[str] = ()
) -> FastAPI:
    """The two routes. key: what callers must show as a bearer token; names: hosts it may be asked by, none: any."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    started = int(time.time())

    def let_in(request: Request) -> None:
        host = re.sub(r":\d*$", "", request.headers.get("host", "")).strip("[]").lower()
        if names and host not in names:
            raise Refused(421, "This server is asked by another name than its own; start it with --name to allow it.")
        shown = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
        if key is not None and not hmac.compare_digest(shown, key.encode()):
            raise Refused(
                401,
                "The key is wrong or missing; pass the one that this server was started with.",
                code="invalid_api_key",
            )

    @app.exception_handler(Refused)
    async def refuse(_request: Request, error: Refused) -> Response:
        headers = {"Retry-After": "5"} if error.status == 429 else None
        return JSONResponse(error.body, error.status, headers)

    @app.exception_handler(404)
    @app.exception_handler(405)
    async def miss(_request: Request, _error: Exception) -> Response:
        sentence = "There is nothing here; POST /v1/chat/completions and GET /v1/models are served."
        return JSONResponse(Refused(404, sentence).body, 404)

    @app.get("/v1/models")
    async def list_models(request: Request) -> dict[str, Any]:
        let_in(request)
        listed = [{"id": name, "object": "model", "created": started, "owned_by": MODEL} for name in models]
        return {"object": "list", "data": listed}

    @app.get("/v1/models/{name:path}")
    async def show_model(name: str, request: Request) -> dict[str, Any]:
        let_in(request)
        if name not in models:
            raise Refused(404, f"There is no model {name[:100]} here.", "model", "model_not_found")
        return {"id": name, "object": "model", "created": started, "owned_by": MODEL}

    @app.post("/v1/chat/completions")
    async def complete(request: Request) -> Response:
        let_in(request)
        body = await _read_body(request)
        asked = read_request(body, models)
        turn = answers.begin(asked)
        named = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": body["model"]}
        try:
            if not asked.stream:
                return JSONResponse(await _collect(turn, request, named))
            first = await turn.next(request, EARLY)
        except Gone:
            turn.stopped = True
            return Response(status_code=499)
        except BaseException:
            turn.stopped = True
            raise
        events = _stream(turn, request, named, asked.usage, first)
        return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    return app


async def _read_body(request: Request) -> Any:
    data = bytearray()
    async for piece in request.stream():
        data += piece
        if len(data) > MOST_ASKED:
            raise Refused(413, f"A request may have {MOST_ASKED >> 20} MB at most; slides are named, not sent.")
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise Refused(400, "The request is not JSON.") from None


async def _collect(turn: Turn, request: Request, named: dict[str, Any]) -> dict[str, Any]:
    """The whole answer."""
    pieces: list[str] = []
    while True:
        event = await turn.next(request, TICK)
        if isinstance(event, str):
            pieces.append(event)
        elif event is not None:
            message = {"role": "assistant", "content": "".join(pieces), "refusal": None}
            choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": event.pop("finish_reason")}
            return {**named, "object": "chat.completion", "choices": [choice], **event}


async def _stream(
    turn: Turn, request: Request, named: dict[str, Any], usage: bool, event: str | dict[str, Any] | None
) -> AsyncIterator[str]:
    """Server-sent events; while nothing comes, comments that say how far it is."""

    def chunk(delta: dict[str, Any], reason: str | None = None, **more: Any) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return _word_event({**named, "object": "chat.completion.chunk", "choices": [choice], **more})

    try:
        yield chunk({"role": "assistant", "content": ""})
        while True:
            if event is None:
                yield f": {turn.done[0]} of {turn.done[1]} patches\n\n"
            elif isinstance(event, str):
                yield chunk({"content": event})
            else:
                yield chunk({}, event["finish_reason"], **{MODEL: event[MODEL]})
                if usage:
                    counted = {"object": "chat.completion.chunk", "choices": [], "usage": event["usage"]}
                    yield _word_event({**named, **counted})
                yield "data: [DONE]\n\n"
                return
            event = await turn.next(request, 1.0)
    except Refused as error:
        yield _word_event(error.body)
    except Gone:
        return
    finally:
        turn.stopped = True


def _word_event(value: Any) -> str:
    return f"data: {json.dumps(value)}\n\n"


# ---- the command


def read_flags(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="sparsewsi serve", description="Answer OpenAI's chat completions about the slides below a folder."
    )
    add = parser.add_argument
    add("root", type=Path, nargs="?", help="folder whose slides may be asked about; none: the phantom alone")
    add("--model", default=os.environ.get("SPARSEWSI_MODEL") or str(DEFAULT_MODEL), help="folder or hub repository")
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=8000)
    add("--key", default=os.environ.get("SPARSEWSI_KEY"), help="what callers must show; default $SPARSEWSI_KEY")
    add("--name", action="append", default=[], help="a name this machine is asked by, behind a proxy")
    add("--notice", action="store_true", help="put the notice under every answer, for clients that people read")
    add("--bare", action="store_true", help="tell the model's own words alone, for harnesses that compare them")
    add_reader_flags(parser)
    flags = parser.parse_args(argv)
    flags.reader = choose_reader(flags, os.environ)
    return flags


def main(argv: Sequence[str]) -> int:
    """Serve until interrupted; returns the exit status."""
    import uvicorn

    try:
        flags = read_flags(argv)
        if flags.key is not None and not re.fullmatch(r"[!-~]{8,}", flags.key):
            raise ValueError("The key must have at least 8 letters, digits or signs, and no spaces.")
        if flags.root is not None and not flags.root.is_dir():  # told before a model is loaded
            raise ValueError(f"There is no folder {flags.root}; pass one that holds slides.")
        from sparsewsi.model.sparse_wsi import SparseWSI

        private = flags.host in LOOPBACK
        reader = None if flags.reader is None else open_reader(flags.reader)
        model = SparseWSI.from_pretrained(flags.model)
        library = Library(model, flags.root, hosts=ANY if private else OPEN, reader=reader)
    except (ValueError, OSError, RuntimeError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    names = [*LOOPBACK, flags.host, *flags.name] if private else []
    models = list(dict.fromkeys([MODEL, name_model(flags.model)]))
    answers = Answers(library, flags.notice, flags.bare)
    print(f"Serving http://{flags.host}:{flags.port}/v1 (models: {', '.join(models)}).", flush=True)
    if reader is not None and reader.sends:
        print(reader.sends, flush=True)
    try:
        app = build_app(answers, models, flags.key, names)
        uvicorn.run(app, host=flags.host, port=flags.port, log_level="warning", access_log=False)
    finally:
        answers.close()
    return 0
