"""`sparsewsi serve`: OpenAI's client gets answers about a phantom; strangers stay below the root."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import uvicorn

from sparsewsi.model.limits import Limit, Limits
from sparsewsi.model.sparse_wsi import SparseWSI
from sparsewsi.phantom import write_phantom
from sparsewsi.slides.refusals import SlideError
from sparsewsi.web import completions
from sparsewsi.web.completions import Answers, Refused, build_app, read_request
from sparsewsi.web.library import Library

KEY = "a-key-of-the-tests"
QUESTION = "Which tissue is this?"
ASKED = [{"role": "user", "content": f"slide://one.tiff {QUESTION}"}]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two phantoms, beside one that is nobody's business."""
    folder = tmp_path_factory.mktemp("served")
    write_phantom(folder / "root" / "one.tiff", seed=3, size=1_200)
    write_phantom(folder / "root" / "other.tiff", seed=5, size=1_200)
    (folder / "root" / "deep er").mkdir()
    (folder / "root" / "deep er" / "two.tiff").write_bytes((folder / "root" / "one.tiff").read_bytes())
    (folder / "secret.tiff").write_bytes((folder / "root" / "one.tiff").read_bytes())
    (folder / "root" / "link.tiff").symlink_to(folder / "secret.tiff")
    (folder / "root" / "notes.txt").write_text("no slide")
    return folder / "root"


@pytest.fixture(scope="module")
def served_model(tiny_model: Path) -> SparseWSI:
    return SparseWSI.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def library(root, served_model) -> Library:
    return Library(served_model, root)


@dataclass
class Serving:
    base: str
    library: Library

    def ask(self, content: Any, **more: Any) -> httpx.Response:
        body = {"model": "sparsewsi", "messages": [{"role": "user", "content": content}], **more}
        return httpx.post(f"{self.base}/chat/completions", json=body, headers=self.headers, timeout=60, trust_env=False)

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def serving(library) -> Iterator[Serving]:
    """The server on a free port, as `sparsewsi serve` builds it."""
    answers = Answers(library)
    app = build_app(answers, ["sparsewsi", "demo"], KEY, ["127.0.0.1"])
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    yield Serving(f"http://127.0.0.1:{listening.getsockname()[1]}/v1", library)
    server.should_exit = True
    thread.join(10)
    answers.close()


def slide_part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


# ---- who asks


def test_the_openai_client_gets_an_answer_and_the_same_one_streamed(serving):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=serving.base, api_key=KEY, max_retries=0, http_client=httpx.Client(trust_env=False))
    assert [model.id for model in client.models.list()] == ["sparsewsi", "demo"]
    messages = [
        {"role": "user", "content": [slide_part("slide://one.tiff"), {"type": "text", "text": QUESTION}]},
    ]
    whole = client.chat.completions.create(model="sparsewsi", messages=messages, max_tokens=8)
    text = whole.choices[0].message.content
    assert text
    assert whole.usage.completion_tokens > 0
    assert whole.usage.prompt_tokens > serving.library.model.config.num_tokens
    extra = whole.model_extra["sparsewsi"]
    assert "not for diagnosis" in extra["notice"]
    assert len(extra["indices"]) == len(extra["coords"]) == serving.library.model.config.num_tokens
    options = {"include_usage": True}
    chunks = list(
        client.chat.completions.create(
            model="demo", messages=messages, max_tokens=8, stream=True, stream_options=options
        )
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] in ("stop", "length")
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    with pytest.raises(openai.BadRequestError, match="no such slide"):
        client.chat.completions.create(
            model="sparsewsi", messages=[{"role": "user", "content": f"slide://three.tiff {QUESTION}"}]
        )
    with pytest.raises(openai.AuthenticationError, match="key is wrong"):
        client.with_options(api_key="other").models.list()


def test_of_options_one_is_the_answer_and_all_have_probabilities(serving):
    options = ["liver", "colon mucosa", "fat"]
    found = serving.ask(f"slide://one.tiff\n{QUESTION}", options=options, evidence=True).json()
    probabilities = found["sparsewsi"]["probabilities"]
    assert sum(probabilities) == pytest.approx(1, abs=1e-5)
    assert options[probabilities.index(max(probabilities))] in found["choices"][0]["message"]["content"]
    assert len(found["sparsewsi"]["evidence"]["effects"]) == len(found["sparsewsi"]["indices"])


