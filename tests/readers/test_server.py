"""openai: a server is asked with pictures and a question alone; what goes wrong is waited for, or is one sentence."""

import base64
import io
import json
import time
from email.utils import formatdate

import pytest
from PIL import Image

from sparsewsi.readers.pictures import PictureReader, ReaderError, Refused
from sparsewsi.readers.server import ServerReader, check_endpoint, check_key, is_loopback, name_host

ASKED = [{"role": "user", "content": "Which tissue is this?"}]
KEY = "sk-secret-0123"


@pytest.fixture
def reader(stand_in_server) -> ServerReader:
    return ServerReader("a-model", stand_in_server.endpoint, KEY, overview=True, first_wait=0.01)


def read(reader: PictureReader, pictures, messages=ASKED) -> str:
    return "".join(reader.answer(pictures, messages))


def test_an_answer_streams_piece_by_piece(stand_in_server, reader, pictures):
    stand_in_server.say("It is ", "fat", ", see Patch 5.")
    assert list(reader.answer(pictures, ASKED)) == ["It is ", "fat", ", see Patch 5."]


def test_what_is_sent_byte_for_byte(stand_in_server, reader, pictures):
    """The question, and pictures of px alone, best first, each with its number: nothing else."""
    stand_in_server.say("fat")
    read(reader, pictures, [*ASKED, {"role": "assistant", "content": "Fat."}, {"role": "user", "content": "Sure?"}])
    ((path, headers, body),) = stand_in_server.received
    assert path == "/v1/chat/completions"
    assert set(headers) == {
        *("Host", "Accept", "Accept-Encoding", "Connection", "User-Agent", "Authorization"),
        *("Content-Length", "Content-Type"),
    }
    sent = json.loads(body)
    first, *others = sent.pop("messages")
    assert sent == {"model": "a-model", "temperature": 0, "max_tokens": 512, "stream": True}
    assert others == [{"role": "assistant", "content": "Fat."}, {"role": "user", "content": "Sure?"}]
    texts = [part["text"] for part in first["content"] if part["type"] == "text"]
    assert texts == [
        "An overview of a whole-slide image:",
        "3 patches of one whole-slide image, each 28 µm wide. Name a patch that an answer rests on by its number, "
        "as in: Patch 1.",
        "Patch 1:",
        "Patch 5:",
        "Patch 9:",
        "Which tissue is this?",
    ]
    files = [
        base64.b64decode(part["image_url"]["url"].removeprefix("data:image/jpeg;base64,"))
        for part in first["content"]
        if part["type"] == "image_url"
    ]
    assert len(files) == 4
    for file, wanted in zip(files, (pictures.overview, *reversed(pictures.patches))):
        image = Image.open(io.BytesIO(file))
        assert (image.format, image.size) == ("JPEG", wanted.shape[1::-1])
        assert not image.getexif()
        assert set(image.info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}, "no EXIF, ICC, comment, XMP"
        assert {marker for marker, _ in image.applist} == {"APP0"}  # type: ignore[attr-defined]


def test_where_it_goes_is_told_before(reader, pictures):
    assert reader.sends.startswith("Each question sends the kept patches as pictures, an overview of the slide and the")
    assert "the server at 127.0.0.1:" in reader.sends
    far = ServerReader("m", "https://models.example.org/v1", images_per_call=8)
    assert far.sends.startswith(
        "Each question sends the best 8 kept patches as pictures and the text of the chat to mod"
    )
    assert "models.example.org" in far.sends
    assert name_host(check_endpoint("http://models.example.org/v1")) == "models.example.org (unencrypted)"


def test_only_the_best_are_sent_where_it_takes_few(stand_in_server, pictures):
    stand_in_server.say("fat")
    read(ServerReader("m", stand_in_server.endpoint, images_per_call=1), pictures)
    ((_, headers, body),) = stand_in_server.received
    content = json.loads(body)["messages"][0]["content"]
    assert [part["text"] for part in content if part.get("text", "").startswith("Patch ")] == ["Patch 1:"]
    assert "Authorization" not in headers


def test_a_rate_limit_is_waited_for_as_long_as_it_says(stand_in_server, reader, pictures):
    stand_in_server.fail(429, "slow down", Retry_After="0.3")
    stand_in_server.fail(429, "slow down", Retry_After=formatdate(time.time() - 5, usegmt=True))
    stand_in_server.fail(503)
    stand_in_server.say("fat")
    begin = time.monotonic()
    pieces = list(reader.answer(pictures, ASKED))
    assert time.monotonic() - begin >= 0.3
    assert "".join(pieces) == "fat"
    assert pieces[0] == "", "whoever listens is woken while it waits, so that it can be stopped"
    bodies = {body for _, _, body in stand_in_server.received}
    assert len(stand_in_server.received) == 4
    assert len(bodies) == 1, "the same question each time"


