"""Runs: resumed, killed, on two processes, refused; and what they leave behind."""

import importlib.util
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import train.run as run
from sparsewsi.model.config import SparseWSIConfig
from sparsewsi.model.sparse_wsi import SparseWSI
from train.checkpoint import latest
from train.config import NOTES, RECIPES, TrainConfig, read_config
from train.processes import choose_device
from train.run import count_room, describe_end, train
from train.stage import StageModule, build, choose_sparsity


def metrics(folder: str | Path) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def losses(folder: str | Path) -> list[float]:
    return [step["loss"] for step in metrics(folder)]


@pytest.mark.parametrize("number", [1, 2])
def test_a_resumed_run_equals_an_uninterrupted_one(settings: TrainConfig, tmp_path: Path, number: int) -> None:
    config = settings
    if number == 2:
        config = replace(settings, stage=2, init=str(train(settings)), out=str(tmp_path / "whole"), k_start=0.75)
        config = replace(config, lora_dropout=0.1, tau_start=0.0)
    train(config)
    broken = replace(config, out=str(tmp_path / "broken"), checkpoint_every=2)
    with pytest.MonkeyPatch.context() as patch:
        real, calls = run.train_step, []

        def fail(*arguments, **keywords):
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return real(*arguments, **keywords)

        patch.setattr(run, "train_step", fail)
        with pytest.raises(KeyboardInterrupt):
            train(broken)
    last = train(broken)
    assert losses(broken.out) == losses(config.out)
    with (
        safe_open(last / "model" / "model.safetensors", "pt") as one,
        safe_open(Path(config.out) / "checkpoints" / "last" / "model" / "model.safetensors", "pt") as other,
    ):
        assert set(one.keys()) == set(other.keys())
        assert not any("sparselearn" in name or "denoiser" in name for name in one.keys())  # noqa: SIM118
        assert all(torch.equal(one.get_tensor(name), other.get_tensor(name)) for name in one.keys())  # noqa: SIM118


def test_the_trained_artefact_is_the_model_that_was_trained(settings: TrainConfig) -> None:
    last = train(settings)
    model = SparseWSI.from_pretrained(last / "model")
    assert model.config.num_tokens == settings.num_tokens
    assert losses(settings.out)[-1] > 0


def test_metrics_hold_speed_and_memory(settings: TrainConfig) -> None:
    train(settings)
    for step in metrics(settings.out):
        assert step["tokens"] > step["answer_tokens"]
        assert step["tokens_per_second"] == pytest.approx(step["tokens"] / step["seconds"])
        assert 0.05 < step["peak_memory_gb"] < 64


def test_a_lower_rate_counts_when_a_run_goes_on(settings: TrainConfig) -> None:
    first = train(replace(settings, steps=2))
    last = train(replace(settings, steps=3, lr=1e-12, lr_encoder=1e-13))
    before, after = (SparseWSI.from_pretrained(folder / "model").trained_state() for folder in (first, last))
    assert first != last
    assert all(torch.allclose(before[name], after[name], rtol=0, atol=1e-9) for name in before)
    with pytest.raises(ValueError, match="other groups of parameters"):
        train(replace(settings, steps=4, lr=1e-4, lr_encoder=1e-4))


def command(config: TrainConfig, *launcher: str) -> list[str]:
    """What starts a training from the shell."""
    recipe = f"stage{config.stage}"
    plain = asdict(RECIPES[recipe]())
    flags = {name: value for name, value in asdict(config).items() if value != plain[name]}
    words = [[f"--{name}", *map(str, value if isinstance(value, list) else [value])] for name, value in flags.items()]
    return [sys.executable, *launcher, "-m", "train.run", recipe, *itertools.chain(*words)]


SHELL = {"cwd": Path(__file__).resolve().parents[2], "env": {**os.environ, "OMP_NUM_THREADS": "1"}}
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


@pytest.mark.parametrize("fsdp", [False, True])
def test_two_processes_equal_one_with_twice_the_accumulation(settings: TrainConfig, tmp_path: Path, fsdp: bool) -> None:
    # One bag a pass: a bf16 LLM rounds otherwise when other bags share the pass.
    one = replace(settings, out=str(tmp_path / "one"), accumulation=4, tokens_per_pass=1)
    if fsdp:  # LoRA's weights are sharded too
        one = replace(one, stage=2, init=str(train(replace(settings, steps=1))))
    train(one)
    two = replace(one, out=str(tmp_path / "two"), accumulation=2, fsdp=fsdp)
    done = subprocess.run(command(two, *TORCHRUN), capture_output=True, text=True, **SHELL)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("loss", "grad_norm"):  # the gradient itself: AdamW would forgive a wrong scale
        assert metrics(two.out)[0][name] == pytest.approx(metrics(one.out)[0][name], rel=1e-4)
    # Sums in another order differ in the last bit, which AdamW's first steps turn into signs of near-zero gradients.
    assert losses(two.out) == pytest.approx(losses(one.out), rel=5e-3)
    if fsdp:  # one process goes on where the two were: the files are the same
        link = tmp_path / "two" / "checkpoints" / "last"
        link.unlink()
        link.symlink_to("000002")
        sharded = losses(two.out)
        train(replace(one, out=two.out))
        assert losses(two.out) == pytest.approx(sharded, rel=1e-4)


