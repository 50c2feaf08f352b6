"""A reader behind an OpenAI-compatible server (chat completions, streamed): vLLM, TGI, llama.cpp, OpenAI, ..."""

import base64
import email.utils
import ipaddress
import json
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any

import httpx

from sparsewsi.readers.pictures import ANSWER_TOKENS, Part, PictureReader, ReaderError, Refused, Turns, encode_jpeg

TRIES = 5  # of one request, until its answer begins
LONGEST_WAIT = 60.0  # s, between two of them
TIMEOUT = httpx.Timeout(10, read=300, write=120)  # s; a large model thinks for minutes before its first word
COUNTED = ("prompt_tokens", "completion_tokens")
BUSY = (408, 409, 425, 429, 500, 502, 503, 504, 529)
# Settings that some models take under another name, or not at all: tried again without once the server names one.
RENAMED = {"max_tokens": "max_completion_tokens", "temperature": None, "stream_options": None, "stream": None}


class ServerReader(PictureReader):
    """A model of an OpenAI-compatible server. It gives no likelihoods, so that nothing of it can be measured.

    endpoint: base URL, mostly ending in /v1
    key:      sent to this host alone; None: none
    count:    ask for the number of tokens
    """

    def __init__(
        self,
        model: str,
        endpoint: str,
        key: str | None = None,
        images_per_call: int | None = None,
        overview: bool = False,
        first_wait: float = 1.0,
        count: bool = False,
    ):
        url = check_endpoint(endpoint)
        self.name, self.model, self.first_wait, self.count = f"openai:{model}", model, first_wait, count
        self.images_per_call, self.overview = images_per_call, overview
        self.host = name_host(url)
        self._url = f"{str(url).rstrip('/')}/chat/completions"
        self._headers = {"Authorization": f"Bearer {check_key(key)}"} if key else {}
        self._local = is_loopback(url.host)

    def stream(self, turns: Turns) -> Iterator[str]:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": role, "content": _word(parts)} for role, parts in turns],
            "temperature": 0,
            "max_tokens": ANSWER_TOKENS,
            "stream": True,
        }
        self.tokens, self.request = None, _weigh(body["messages"])
        if self.count:
            body["stream_options"] = {"include_usage": True}
        # A proxy named by the environment is for other machines; redirects are not followed, the key would go along.
        with httpx.Client(timeout=TIMEOUT, headers=self._headers, trust_env=not self._local) as client:
            for number in range(TRIES):
                wait = self.first_wait * 2**number
                try:
                    with client.stream("POST", self._url, json=body) as response:
                        if response.status_code == 200:
                            yield from self._read(response)
                            return
                        told = _read_error(response)
                        if response.status_code == 400 and _give_way(body, told):
                            continue
                        if response.status_code not in BUSY or number == TRIES - 1:
                            raise self._explain(response, told)
                        wait = _read_wait(response.headers.get("retry-after"), wait)
                except _Silent as silent:  # the stream broke off before the first word
                    if number == TRIES - 1:
                        raise ReaderError(f"{self.host} broke off the answer before its first word: {silent}") from None
                except httpx.TransportError as error:
                    if number == TRIES - 1 or isinstance(error, httpx.UnsupportedProtocol):
                        raise ReaderError(
                            f"{self.host} cannot be reached ({_first_line(error)}). Check SPARSEWSI_ENDPOINT and that "
                            "the server runs."
                        ) from None
                if wait > LONGEST_WAIT:
                    raise ReaderError(
                        f"{self.host} is busy and asks to wait {wait:.0f} s ({self.name}). Ask again then."
                    )
                yield from _wait(wait)
        raise ReaderError(f"{self.host} takes none of the settings that it was asked with ({self.name}).")

    def _read(self, response: httpx.Response) -> Iterator[str]:
        """The text of a streamed answer, or of one in one piece. Raises ReaderError if it is not whole."""
        said, whole = False, False
        try:
            for choice in _choices(response):
                if "usage" in choice:
                    self.tokens = choice["usage"]
                    continue
                part = choice.get("delta") or choice.get("message") or {}
                if part.get("refusal"):
                    raise Refused(f"{self.name} refused to answer: {_quote(part['refusal'])}")
                if part.get("content"):
                    said = True
                    yield part["content"]
                if choice.get("finish_reason") == "content_filter":
                    raise Refused(f"{self.host} withheld the answer of {self.name} (its content filter).")
                whole |= bool(choice.get("finish_reason"))
        except httpx.TransportError as error:
            if not said:
                raise _Silent(_first_line(error)) from None
            raise self._broken() from None
        if not whole:
            if not said:
                raise _Silent("the connection was closed.")
            raise self._broken()
        if not said:
            raise ReaderError(f"{self.name} gave an answer without text. Ask again, or choose another model.")

    def _broken(self) -> ReaderError:
        return ReaderError(f"{self.host} broke off the answer of {self.name}: what stands is not whole. Ask again.")

    def _explain(self, response: httpx.Response, told: str) -> ReaderError:
        """The sentence for an answer that is none."""
        status = response.status_code
        if status in (401, 403):  # servers quote keys in their own words
            sent = (
                "The key in OPENAI_API_KEY is not accepted" if self._headers else "A key is needed: set OPENAI_API_KEY"
            )
            return ReaderError(f"{self.host} refused access to {self.model}. {sent}.")
        if status in (301, 302, 307, 308):
            return ReaderError(
                f"{self.host} sends elsewhere, which is not followed. Set SPARSEWSI_ENDPOINT to that place."
            )
        if status == 404:
            return ReaderError(
                f"{self.host} has no model {self.model}, or no chat completions there{told}. SPARSEWSI_ENDPOINT mostly "
                "ends in /v1."
            )
        if status in BUSY:
            return ReaderError(f"{self.host} is busy or failing (HTTP {status}{told}), {TRIES} times. Ask again later.")
        return ReaderError(f"{self.host} does not take the question (HTTP {status}{told}).")