def test_a_limit_of_an_hour_is_told_not_waited_for(stand_in_server, reader, pictures):
    stand_in_server.fail(429, "quota", Retry_After="3600")
    with pytest.raises(ReaderError, match=r"is busy and asks to wait 3600 s"):
        read(reader, pictures)


def test_a_server_that_stays_busy_is_given_up(stand_in_server, reader, pictures):
    for _ in range(5):
        stand_in_server.fail(429, "busy")
    with pytest.raises(ReaderError, match=r"HTTP 429: busy\), 5 times"):
        read(reader, pictures)
    assert len(stand_in_server.received) == 5


def test_a_stream_that_drops_before_its_first_word_is_asked_again(stand_in_server, reader, pictures):
    stand_in_server.say(end=None)
    stand_in_server.say("fat")
    assert read(reader, pictures) == "fat"


def test_a_stream_that_drops_later_is_no_answer(stand_in_server, reader, pictures):
    """Half an answer may say the opposite of the whole."""
    stand_in_server.say("There is no ", end=None)
    pieces = []
    with pytest.raises(ReaderError, match=r"broke off the answer of openai:a-model: what stands is not whole"):
        pieces.extend(reader.answer(pictures, ASKED))
    assert len(stand_in_server.received) == 1


def test_a_refusal_is_told_apart_from_an_answer(stand_in_server, reader, pictures):
    stand_in_server.say(refusal="I cannot help with that.")
    with pytest.raises(Refused, match=r"openai:a-model refused to answer: I cannot help with that"):
        read(reader, pictures)
    stand_in_server.say("It", end="content_filter")
    with pytest.raises(Refused, match=r"withheld the answer"):
        read(reader, pictures)


@pytest.mark.parametrize(
    ("status", "message", "sentence"),
    [
        (401, f"Incorrect API key provided: {KEY}", r"refused access to a-model. The key in OPENAI_API_KEY is not acc"),
        (404, "no such model", r"has no model a-model, .*: no such model. SPARSEWSI_ENDPOINT mostly"),
        (400, "too many images", r"does not take the question \(HTTP 400: too many images\)"),
        (307, "", r"sends elsewhere, which is not followed"),
    ],
)
def test_an_error_is_one_sentence_without_the_key(stand_in_server, reader, pictures, status, message, sentence):
    stand_in_server.fail(status, message, Location="http://127.0.0.2:1/v1")
    with pytest.raises(ReaderError, match=sentence) as told:
        read(reader, pictures)
    assert KEY not in str(told.value)
    assert len(str(told.value).splitlines()) == 1
    assert len(stand_in_server.received) == 1


def test_settings_that_a_model_does_not_take_are_left_out(stand_in_server, reader, pictures):
    stand_in_server.fail(400, "Unsupported parameter: 'max_tokens' is not supported. Use 'max_completion_tokens'.")
    stand_in_server.fail(400, "Unsupported value: 'temperature' does not support 0 with this model.")
    stand_in_server.say("fat")
    assert read(reader, pictures) == "fat"
    sent = json.loads(stand_in_server.received[-1][2])
    sent.pop("messages")
    assert sent == {"model": "a-model", "max_completion_tokens": 512, "stream": True}


def test_a_server_that_is_not_there_is_a_sentence(stand_in_server, pictures):
    endpoint = stand_in_server.endpoint
    stand_in_server.close()
    with pytest.raises(ReaderError, match=r"cannot be reached .* Check SPARSEWSI_ENDPOINT"):
        read(ServerReader("m", endpoint, first_wait=0.01), pictures)


def test_stopping_closes_the_connection(stand_in_server, reader, pictures):
    stand_in_server.say("one ", "two ", "three")
    pieces = reader.answer(pictures, ASKED)
    assert next(pieces) == "one "
    pieces.close()  # type: ignore[attr-defined]
    assert list(pieces) == []


def test_nothing_of_a_server_is_measured(reader, pictures):
    assert not reader.likelihoods
    with pytest.raises(ReaderError, match=r"gives no likelihoods"):
        reader.option_probs(pictures, "Which?", ["fat", "liver"])


@pytest.mark.parametrize(
    "endpoint",
    ["", "api.openai.com/v1", "ftp://h/v1", "https://me:pw@h/v1", "http://h/v1/chat/completions", "http://h/v1?key=1"],
)
def test_an_endpoint_that_is_none_is_refused_in_words(endpoint):
    with pytest.raises(ReaderError, match=r"^SPARSEWSI_ENDPOINT ") as told:
        check_endpoint(endpoint)
    assert "pw" not in str(told.value)


def test_a_key_with_a_line_break_is_refused_without_being_told():
    with pytest.raises(ReaderError, match=r"OPENAI_API_KEY holds spaces") as told:
        check_key("sk-a\nX-Header: b")
    assert "sk-a" not in str(told.value)


def test_this_machine_is_known_by_its_name():
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "localhost")))
    assert not any(map(is_loopback, ("localhost.example.org", "10.0.0.1", "0.0.0.0", "example.org")))
