"""config.json says everything a model needs, and nothing that the code does not know."""

import json
from typing import Any

import pytest

from sparsewsi.model.config import SparseWSIConfig


def test_a_saved_config_is_read_back_equal(tmp_path) -> None:
    config = SparseWSIConfig(
        llm="owner/model", llm_revision="abc", dim=256, scorer_dim=64, position="compact", demo=True, note="µm"
    )
    config.save(tmp_path / "model")
    assert SparseWSIConfig.load(tmp_path / "model") == config


def test_missing_keys_take_their_defaults(tmp_path) -> None:
    (tmp_path / "config.json").write_text('{"dim": 128}')
    assert SparseWSIConfig.load(tmp_path) == SparseWSIConfig(dim=128)


def test_unknown_keys_are_named(tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"dim": 128, "denoiser": True, "tau": 1.0}))
    with pytest.raises(ValueError, match="denoiser, tau"):
        SparseWSIConfig.load(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "3"])
def test_a_broken_file_is_an_error_in_words(tmp_path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json"):
        SparseWSIConfig.load(tmp_path)
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        SparseWSIConfig.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("slide_encoder", "mamba"),
        ("scorer_attention", "sparse"),
        ("position", "absolute"),
        ("option_scoring", "vote"),
        ("num_tokens", 0),
        ("num_tokens", 3.5),
        ("feature_dim", True),
        ("max_position", 0),
        ("slide_encoder_layers", -1),
        ("mpp", 0.0),
        ("mpp", "half"),
        ("mpp", float("inf")),
        ("llm", None),
        ("encoder", 5),
        ("demo", "yes"),
    ],
)
def test_values_no_model_can_have_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        SparseWSIConfig(**{name: value})


def test_heads_count_where_there_are_any() -> None:
    with pytest.raises(ValueError, match="multiple of heads"):
        SparseWSIConfig(heads=7, scorer_attention="global")
    assert SparseWSIConfig(heads=7).heads == 7


def test_the_scorer_is_as_wide_as_the_tokens_up_to_512() -> None:
    assert SparseWSIConfig(dim=256).scorer_width == 256
    assert SparseWSIConfig(dim=1024).scorer_width == 512
    assert SparseWSIConfig(dim=1024, scorer_dim=128).scorer_width == 128