@pytest.fixture
def unsure(serving, monkeypatch) -> None:
    """The model says of itself that it is seldom right, and never sure enough."""
    kinds = (Limit("organ", (r"\borgan\b",), 21, 18, 0.44, 0.24, 0.68, least=1.0),)
    look = serving.library.open
    monkeypatch.setattr(serving.library, "open", lambda *asked: replace(look(*asked), limits=Limits(kinds)))


@pytest.mark.parametrize("more", [{}, {"options": ["liver", "colon"]}, {"evidence": True}])
def test_seen_a_bare_answer_whose_doubts_came_after_it(more, serving, unsure):
    asked = "slide://one.tiff Which organ is this?"
    whole = serving.ask(asked, **more).json()
    said = whole["choices"][0]["message"]["content"]
    assert said.startswith("Not sure")
    assert said.endswith(whole["sparsewsi"]["answer"].rstrip()) or "options" in more
    lines = serving.ask(asked, stream=True, **more).text.splitlines()
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    pieces = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(pieces) == said
    assert next(filter(None, pieces)).startswith("Not sure"), "the first word that is told is the doubt"


def test_a_harness_may_have_the_models_own_words_alone(root, served_model, unsure):
    flags = completions.read_flags(["--bare"])
    answers = Answers(Library(served_model, root), flags.notice, flags.bare)
    told = []
    turn = SimpleNamespace(look=lambda *_: None, tell=told.append)
    asked = read_request({"model": "sparsewsi", "messages": ASKED, "options": ["liver", "colon"]})
    known = answers._answer(turn, asked)  # type: ignore[arg-type]
    assert told == [known["sparsewsi"]["answer"]]
    answers.close()


def test_a_chat_goes_on_about_its_slide(serving):
    turns = [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": f"slide://deep%20er/two.tiff {QUESTION}"},
        {"role": "assistant", "content": "Liver."},
        {"role": "user", "content": "Is there fat?"},
    ]
    body = {"model": "sparsewsi", "messages": turns, "max_tokens": 2}
    answer = httpx.post(f"{serving.base}/chat/completions", json=body, headers=serving.headers, trust_env=False)
    assert answer.status_code == 200, answer.text


def test_lmms_evals_chat_model_gets_an_answer(serving):
    """Its own client of OpenAI-compatible servers, which sends text: the slide is named in it."""
    pytest.importorskip("openai")
    lmms = pytest.importorskip("lmms_eval.models.chat.openai", exc_type=ImportError)
    how = {"max_retries": 1, "timeout": 120, "httpx_trust_env": False}
    model = lmms.OpenAICompatible(model_version="sparsewsi", base_url=serving.base, api_key=KEY, **how)
    text = f"slide://one.tiff\n{QUESTION}\nA. liver\nB. fat"
    messages = [{"role": "user", "content": [{"type": "text", "text": text}]}]
    model.task_dict = {"slides": {"test": [text]}}
    request = registry_request((text, lambda _doc: messages, {"max_new_tokens": 8}, 0, "slides", "test"))
    (answer,) = model.generate_until([request])
    assert answer.text
    assert "FAILED" not in answer.text


def test_lmms_eval_finds_the_entry_point_and_gets_an_answer(tiny_model, root):
    registry = pytest.importorskip("lmms_eval.models.registry_v2", exc_type=ImportError)
    lmms = pytest.importorskip("sparsewsi.web.lmms", exc_type=ImportError)
    found = registry.ModelRegistryV2()
    found.register_manifest(lmms.describe())
    chat = found.get_model_class("sparsewsi")
    assert chat is lmms.SlideReader
    model = chat.create_from_arg_string(f"root={root},model={tiny_model}")
    messages = [
        {"role": "user", "content": [{"type": "image", "url": "slide://one.tiff"}, {"type": "text", "text": "?"}]}
    ]
    model.task_dict = {"slides": {"test": [None]}}
    request = registry_request(("", lambda _doc: messages, {"max_new_tokens": 4}, 0, "slides", "test"))
    assert len(model.generate_until([request, request])) == 2