def test_sharding_says_what_it_needs(settings: TrainConfig) -> None:
    with pytest.raises(ValueError, match="torchrun"):
        train(replace(settings, fsdp=True))
    with pytest.raises(ValueError, match="Pass one of them"):
        train(replace(settings, fsdp=True, load_in_4bit=True))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"NVIDIA GPU and the package bitsandbytes .*sparsewsi\[4bit\]"):
            train(replace(settings, load_in_4bit=True))


def test_a_run_killed_at_a_random_moment_goes_on_as_if_nothing_had_happened(
    settings: TrainConfig, tmp_path: Path
) -> None:
    whole = replace(settings, steps=24, checkpoint_every=4)
    train(whole)
    killed = replace(whole, out=str(tmp_path / "killed"))
    log = tmp_path / "killed" / "metrics.jsonl"
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        command(killed), cwd=SHELL["cwd"], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not (log.is_file() and len(log.read_text().splitlines()) > 5):
        assert process.poll() is None
        time.sleep(0.01)
    delay = random.uniform(0, 0.5)
    time.sleep(delay)
    process.kill()
    assert process.wait() in (-signal.SIGKILL, 0)
    with log.open("a") as file:
        file.write('{"loss": 1.2')  # a kill within a write
    checkpoint = latest(tmp_path / "killed")
    assert checkpoint is not None, delay
    done = json.loads((checkpoint / "state" / "step.json").read_text())["step"]
    assert 0 <= len(log.read_text().splitlines()) - 1 - done <= whole.checkpoint_every, delay
    train(killed)
    assert [step["step"] for step in metrics(killed.out)] == list(range(24)), delay
    assert losses(killed.out) == losses(whole.out), delay


