"""sparsewsi doctor: what it says is what the data says, and without a network it says so at once."""

import re
import time
from pathlib import Path

import pytest

from sparsewsi import doctor
from sparsewsi.__main__ import main
from sparsewsi.bags import vit
from sparsewsi.bags.encoders import ENCODERS
from sparsewsi.presets import PRESETS
from train import convert, run

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("file", "table"),
    [("data.md", doctor.list_encoders), ("readers.md", doctor.list_presets)],
    ids=["encoders", "presets"],
)
def test_the_tables_of_the_documents_are_the_data(file, table):
    assert doctor.lay_out(*table(), markdown=True) in (ROOT / "docs" / file).read_text(encoding="utf-8")


@pytest.mark.parametrize("command", [command for preset in PRESETS.values() for command in preset.run])
def test_the_commands_of_the_presets_are_taken(command, tmp_path, monkeypatch, capsys):
    """Each is run where its files are not: it speaks of these, not of its words; nothing is fetched or trained."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", command.removeprefix("python -m ").split())
    words, asked = command.removeprefix("python -m ").split()[1:], []
    monkeypatch.setattr("train.run.train", asked.append)
    if command.startswith("python -m train.run "):
        run.main()
        [config] = asked
        assert (config.stage, config.features) == (1 + ("own-stage2" in command), "features")
        assert config.num_tokens == 32
    elif command.startswith("python -m train.convert "):
        with pytest.raises(ValueError, match="FOLDER is not a folder"):
            convert.main()
    else:
        assert main(words) == 2
        said = capsys.readouterr().err
        assert len(said.strip().splitlines()) == 1
        assert re.search(r"no file at the path given|no model folder|slides", said)


def test_every_preset_names_an_encoder_and_what_it_needs():
    for preset in PRESETS.values():
        row = ENCODERS[preset.encoder]
        assert preset.mpp == row.mpp
        assert all(source.count("/") == 1 for source in preset.source)
        assert set(doctor.weights_of(preset)) == {*preset.source, *([row.source] if row.on_hub else [])}
        assert doctor.memory_of(preset) * 1e9 > 2 * (preset.parameters + row.parameters)


def test_a_row_counts_the_network_that_is_built():
    pytest.importorskip("timm")
    import torch

    for name, spec in vit.HUB_VITS.items():
        with torch.device("meta"):
            network = vit.build_vit(name, spec)
        assert sum(weight.numel() for weight in network.parameters()) == ENCODERS[name].parameters, name


def test_without_a_network_the_hub_is_asked_once_and_not_for_long(monkeypatch, capsys):
    asked = []

    def never(*args, **kwargs):
        asked.append(args)
        time.sleep(3)
        raise OSError

    monkeypatch.setattr(doctor, "PATIENCE", 0.2)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("urllib.request.urlopen", never)
    monkeypatch.setattr(doctor, "is_cached", lambda repo: repo == "Qwen/Qwen3-4B-Instruct-2507")
    began = time.monotonic()
    assert doctor.probe_hub() == "no answer in 0.2 s"
    assert time.monotonic() - began < 2.5
    assert main(["doctor"]) == 0
    assert len(asked) == 2
    said = capsys.readouterr().out
    assert re.search(r"Qwen/Qwen3-4B-Instruct-2507 +cached", said)
    assert re.search(r"MahmoodLab/CONCH +not cached", said)
    assert "hub cannot be reached (no answer in 0.2 s)" in said


def test_a_gate_is_told_with_the_way_in(monkeypatch, capsys):
    from huggingface_hub.errors import GatedRepoError

    def refuse(self, repo, **kwargs):
        error = GatedRepoError.__new__(GatedRepoError)
        Exception.__init__(error, "401 Client Error")
        raise error

    monkeypatch.setattr(doctor, "probe_hub", lambda: "")
    monkeypatch.setattr("huggingface_hub.HfApi.auth_check", refuse)
    assert main(["doctor", "--preset", "medgemma"]) == 0
    said = capsys.readouterr().out
    assert "gated: accept the terms at https://huggingface.co/google/medgemma-1.5-4b-it, then hf auth login" in said
    assert "--reader hf:google/medgemma-1.5-4b-it" in said


def test_an_unknown_preset_names_those_there_are(capsys):
    with pytest.raises(SystemExit):
        main(["doctor", "--preset", "gpt"])
    assert "demo" in capsys.readouterr().err
