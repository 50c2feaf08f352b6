"""The files of a model: loaded as they were saved or not at all, never half written."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from sparsewsi.bags.bag import Bag
from sparsewsi.model import novelty
from sparsewsi.model.config import SparseWSIConfig
from sparsewsi.model.llm import load_llm
from sparsewsi.model.selection import Selection
from sparsewsi.model.sparse_wsi import SparseWSI

CONFIG = SparseWSIConfig(feature_dim=24, dim=32, num_tokens=8, heads=4)
CHAT = [{"role": "user", "content": "Which tissue is this?"}]
OPTIONS = ["liver", "a lymph node beside normal colon mucosa", "fat", "no"]
MakeModel = Callable[..., SparseWSI]


def make_bag(n: int = 300, dim: int = 24, encoder: str = CONFIG.encoder, seed: int = 1) -> Bag:
    features = torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)).half()
    place = torch.arange(n)
    return Bag(features, torch.stack([place % 20, place // 20], 1).int() * 224, 224, 0.5, encoder, "a slide")


def text_of(model: SparseWSI, selection: Selection, chat: list = CHAT, **settings) -> str:
    return "".join(model.answer(selection, chat, **{"max_new_tokens": 12, **settings}))


@pytest.mark.parametrize("lora", [False, True])
def test_save_and_load_change_neither_indices_nor_text(
    tiny_llm: Path, make_model: MakeModel, tmp_path: Path, lora: bool
) -> None:
    model = make_model(lora=lora)
    model.save_pretrained(tmp_path / "model")
    base = load_llm(str(tiny_llm), device="cpu", dtype=torch.float32)
    loaded = SparseWSI.from_pretrained(tmp_path / "model", llm=base)
    assert (tmp_path / "model" / "adapter").is_dir() == lora
    a, b = model.select(make_bag()), loaded.select(make_bag())
    assert torch.equal(a.indices, b.indices)
    assert torch.equal(a.scores, b.scores)
    assert text_of(model, a) == text_of(loaded, b)
    assert torch.equal(model.option_probs(a, "Which?", OPTIONS), loaded.option_probs(b, "Which?", OPTIONS))
    again = SparseWSI.from_pretrained(tmp_path / "model", device="cpu", dtype=torch.float32)  # loads the base itself
    assert text_of(again, again.select(make_bag())) == text_of(model, a)


def test_the_adapter_matters_and_names_no_machine(tiny_llm: Path, make_model: MakeModel, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, llm="smollm2-135m")
    model = make_model(lora=True)
    model.config = config
    model.save_pretrained(tmp_path / "model")
    settings = json.loads((tmp_path / "model" / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "smollm2-135m"
    assert sorted(path.name for path in (tmp_path / "model" / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    for path in tmp_path.rglob("*.json"):
        assert str(tiny_llm) not in path.read_text()
    with model.llm.disable_adapter():  # type: ignore[operator]
        without = model.option_probs(model.select(make_bag()), "Which?", OPTIONS)
    assert not torch.allclose(without, model.option_probs(model.select(make_bag()), "Which?", OPTIONS), atol=1e-3)


@pytest.mark.parametrize("lora", [False, True])
def test_fp16_files_compute_in_float32(tiny_llm: Path, make_model: MakeModel, tmp_path: Path, lora: bool) -> None:
    model = make_model(lora=lora)
    model.save_pretrained(tmp_path / "model", dtype=torch.float16)
    files = list((tmp_path / "model").rglob("*.safetensors"))
    assert len(files) == 1 + lora
    assert {value.dtype for file in files for value in load_file(file).values()} == {torch.float16}
    loaded = SparseWSI.from_pretrained(tmp_path / "model", llm=load_llm(str(tiny_llm), device="cpu"))
    dtypes = {p.dtype for n, p in loaded.named_parameters() if not n.startswith("llm.") or "lora_" in n}
    assert dtypes == {torch.float32}
    assert torch.allclose(loaded.select(make_bag()).scores, model.select(make_bag()).scores, atol=1e-2)


def test_an_artefact_holds_inference_weights_only(make_model: MakeModel, tmp_path: Path) -> None:
    make_model(lora=True).save_pretrained(tmp_path / "model")
    names = set(load_file(tmp_path / "model" / "model.safetensors"))
    assert {name.split(".")[0] for name in names} == {"slide_encoder", "scorer", "projector"}
    assert not any("sparselearn" in name or "denoiser" in name for name in names)
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "README.md",
        "adapter",
        "config.json",
        "model.safetensors",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]  # no temporary folder is left


@pytest.mark.parametrize("extra", ["sparselearn.denoiser.block.out.weight", "denoiser.weight", "llm.lm_head.weight"])
def test_unexpected_weights_are_named(make_model: MakeModel, tmp_path: Path, extra: str) -> None:
    make_model().save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    save_file({**load_file(file), extra: torch.zeros(2)}, file)
    with pytest.raises(ValueError, match=f"unexpected: {extra}"):
        SparseWSI.from_pretrained(tmp_path / "model")


def test_missing_and_misshapen_weights_are_named(make_model: MakeModel, tmp_path: Path) -> None:
    make_model(lora=True).save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    state = load_file(file)
    head = state.pop("scorer.head.weight")
    save_file(state, file)
    with pytest.raises(ValueError, match=r"missing: scorer\.head\.weight"):
        SparseWSI.from_pretrained(tmp_path / "model")
    save_file({**state, "scorer.head.weight": head[:, :3].contiguous()}, file)
    with pytest.raises(ValueError, match=r"scorer\.head\.weight is \(1, 3\)"):
        SparseWSI.from_pretrained(tmp_path / "model")
    save_file({**state, "scorer.head.weight": head}, file)
    adapter = tmp_path / "model" / "adapter" / "adapter_model.safetensors"
    lora = load_file(adapter)
    gone = sorted(lora)[0]
    del lora[gone]
    save_file(lora, adapter)
    with pytest.raises(ValueError, match=f"missing: {gone}"):
        SparseWSI.from_pretrained(tmp_path / "model")


def test_an_adapter_that_was_lost_or_belongs_to_another_model_is_noticed(
    tiny_llm: Path, make_model: MakeModel, tmp_path: Path
) -> None:
    make_model(lora=True).save_pretrained(tmp_path / "model")
    base = load_llm(str(tiny_llm), device="cpu")
    SparseWSI.from_pretrained(tmp_path / "model", llm=base)
    with pytest.raises(ValueError, match="already holds another model's adapter"):
        SparseWSI.from_pretrained(tmp_path / "model", llm=base)
    shutil.rmtree(tmp_path / "model" / "adapter")
    with pytest.raises(ValueError, match="saved with an adapter of the LLM, but now it holds none"):
        SparseWSI.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("base", ["another-llm", "owner/another-llm", "/home/someone/another-llm"])
def test_an_adapter_of_another_base_is_refused_though_its_shapes_fit(
    make_model: MakeModel, tmp_path: Path, base: str
) -> None:
    make_model(lora=True).save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base}))
    with pytest.raises(ValueError, match="was trained on the LLM"):
        SparseWSI.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("file", ["model.safetensors", "adapter/adapter_model.safetensors"])
@pytest.mark.parametrize("kind", ["NaN", "int8", "float8"])
def test_weights_that_mean_nothing_are_refused(make_model: MakeModel, tmp_path: Path, file: str, kind: str) -> None:
    make_model(lora=True).save_pretrained(tmp_path / "model")
    state = load_file(tmp_path / "model" / file)
    name, types = sorted(state)[0], {"int8": torch.int8, "float8": torch.float8_e4m3fn}
    state[name] = state[name] * torch.nan if kind == "NaN" else state[name].to(types[kind])
    save_file(state, tmp_path / "model" / file)
    with pytest.raises(ValueError, match="NaN" if kind == "NaN" else "16 bits or more"):
        SparseWSI.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("name", ["model.safetensors", "adapter/adapter_model.safetensors", "novelty.safetensors"])
def test_damaged_files_are_named(make_model: MakeModel, tmp_path: Path, name: str) -> None:
    model = make_model(lora=True)
    model.trained_on = novelty.summarise(torch.randn(40, CONFIG.feature_dim), np.arange(40) % 5)
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / name).write_bytes((tmp_path / "model" / name).read_bytes()[:-9])
    with pytest.raises(ValueError, match=rf"{name} is damaged"):
        SparseWSI.from_pretrained(tmp_path / "model")


def test_weights_that_are_no_numbers_are_refused(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    model.projector[0].bias.data[0] = torch.nan  # type: ignore[index]
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"projector\.0\.bias .* NaN"):
        SparseWSI.from_pretrained(tmp_path / "model")


def test_what_training_features_looked_like_stays_with_the_model(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    model.trained_on = novelty.summarise(torch.randn(40, CONFIG.feature_dim), np.arange(40) % 5)
    model.save_pretrained(tmp_path / "model")
    SparseWSI.from_pretrained(tmp_path / "model").save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / novelty.FILE)["mean"].equal(model.trained_on.mean)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "again").iterdir() if path.is_file()} == {0o644}


def test_a_rename_that_fails_leaves_the_old_model(make_model: MakeModel, tmp_path: Path, monkeypatch) -> None:
    model, rename, calls = make_model(), Path.rename, []
    model.save_pretrained(tmp_path / "model", card="the first")

    def failing(self: Path, target: Path) -> Path:
        calls.append(self)
        if len(calls) == 2:
            raise OSError("no space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="no space"):
        model.save_pretrained(tmp_path / "model", card="the second")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "README.md").read_text() == "the first"


def test_what_is_no_model_is_refused_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        SparseWSI.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        SparseWSI.from_pretrained(tmp_path)
    CONFIG.save(tmp_path / "half")
    with pytest.raises(ValueError, match=r"model\.safetensors is missing"):
        SparseWSI.from_pretrained(tmp_path / "half")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RuntimeError, match="owner/no-such-model is neither a folder nor could it be downloaded"):
        SparseWSI.from_pretrained("owner/no-such-model")


def test_a_card_is_kept_given_or_written(make_model: MakeModel, tmp_path: Path) -> None:
    model, card = make_model(), tmp_path / "model" / "README.md"
    model.save_pretrained(tmp_path / "model")
    assert "not for diagnosis" in card.read_text()
    card.write_text("by hand")
    model.save_pretrained(tmp_path / "model")
    assert card.read_text() == "by hand"
    model.save_pretrained(tmp_path / "model", card="given")
    assert card.read_text() == "given"


def test_saving_replaces_a_model_but_nothing_else(make_model: MakeModel, tmp_path: Path) -> None:
    (tmp_path / "slides").mkdir()
    (tmp_path / "slides" / "a.svs").touch()
    with pytest.raises(ValueError, match=r"not a model's folder \(it holds a\.svs\)"):
        make_model().save_pretrained(tmp_path / "slides")
    make_model(lora=True).save_pretrained(tmp_path / "model")
    make_model().save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model" / "adapter").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "slides"]


def test_a_save_that_fails_leaves_the_old_model(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    model.save_pretrained(tmp_path / "model")
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    with pytest.raises(TypeError):
        model.save_pretrained(tmp_path / "model", card=3)  # type: ignore[arg-type]
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# ---- the hub


class StandInHub:
    """Stands in for the Hugging Face Hub: keeps repositories as folders, and does what HfApi would be asked to do."""

    root: Path
    private: dict[str, bool]

    def __init__(self, token: str | None = None):
        assert token == "a token"

    def create_repo(self, repo_id: str, private: bool, exist_ok: bool) -> None:
        (self.root / repo_id).mkdir(parents=True, exist_ok=exist_ok)
        self.private.setdefault(repo_id, private)

    def file_exists(self, repo_id: str, name: str) -> bool:
        return (self.root / repo_id / name).is_file()

    def upload_folder(self, repo_id, folder_path, commit_message, delete_patterns, ignore_patterns):
        repo = self.root / repo_id
        for old in repo.glob(delete_patterns):
            old.unlink()
        for file in (file for file in Path(folder_path).rglob("*") if file.is_file()):
            if file.name not in (ignore_patterns or ()):
                (repo / file.relative_to(folder_path)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, repo / file.relative_to(folder_path))
        return SimpleNamespace(commit_url=f"https://huggingface.co/{repo_id}/commit/1")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(StandInHub, "root", tmp_path / "hub", raising=False)
    monkeypatch.setattr(StandInHub, "private", {}, raising=False)
    monkeypatch.setattr("huggingface_hub.HfApi", StandInHub)
    return tmp_path / "hub"


def test_what_is_pushed_is_what_is_loaded(tiny_llm: Path, make_model: MakeModel, hub: Path) -> None:
    model = make_model(lora=True)
    with pytest.raises(ValueError, match="a folder of this machine"):
        model.push_to_hub("owner/name", token="a token")
    model.config = dataclasses.replace(model.config, llm="owner/llm")
    assert model.push_to_hub("owner/name", token="a token") == "https://huggingface.co/owner/name/commit/1"
    assert StandInHub.private == {"owner/name": True}
    assert "not for diagnosis" in (hub / "owner" / "name" / "README.md").read_text()
    loaded = SparseWSI.from_pretrained(hub / "owner" / "name", llm=load_llm(str(tiny_llm), device="cpu"))
    assert loaded.name == "name"
    assert torch.allclose(loaded.select(make_bag()).scores, model.select(make_bag()).scores, atol=1e-2), "fp16"


def test_a_card_written_at_the_hub_stays_and_an_old_adapter_goes(make_model: MakeModel, hub: Path) -> None:
    repo = hub / "owner" / "name"
    (repo / "adapter").mkdir(parents=True)
    (repo / "adapter" / "adapter_model.safetensors").touch()
    (repo / "README.md").write_text("by hand")
    model = make_model()
    model.config = dataclasses.replace(model.config, llm="owner/llm")
    model.push_to_hub("owner/name", token="a token")
    assert (repo / "README.md").read_text() == "by hand"
    assert list((repo / "adapter").iterdir()) == []
    model.push_to_hub("owner/name", token="a token", card="given")
    assert (repo / "README.md").read_text() == "given"


# ---- the embedded default


def test_the_embedded_llm_repeats_itself_through_save_and_load(tmp_path: Path) -> None:
    try:
        base = load_llm("smollm2-135m", device="cpu")
    except RuntimeError as error:
        pytest.skip(str(error))
    torch.manual_seed(0)
    config = SparseWSIConfig(feature_dim=24, dim=32, heads=4)
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = SparseWSI(config, get_peft_model(base[0], lora), base[1]).eval()
    bag = make_bag(500)
    selection = model.select(bag)
    assert len(selection.indices) == 32
    text = text_of(model, selection)
    assert text == text_of(model, model.select(bag))
    model.save_pretrained(tmp_path / "model")
    loaded = SparseWSI.from_pretrained(tmp_path / "model", device="cpu")
    again = loaded.select(bag)
    assert torch.equal(again.indices, selection.indices)
    assert text_of(loaded, again) == text