def test_every_process_has_a_gpu_of_its_own() -> None:
    assert choose_device({"LOCAL_RANK": "1"}, 2) == ("nccl", torch.device("cuda:1"))
    assert choose_device({}, 1) == ("nccl", torch.device("cuda:0"))
    assert choose_device({"LOCAL_RANK": "1"}, 0) == ("gloo", torch.device("cpu"))
    with pytest.raises(ValueError, match="process 2 of this machine has no GPU: there are 2"):
        choose_device({"LOCAL_RANK": "2"}, 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_training_runs_on_a_gpu(settings: TrainConfig) -> None:
    one_question = replace(settings, questions_per_bag=1, tokens_per_pass=1)
    last = train(replace(one_question, stage=2, init=str(train(settings)), out=settings.out + "-2"))
    assert SparseWSI.from_pretrained(last / "model").device.type == "cuda"
    assert all(np.isfinite(losses(settings.out + "-2")))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("fsdp", [False, True])
def test_two_gpus_equal_one_with_twice_the_accumulation(settings: TrainConfig, tmp_path: Path, fsdp: bool) -> None:
    one = replace(settings, out=str(tmp_path / "one"), accumulation=4, tokens_per_pass=1)
    train(one)
    two = replace(one, out=str(tmp_path / "two"), accumulation=2, fsdp=fsdp)
    done = subprocess.run(command(two, *TORCHRUN), capture_output=True, text=True, **SHELL)
    assert done.returncode == 0, done.stderr[-2000:]
    assert losses(two.out) == pytest.approx(losses(one.out), rel=2e-2)


FAKE_TRACKIO = """
calls = []
def init(**keywords): calls.append(("init", keywords["project"], keywords["name"], keywords["resume"]))
def log(metrics, step): calls.append(("log", step, metrics["loss"]))
def finish(): calls.append(("finish",))
"""


def test_stage_2_takes_over_what_stage_1_decided() -> None:
    model = SparseWSIConfig(dim=32, num_tokens=6, position="compact", max_position=512)
    config = TrainConfig(stage=2, dim=32, steps=7).with_model(model)
    assert (config.num_tokens, config.position, config.max_position, config.steps) == (6, "compact", 512, 7)
    assert choose_sparsity(config, 3, 100)[1] == 6
    with pytest.raises(ValueError, match=r"num_tokens is 12, but the model .* has 6\. Leave out --num_tokens"):
        TrainConfig(stage=2, num_tokens=12).with_model(model)


def test_trackio_gets_the_metrics_where_it_is_asked_for(
    settings: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = replace(settings, steps=2, trackio="slides")
    if importlib.util.find_spec("trackio") is None:
        with pytest.raises(ValueError, match="pip install trackio"):
            train(asked)
    (tmp_path / "trackio.py").write_text(FAKE_TRACKIO)
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    train(asked)
    first, *logged, last = sys.modules["trackio"].calls
    monkeypatch.delitem(sys.modules, "trackio")
    assert first == ("init", "slides", "stage1", "allow")
    assert logged == [("log", step, loss) for step, loss in enumerate(losses(asked.out))]
    assert last == ("finish",)


def test_a_run_does_not_go_on_with_other_data_of_the_same_name(settings: TrainConfig, bank_file: Path) -> None:
    bank = bank_file.with_name("own.safetensors")
    bank.write_bytes(bank_file.read_bytes())
    config = replace(settings, banks=[str(bank)], steps=2)
    train(config)
    with safe_open(bank_file, "pt") as file:
        facts = file.metadata()
    parts = load_file(bank_file)
    save_file(parts | {"features": -parts["features"]}, bank, metadata=facts)
    with pytest.raises(ValueError, match=r"holds a run with other settings: contents was '\w{8}', is '\w{8}'"):
        train(config)


def test_the_literal_schedule_says_what_it_did_in_our_trials(
    settings: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["run", *command(replace(settings, steps=1))[3:]])
    run.main()
    printed = capsys.readouterr()
    assert "the paper's literal schedule" in printed.err
    assert "own-stage1 and own-stage2 are what learned" in printed.err
    assert "Hardness at the end is" in printed.out
    assert not {"own-stage1", "demo-stage1"} & set(NOTES)


def test_stage_2_begins_where_stage_1_ended(settings: TrainConfig, tmp_path: Path) -> None:
    first = train(replace(settings, kernel="logistic", denoiser="none", tau_end=0.3))
    second = replace(settings, stage=2, init=str(first), out=str(tmp_path / "2"), steps=2, tau_start=0.0, dense=0.0)
    train(second)
    used = read_config(tmp_path / "2" / "train_config.json")
    assert (used.kernel, used.denoiser, used.gate, used.tau_start) == ("logistic", "none", "vp", pytest.approx(0.3))
    assert metrics(second.out)[0]["tau"] == pytest.approx(0.3)
    train(replace(second, steps=3))  # goes on with the same tau
    assert read_config(tmp_path / "2" / "train_config.json").tau_start == pytest.approx(0.3)
    with pytest.raises(ValueError, match=r"gate is 'scale', .* has 'vp'\. Leave out --gate"):
        train(replace(second, out=str(tmp_path / "3"), gate="scale"))


def test_the_newest_checkpoints_are_kept(settings: TrainConfig) -> None:
    last = train(replace(settings, checkpoint_every=1, keep=2))
    assert sorted(path.name for path in last.parent.iterdir()) == ["000003", "000004", "last"]


def test_a_step_that_is_not_finite_is_skipped_and_several_are_refused(
    settings: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, broken = run.train_step, {1}

    def train_step(stage: StageModule, examples: list, config: TrainConfig, step: int, keep: object) -> dict:
        found = real(stage, examples, config, step, keep)  # type: ignore[arg-type]
        if step in broken:
            stage.model.projector[0].weight.grad.fill_(torch.nan)  # type: ignore[index,union-attr]
        return found

    monkeypatch.setattr(run, "train_step", train_step)
    last = train(replace(settings, checkpoint_every=1, keep=0))
    assert [step["skipped"] for step in metrics(settings.out)] == [0, 1, 0, 0]
    before, after, then = (
        SparseWSI.from_pretrained(last.with_name(name) / "model").trained_state()
        for name in ("000001", "000002", "000003")
    )
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not all(torch.equal(after[name], then[name]) for name in after)
    broken.update(range(20))
    with pytest.raises(ValueError, match=r"4 steps one after another were skipped, as step 3 has loss .* Lower --lr"):
        train(replace(settings, steps=20, out=settings.out + "-nan"))


def test_hardness_is_told_at_every_end(settings: TrainConfig) -> None:
    train(settings)
    assert 0 < metrics(settings.out)[-1]["hardness"] <= 1
    assert "training and inference show the LLM the same tokens" in describe_end(settings, 0.97)
    assert "softer mixture" in describe_end(settings, 0.3)
    assert "the scorer learned nothing" in describe_end(replace(settings, dense=1.0), 0.3)


def test_bags_hold_no_more_than_the_llms_positions(settings: TrainConfig) -> None:
    model, _ = build(settings, 24, "made-up")
    assert count_room(model) == 4096 - 512
    model.config = replace(model.config, position="original")
    assert count_room(model) > 1e9


def test_mosaics_have_no_epochs(settings: TrainConfig) -> None:
    with pytest.raises(ValueError, match="--epochs needs --data"):
        train(replace(settings, epochs=1.0))


def test_settings_of_an_older_program_are_read(settings: TrainConfig, tmp_path: Path) -> None:
    path = tmp_path / "train_config.json"
    path.write_text(json.dumps(asdict(settings) | {"activation_checkpointing": False}))
    assert read_config(path) == settings