def registry_request(arguments: tuple) -> Any:
    from lmms_eval.api.instance import Instance

    about = {"task": "slides", "doc_id": 0, "repeats": 1}
    return Instance(request_type="generate_until", arguments=arguments, idx=0, metadata=about)


# ---- what is refused


@pytest.mark.parametrize(
    "name",
    [
        "../secret.tiff",
        "..%2fsecret.tiff",
        "%2e%2e/secret.tiff",
        "deep%20er/../../secret.tiff",
        "link.tiff",
        "/etc/passwd",
        "//etc/passwd",
        "~/secret.tiff",
        ".",
        "",
        "nul%00l",
        "one.tiff/x",
        "x" * 5_000,
        "file:///etc/passwd",
        "http://127.0.0.1:1/HE.dzi",
        "https://169.254.169.254/HE.dzi",
        "dicomweb:https://localhost/x?study=1.2&series=1.3",
    ],
)
def test_nobody_leaves_the_root(serving, name):
    answer = serving.ask([slide_part(f"slide://{name}"), {"type": "text", "text": QUESTION}], max_tokens=1)
    assert answer.status_code == 400
    told = answer.json()["error"]["message"]
    assert len(told.splitlines()) == 1
    assert "secret" not in told
    assert str(serving.library._root) not in told


@pytest.mark.parametrize(
    ("change", "status", "said"),
    [
        ({"model": "gpt-4o"}, 404, "no model gpt-4o"),
        ({"n": 2}, 400, "One answer"),
        ({"tools": [{}]}, 400, "tools"),
        ({"logprobs": True}, 400, "logprobs"),
        ({"response_format": {"type": "json_object"}}, 400, "plain text"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": "many"}, 400, "max_tokens"),
        ({"options": "liver"}, 400, "options"),
        ({"options": ["x"] * 27}, 400, "26 options"),
        ({"slide_mpp": "large"}, 400, "slide_mpp"),
        ({"messages": []}, 400, "messages"),
        ({"messages": "hello"}, 400, "messages"),
        ({"messages": [{"role": "doctor", "content": "x"}]}, 400, "role"),
        ({"messages": [{"role": "user", "content": 3}]}, 400, "content"),
        ({"messages": [{"role": "user", "content": "no slide"}]}, 400, "Name a slide"),
        (
            {"messages": [{"role": "user", "content": " ".join(f"slide://{i}.svs" for i in range(13)) + " which?"}]},
            400,
            "at most 12 slides, and this would be 13",
        ),
        ({"messages": [{"role": "user", "content": "slide://one.tiff"}]}, 400, "question"),
        ({"messages": [{"role": "user", "content": "slide://one.tiff " + "x" * 3_000}]}, 400, "3,000"),
        ({"messages": [{"role": "system", "content": "x" * 9_000}, *ASKED]}, 400, "characters"),
        ({"messages": [{"role": "user", "content": [slide_part("data:image/png;base64,AA")]}]}, 400, "Pictures"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, 400, "input_audio"),
        ({"messages": [{"role": "user", "content": "slide://one.tiff \ud800?"}]}, 400, "surrogate"),
    ],
)
def test_a_request_at_fault_is_a_sentence_of_openais_shape(change, status, said):
    body = {"model": "sparsewsi", "messages": [{"role": "user", "content": "slide://one.tiff what?"}], **change}
    with pytest.raises(Refused, match=said) as told:
        read_request(body)
    assert told.value.status == status
    assert set(told.value.body["error"]) == {"message", "type", "param", "code"}


def test_what_is_no_request_is_told_so(serving):
    url = f"{serving.base}/chat/completions"
    with httpx.Client(headers=serving.headers, trust_env=False) as client:
        assert client.post(url, content=b"{").json()["error"]["message"] == "The request is not JSON."
        assert client.post(url, content=b"[" * 100_000).status_code == 400
        assert client.post(url, content=b"x" * (completions.MOST_ASKED + 1)).status_code == 413
        assert client.get(url).json()["error"]["type"] == "invalid_request_error"
        assert client.get(f"{serving.base}/files").status_code == 404
        assert client.get(f"{serving.base}/models/demo").json()["id"] == "demo"
        assert client.get(f"{serving.base}/models", headers={"Host": "evil.example"}).status_code == 421
        assert client.get(f"{serving.base}/models", headers={"Authorization": ""}).status_code == 401
    assert serving.ask(f"slide://notes.txt {QUESTION}").status_code == 400


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["/nowhere"], "There is no folder /nowhere"),
        (["--key", "short"], "at least 8"),
        (["--key", "with a space in it"], "at least 8"),
        (["--reader", "gpt"], "--reader"),
        (["--model", "/nowhere/model"], "model"),
    ],
)
def test_a_command_at_fault_is_a_sentence(words, said, capsys):
    assert completions.main(words) == 2
    told = capsys.readouterr().err
    assert said in told
    assert len(told.splitlines()) == 1


