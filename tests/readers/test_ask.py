"""sparsewsi ask --reader: another reader answers, and page, files and what is sent say so."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sparsewsi.__main__ import main
from sparsewsi.bags.bag import save_bag
from sparsewsi.bags.extract import extract_bag
from sparsewsi.phantom import write_phantom
from sparsewsi.slides.slide import open_slide

NAME = "SMITH_JOHN_1954-03-02"
OPTIONS = ["--question", "Which tissue?", "--option", "fat", "--option", "liver"]


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A phantom in a file that is named after somebody, as they are."""
    path = tmp_path_factory.mktemp("ward-7") / f"{NAME}.tiff"
    write_phantom(path, seed=3, size=1024)
    return path


@pytest.fixture
def server(stand_in_server, monkeypatch):
    monkeypatch.setenv("SPARSEWSI_ENDPOINT", stand_in_server.endpoint)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-0123")
    return stand_in_server


def ask(slide: Path, tiny_model: Path, out: Path, *words: str) -> int:
    return main(["ask", str(slide), "--model", str(tiny_model), "--out", str(out), *words])


def test_a_server_reads_the_kept_patches_and_the_files_say_so(server, slide, tiny_model, tmp_path, capsys):
    server.say("Fat: see Patch 2", " and Patch 1, not Patch 40.")
    assert ask(slide, tiny_model, tmp_path, "--reader", "openai:a-model", "--evidence", *OPTIONS) == 0
    said = capsys.readouterr().out
    told = "Each question sends the kept patches as pictures and the text of the chat to the server at 127.0.0.1:"
    assert said.index("Read by openai:a-model") < said.index(told) < said.index("Q: Which tissue?")
    assert "Cited by the reader, not measured: #2, #1." in said
    assert "openai:a-model gives no likelihoods, so what this answer rests on is not measured." in said

    record = json.loads((tmp_path / "selection.json").read_text())
    (answer,) = record["answers"]
    assert answer["reader"] == "openai:a-model"
    assert (answer["cited"], answer["probs"], answer["effects"]) == ([2, 1], [], [])
    page = (tmp_path / "report.html").read_text()
    assert "Read by openai:a-model, from pictures of the patches. Each question sends" in page
    assert 'Cited by the reader, not measured: <a href="#patch-2">#2</a> · <a href="#patch-1">#1</a>.' in page

    ((path, headers, body),) = server.received
    wire = f"{path}{headers}{body!r}"
    for secret in (NAME, "SMITH", str(slide.parent), slide.parent.name, str(tmp_path), "phantom"):
        assert secret not in wire
    content = json.loads(body)["messages"][0]["content"]
    shown = [part for part in content if part["type"] == "image_url"]
    numbers = [part["text"] for part in content if part.get("text", "").startswith("Patch ")]
    assert numbers == [f"Patch {rank}:" for rank in range(1, 7)]
    places = dict(zip(record["selection"]["ranks"], record["selection"]["coords"]))
    with open_slide(slide) as opened:
        for rank, part in enumerate(shown, 1):
            sent = Image.open(io.BytesIO(base64.b64decode(part["image_url"]["url"].partition(",")[2])))
            wanted = opened.read(tuple(places[rank]), sent.size, 0.5)
            assert sent.size == (224, 224)
            assert np.abs(np.asarray(sent).astype(int) - wanted).mean() < 6, "the patch of this number"


def test_a_server_is_asked_again_without_a_focus_on_request(server, slide, tiny_model, tmp_path, capsys):
    server.say("Fat.")
    server.say("Liver.")
    words = ["--reader", "openai:m", "--question", "Which tissue?", "--without", "2,#5"]
    assert ask(slide, tiny_model, tmp_path, *words) == 0
    said = capsys.readouterr().out
    assert "Asked again without #2, #5 (one more request, 4 pictures, 0." in said
    assert said.index("A: Fat.") < said.index("Asked again") < said.index("A: Liver.")
    bodies = [json.loads(body)["messages"][0]["content"] for _, _, body in server.received]
    numbers = [[part["text"] for part in body if part.get("text", "").startswith("Patch ")] for body in bodies]
    assert numbers[1] == ["Patch 1:", "Patch 3:", "Patch 4:", "Patch 6:"]
    asked = [answer["question"] for answer in json.loads((tmp_path / "selection.json").read_text())["answers"]]
    assert asked == ["Which tissue?", "Which tissue? (without #2, #5)"]
    assert ask(slide, tiny_model, tmp_path, "--without", "two") == 2
    assert "numbers of patches with commas between" in capsys.readouterr().err


def test_answers_given_before_a_failure_are_written(server, slide, tiny_model, tmp_path, capsys):
    server.say("Fat.")
    server.fail(400, "no")
    words = ["--reader", "openai:m", "--question", "One?", "--question", "Two?", "--reader-images", "2"]
    assert ask(slide, tiny_model, tmp_path, *words) == 2
    assert "does not take the question (HTTP 400: no)" in capsys.readouterr().err
    record = json.loads((tmp_path / "selection.json").read_text())
    assert [answer["text"] for answer in record["answers"]] == ["Fat."]


def test_a_local_model_reads_and_is_measured(slide, tiny_model, tiny_llava, tmp_path, capsys):
    words = ["--reader", f"hf:{tiny_llava}", "--evidence", "--k", "2", *OPTIONS]
    assert ask(slide, tiny_model, tmp_path, *words) == 0
    (answer,) = json.loads((tmp_path / "selection.json").read_text())["answers"]
    assert (answer["reader"], answer["sent"]) == ("hf:tiny-llava", "")
    assert sum(answer["probs"]) == pytest.approx(1)
    assert len(answer["effects"]) == 2
    assert answer["evidence"]
    capsys.readouterr()


def test_what_cannot_be_read_is_refused_before_anything_is_loaded(
    stand_in_server, slide, tiny_model, tmp_path, monkeypatch, capsys
):
    monkeypatch.delenv("SPARSEWSI_ENDPOINT", raising=False)
    assert ask(slide, tiny_model, tmp_path, "--reader", "openai:m") == 2
    assert "openai:m needs a server: set SPARSEWSI_ENDPOINT" in capsys.readouterr().err
    assert ask(slide, tiny_model, tmp_path, "--reader-images", "2") == 2
    assert "belong to a --reader" in capsys.readouterr().err
    monkeypatch.setenv("SPARSEWSI_ENDPOINT", stand_in_server.endpoint)
    save_bag(extract_bag(slide, "efficientnet-lite0", max_patches=4), tmp_path / "bag.safetensors")
    assert ask(tmp_path / "bag.safetensors", tiny_model, tmp_path, "--reader", "openai:m") == 2
    assert "features are none" in capsys.readouterr().err
    assert not stand_in_server.received