class _Silent(Exception):
    """A stream that broke off before its first word, so that it may be asked again unnoticed."""


def check_endpoint(endpoint: str) -> httpx.URL:
    """The base URL of a server. Raises ReaderError for anything else, and for one that holds a password."""
    try:
        url = httpx.URL(endpoint.strip())
    except (httpx.InvalidURL, ValueError):
        url = httpx.URL("")
    if url.scheme not in ("http", "https") or not url.host or url.query or url.fragment:
        raise ReaderError("SPARSEWSI_ENDPOINT must be a server's base URL, as in https://api.openai.com/v1.")
    if url.userinfo:
        raise ReaderError("SPARSEWSI_ENDPOINT holds a name or password. Put the key into OPENAI_API_KEY.")
    if url.path.rstrip("/").endswith("/chat/completions"):
        raise ReaderError("SPARSEWSI_ENDPOINT must end before /chat/completions, mostly in /v1.")
    return url


def check_key(key: str) -> str:
    """A key as a header can carry it; the sentence never holds it."""
    if not re.fullmatch(r"[!-~]+", key.strip()):
        raise ReaderError("The key in OPENAI_API_KEY holds spaces or signs that no key has. Copy it again.")
    return key.strip()


def name_host(url: httpx.URL) -> str:
    """Where pictures and questions go, for people."""
    place = url.host if url.port is None else f"{url.host}:{url.port}"
    if is_loopback(url.host):
        return f"the server at {place} on this machine"
    return place if url.scheme == "https" else f"{place} (unencrypted)"


def is_loopback(host: str) -> bool:
    """Whether a host is this machine by its name alone; nothing is looked up."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _word(parts: Sequence[Part]) -> Any:
    """The content of a message: text, or a list where it holds pictures."""
    if all(isinstance(part, str) for part in parts):
        return "\n".join(str(part) for part in parts)
    return [{"type": "text", "text": part} if isinstance(part, str) else _picture(part) for part in parts]


def _weigh(messages: Sequence[dict[str, Any]]) -> tuple[int, int]:
    """How many pictures messages hold, and their bytes on the wire."""
    parts = [part for message in messages for part in message["content"] if isinstance(part, dict)]
    return sum(part["type"] == "image_url" for part in parts), len(json.dumps(messages))


def _picture(picture: Any) -> dict[str, Any]:
    data = base64.b64encode(encode_jpeg(picture)).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}}


def _choices(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """The first choice of every event of a stream, or of an answer in one piece; what is no choice is passed over."""
    if "json" in response.headers.get("content-type", ""):
        response.read()
        lines: Iterator[str] = iter([f"data: {response.text}"])
    else:
        lines = response.iter_lines()
    for line in lines:
        if not line.startswith("data:"):
            continue  # a comment that keeps the connection open, or the name of an event
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            yield {"finish_reason": "done"}
            return
        try:
            event = json.loads(data)
        except ValueError:
            raise ReaderError("The server's answer cannot be read: it is not JSON.") from None
        if not isinstance(event, dict):
            continue
        if event.get("error"):
            raise ReaderError(f"The server broke off{_say(event)}.")
        usage = event.get("usage")
        if isinstance(usage, dict) and all(isinstance(usage.get(name), int) for name in COUNTED):
            yield {"usage": tuple(usage[name] for name in COUNTED)}
        choices = event.get("choices")
        if isinstance(choices, list) and choices and isinstance(choices[0], dict):
            yield choices[0]


def _read_error(response: httpx.Response) -> str:
    """': what the server says', shortened, or ''."""
    try:
        response.read()
        return _say(response.json())
    except (ValueError, httpx.HTTPError):
        return ""


def _say(event: Any) -> str:
    error = event.get("error", event) if isinstance(event, dict) else event
    text = error.get("message") or error.get("detail") if isinstance(error, dict) else error
    return f": {_quote(text)}" if isinstance(text, str) and text.strip() else ""


def _quote(text: Any) -> str:
    words = " ".join(str(text).split()).rstrip(".")
    return words if len(words) <= 200 else f"{words[:200]} ..."


def _give_way(body: dict[str, Any], told: str) -> bool:
    """Rename or drop the setting that a server's sentence names; False if it names none that can be spared."""
    for name, other in RENAMED.items():
        if name in body and re.search(rf"\b{name}\b", told):
            value = body.pop(name)
            if other is not None:
                body[other] = value
            return True
    return False


def _read_wait(header: str | None, otherwise: float) -> float:
    """Seconds that a Retry-After header asks for: a number, or a date."""
    if not header:
        return otherwise
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, TypeError):
        return otherwise


def _wait(seconds: float) -> Iterator[str]:
    """Wait, in steps of a second, so that whoever listens can stop."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        yield ""
        time.sleep(min(1.0, left))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