# ---- queue, and callers who leave


def test_who_is_gone_is_not_answered_and_the_next_one_is(serving, monkeypatch):
    began, stopped = threading.Event(), threading.Event()
    answer = completions.Case.answer

    def slow(self, reader, messages, options=()):
        if messages[-1]["content"] != "For ever?":
            yield from answer(self, reader, messages, options)
            return
        try:
            for _ in range(600):
                began.set()
                time.sleep(0.05)
                yield "more "
        finally:
            stopped.set()

    monkeypatch.setattr(completions.Case, "answer", slow)
    for stream in (True, False):
        began.clear()
        stopped.clear()
        body = {"model": "sparsewsi", "messages": [{"role": "user", "content": "slide://one.tiff For ever?"}]}
        address = serving.base.removeprefix("http://").removesuffix("/v1")
        host, port = address.split(":")
        data = json.dumps({**body, "stream": stream}).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: {address}\r\nAuthorization: Bearer {KEY}\r\n"
            f"Content-Length: {len(data)}\r\n\r\n"
        )
        with socket.create_connection((host, int(port))) as caller:
            caller.sendall(head.encode() + data)
            assert began.wait(20)
        assert stopped.wait(5), "nobody waits for it any more"
        assert serving.ask(f"slide://one.tiff {QUESTION}", max_tokens=1).status_code == 200


def test_too_many_who_wait_are_turned_away(library, monkeypatch):
    monkeypatch.setattr(completions, "MOST_WAITING", 2)
    held = threading.Event()

    async def put() -> None:
        answers = Answers(library)
        asked = read_request(
            {"model": "sparsewsi", "messages": [{"role": "user", "content": "slide://one.tiff what?"}]}
        )
        monkeypatch.setattr(answers, "_work", lambda *_: held.wait(10))
        answers.begin(asked)
        answers.begin(asked)
        with pytest.raises(Refused) as told:
            answers.begin(asked)
        assert told.value.status == 429
        held.set()
        answers.close()

    asyncio.run(put())


def test_the_slides_that_a_chat_names_are_one_case(serving):
    said = serving.ask("slide://one.tiff slide://other.tiff Which tissue?", options=["fat", "liver"], evidence=True)
    found = said.raise_for_status().json()["sparsewsi"]
    assert [slide["name"] for slide in found["slides"]] == ["phantom 3", "phantom 5"]
    assert sum(slide["num_patches"] for slide in found["slides"]) == found["num_patches"]
    first = found["slides"][0]["num_patches"]
    assert found["slide_numbers"] == [1 if index < first else 2 for index in found["indices"]]
    for (x, y), number in zip(found["coords"], found["slide_numbers"]):
        width, height = found["slides"][number - 1]["size"]
        assert 0 <= x < width
        assert 0 <= y < height, "on its own slide"
    twice = serving.ask("slide://one.tiff slide://deep%20er/two.tiff which?")
    assert twice.status_code == 400
    assert "Phantom 3 is named twice" in twice.json()["error"]["message"]


def test_selections_are_kept_while_they_fit(root, served_model):
    library = Library(served_model, root, kept_bytes=1)
    first = library.open([("one.tiff", None)])
    assert library.open([("one.tiff", None)]) is first
    library.open([("deep er/two.tiff", None)])
    assert len(library._cases) == 1
    assert library.open([("one.tiff", None)]) is not first
    with pytest.raises(SlideError):
        Library(served_model, None).open([("one.tiff", None)])
