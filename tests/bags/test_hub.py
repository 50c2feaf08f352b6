"""Weights that cannot be had are a sentence with the way to them."""

import urllib.error

import pytest
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError

from sparsewsi.bags import hub
from sparsewsi.bags.encoders import load_encoder
from sparsewsi.bags.hub import fetch_file


def test_no_network_is_said_at_once(monkeypatch):
    def unreachable(*args, **kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args, **kwargs: None)
    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(ValueError, match=r"cannot be reached .*Name or service not known"):
        load_encoder("hf:owkin/phikon")
    with pytest.raises(ValueError, match=r"MahmoodLab/UNI.* cannot be reached"):
        fetch_file("uni", "MahmoodLab/UNI", "pytorch_model.bin")


def test_a_gated_model_names_the_way_in(monkeypatch):
    def refuse(*args, **kwargs):
        error = GatedRepoError.__new__(GatedRepoError)
        Exception.__init__(error, "401 Client Error")
        raise error

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args, **kwargs: None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    monkeypatch.setattr(hub, "require_hub", lambda name, repo: None)
    with pytest.raises(ValueError, match=r"conch is gated: accept its terms at .*MahmoodLab/CONCH.*hf auth login"):
        fetch_file("conch", "MahmoodLab/CONCH", "pytorch_model.bin")


def test_the_first_file_that_a_repository_has_is_taken(monkeypatch, tmp_path):
    def download(repo, file):
        if file != "model.safetensors":
            error = EntryNotFoundError.__new__(EntryNotFoundError)
            Exception.__init__(error, f"404 Client Error: {file}")
            raise error
        return str(tmp_path / file)

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args, **kwargs: None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr(hub, "require_hub", lambda name, repo: None)
    files = ("pytorch_model.bin", "model.safetensors")
    assert fetch_file("keep", "Astaxanthin/KEEP", *files) == tmp_path / "model.safetensors"
    with pytest.raises(ValueError, match="keep"):
        fetch_file("keep", "Astaxanthin/KEEP", files[0])
