"""Training on a tiny real LLM: the loss is what it says, stages freeze what they must, a resumed run equals another."""

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
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import train.run as run
from sparsewsi.model.config import SparseWSIConfig
from sparsewsi.model.sparse_wsi import SparseWSI
from train.checkpoint import latest, load_state, save_state
from train.config import RECIPES, TrainConfig
from train.data.mosaic import BACKGROUNDS, NEEDLES, MosaicStream, load_bank
from train.data.packing import Example, Question, answer_logits, attention_mask, join, pack, passes
from train.run import StageModule, answer_loss, build, seat, sparsity, train, train_step


@pytest.fixture(scope="module")
def bank_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A feature bank of well separated made-up kinds, in the format of `train.data.mosaic bank`."""
    kinds = np.repeat([*BACKGROUNDS["phantom"], *NEEDLES["phantom"]], 24)
    centres = np.random.default_rng(0).normal(0, 1, (len(set(kinds)), 24))
    order = {kind: i for i, kind in enumerate(dict.fromkeys(kinds))}
    noise = np.random.default_rng(1).normal(0, 0.3, (len(kinds), 24))
    features = torch.tensor(np.stack([centres[order[kind]] for kind in kinds]) + noise).half()
    path = tmp_path_factory.mktemp("bank") / "phantom.safetensors"
    metadata = {
        "kinds": json.dumps(kinds.tolist()),
        "sources": json.dumps([f"phantom-{i % 3}" for i in range(len(kinds))]),
        "splits": json.dumps(["train"] * len(kinds)),
        "encoder": "made-up",
        "origin": "phantom",
    }
    save_file({"features": features}, path, metadata)
    return path


@pytest.fixture
def settings(bank_file: Path, tiny_llm: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        stage=1, out=str(tmp_path / "stage1"), banks=[str(bank_file)], llm=str(tiny_llm), steps=4, accumulation=2,
        dim=16, patches=20, num_tokens=6, dense=0.25, anneal=0.5, k_start=0.75, lora_rank=2, lora_alpha=4,
        questions_per_bag=3, checkpoint_every=2,
    )  # fmt: skip


def test_packed_questions_cost_what_separate_ones_cost(settings: TrainConfig) -> None:
    model, _ = build(settings, 24, "made-up")
    model.llm.float()
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(9, 24, generator=generator)
    indices = torch.tensor([0, 3, 4, 9, 20, 21, 22, 40, 41])
    questions = (
        Question("Which tissue?", "mucin", ("mucin", "blood")),
        Question("Describe this slide.", "Mostly fat with foci of blood."),
        Question("Does it?", "No", ("Yes", "No")),
    )
    visual = model.project(model.slide_encoder(features))

    def loss(*asked: Question) -> torch.Tensor:
        return answer_loss(
            model, visual, pack(model.tokenizer, Example(features, indices, 50, asked), "original", None)
        )

    apart = torch.stack([loss(question) for question in questions]).sum()
    torch.testing.assert_close(loss(*questions), apart, rtol=1e-5, atol=1e-5)
    other = Question("Which tissue?", "blood", ("mucin", "blood"))
    assert abs((loss(questions[0]) - loss(other)).item()) > 1e-3


def test_bags_that_share_a_pass_do_not_see_each_other(settings: TrainConfig) -> None:
    model, _ = build(settings, 24, "made-up")
    model.llm.float()
    parts, visuals = [], []
    for n, answer in ((3, "mucin"), (1, "fat"), (5, "blood")):
        generator = torch.Generator().manual_seed(n)
        questions = (Question("Which tissue?", answer), Question("Describe this slide.", f"Mostly {answer}."))
        example = Example(torch.randn(n, 24, generator=generator), torch.arange(n), n, questions)
        parts.append(pack(model.tokenizer, example, "original", None))
        visuals.append(model.project(model.slide_encoder(example.features)))
    apart = torch.stack([answer_loss(model, visual, part) for visual, part in zip(visuals, parts)]).sum()
    torch.testing.assert_close(answer_loss(model, torch.cat(visuals), join(parts)), apart, rtol=1e-5, atol=1e-5)
    lengths = [len(part.order) for part in parts]
    assert passes(parts, sum(lengths[:2])) == [[0, 1], [2]]
    assert passes(parts, 1) == [[0], [1], [2]]


def test_stages_train_what_the_table_says(settings: TrainConfig) -> None:
    model, sparselearn = build(settings, 24, "made-up")
    stage = StageModule(model, sparselearn)
    trained = {
        name.split(".")[1] for name, p in stage.named_parameters() if p.requires_grad and name.startswith("model.")
    }
    assert trained == {"slide_encoder", "scorer", "projector"}
    assert all(p.requires_grad for p in sparselearn.parameters())
    folder = Path(settings.out) / "start"
    model.save_pretrained(folder)
    model, _ = build(replace(settings, stage=2, init=str(folder)), 24, "made-up")
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"scorer", "projector", "llm"}
    assert all("lora_" in name for name, p in model.llm.named_parameters() if p.requires_grad)


def test_every_trained_part_gets_a_gradient(settings: TrainConfig, bank_file: Path) -> None:
    model, sparselearn = build(settings, 24, "made-up")
    stage = StageModule(model, sparselearn)
    stream = MosaicStream((load_bank(bank_file, "train"),), 0, 1)
    metrics = train_step(stage, [stream.example(0, 20)], settings, step=2)
    assert metrics["k"] < 20
    for name, parameter in stage.named_parameters():
        if (
            parameter.requires_grad and "denoiser" not in name
        ):  # the denoiser's inner layers wait for its zero last ones
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
    assert sum(float(p.grad.abs().sum()) for p in model.scorer.parameters() if p.grad is not None) > 0


def test_schedule_is_dense_then_anneals_then_holds(settings: TrainConfig) -> None:
    config = replace(settings, steps=100, dense=0.4, anneal=0.4, tau_start=1.0, tau_end=0.05, k_start=0.75)
    assert sparsity(config, 39, 64)[1] is None
    tau, k = sparsity(config, 40, 64)
    assert (tau, k) == (pytest.approx(1.0), pytest.approx(48))
    ks = [sparsity(config, step, 64)[1] for step in range(40, 100)]
    assert all(a is not None and b is not None and a >= b for a, b in pairwise(ks))
    assert sparsity(config, 85, 64) == (pytest.approx(0.05), pytest.approx(config.num_tokens))
    literal = replace(settings, steps=100, dense=0.0, anneal=1.0, k_start=0.0)
    assert sparsity(literal, 0, 64) == (pytest.approx(literal.tau_start), literal.num_tokens)


def metrics(folder: str | Path) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def losses(folder: str | Path) -> list[float]:
    return [step["loss"] for step in metrics(folder)]


@pytest.mark.parametrize("number", [1, 2])
def test_a_resumed_run_equals_an_uninterrupted_one(settings: TrainConfig, tmp_path: Path, number: int) -> None:
    config = settings
    if number == 2:
        config = replace(settings, stage=2, init=str(train(settings)), out=str(tmp_path / "whole"), k_start=0.75)
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


class Saved(torch.nn.Linear):
    """As much of a model as a checkpoint needs."""

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir()
        save_file(self.state_dict(), folder / "model.safetensors")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_at_any_file_operation_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    part = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(part.parameters())

    def save(step: int) -> None:
        torch.nn.init.constant_(part.weight, step)
        save_state(tmp_path, step, Saved(2, 2), part, optimizer)  # type: ignore[arg-type]

    def newest() -> int:
        checkpoint = latest(tmp_path)
        assert checkpoint is not None
        step = load_state(checkpoint, part, optimizer)
        assert (part.weight == step).all()
        assert (checkpoint / "model" / "model.safetensors").is_file()
        return step

    save(1)
    for operation in itertools.count(1):
        before = newest()
        child = os.fork()
        if child == 0:
            left = itertools.count(operation - 1, -1)

            def kill(event: str, arguments: tuple, left: itertools.count = left) -> None:
                if event.split(".")[0] in ("open", "os", "shutil") and str(tmp_path) in str(arguments):  # noqa: SIM102
                    if next(left) == 0:
                        os.kill(os.getpid(), signal.SIGKILL)

            try:
                sys.addaudithook(kill)
                save(before + 1)
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            break
        assert newest() in (before, before + 1), operation
    assert newest() == before + 1
    assert operation > 10
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_a_single_question_needs_no_dense_mask(settings: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU is given: SDPA gets is_causal and no mask, which the flash kernel needs; the logits are the same."""
    model, _ = build(settings, 24, "made-up")
    model.llm.float().train()
    model.llm.gradient_checkpointing_enable({"use_reentrant": False})
    indices = torch.tensor([0, 3, 4, 9, 20, 21, 22, 40, 41])
    questions = (Question("Which tissue?", "mucin"), Question("Which organ?", "colon"))
    features = torch.randn(9, 24, generator=torch.Generator().manual_seed(0))
    visual = model.project(model.slide_encoder(features))
    one = pack(model.tokenizer, Example(features, indices, 50, questions[:1]), "original", None)
    two = pack(model.tokenizer, Example(features, indices, 50, questions), "original", None)
    assert (one.is_causal, two.is_causal, join([one, one]).is_causal) == (True, False, False)
    assert torch.equal(one.mask, torch.ones_like(one.mask).tril())
    cpu = torch.device("cpu")
    assert attention_mask(one, cpu, plain=True).shape == (1, len(one.order))
    assert attention_mask(two, cpu, plain=True).shape == (1, 1, len(two.order), len(two.order))
    dense = answer_logits(model, visual, one)
    asked, real = [], torch.nn.functional.scaled_dot_product_attention

    def watched(*arguments, **keywords):
        asked.append((keywords.get("attn_mask"), keywords.get("is_causal")))
        return real(*arguments, **keywords)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    monkeypatch.setattr(
        "train.data.packing.attention_mask", lambda packed, device, plain: attention_mask(packed, device, True)
    )
    torch.testing.assert_close(answer_logits(model, visual, one), dense, rtol=1e-4, atol=1e-4)
    assert asked
    assert all(mask is None and causal for mask, causal in asked)


def test_each_bag_of_a_step_has_its_own_k(settings: TrainConfig, bank_file: Path) -> None:
    model, sparselearn = build(settings, 24, "made-up")
    seen, real = [], sparselearn.forward
    sparselearn.forward = lambda *a, k, **b: (seen.append(k), real(*a, k=k, **b))[1]  # type: ignore[method-assign]
    stream = MosaicStream((load_bank(bank_file, "train"),), 0, 1)
    train_step(
        StageModule(model, sparselearn), [stream.example(i, n) for i, n in enumerate((20, 60))], settings, step=2
    )
    assert seen == [sparsity(settings, 2, 20)[1], sparsity(settings, 2, 60)[1]]
    assert seen[0] < seen[1]


def test_every_process_has_a_gpu_of_its_own() -> None:
    assert seat({"LOCAL_RANK": "1"}, 2) == ("nccl", torch.device("cuda:1"))
    assert seat({}, 1) == ("nccl", torch.device("cuda:0"))
    assert seat({"LOCAL_RANK": "1"}, 0) == ("gloo", torch.device("cpu"))
    with pytest.raises(ValueError, match="process 2 of this machine has no GPU: there are 2"):
        seat({"LOCAL_RANK": "2"}, 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_training_runs_on_a_gpu(settings: TrainConfig) -> None:
    one_question = replace(settings, questions_per_bag=1, tokens_per_pass=1)
    last = train(replace(one_question, stage=2, init=str(train(settings)), out=settings.out + "-2"))
    assert SparseWSI.from_pretrained(last / "model").device.type == "cuda"
    assert all(np.isfinite(losses(settings.out + "-2")))


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
    assert sparsity(config, 3, 100)[1] == 6
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


def test_alignment_turns_patches_towards_their_tissues_words(settings: TrainConfig, bank_file: Path) -> None:
    from train.align import _words, align

    bank = load_bank(bank_file, "train")
    torch.manual_seed(0)
    model, _ = build(settings, 24, "made-up")
    words = torch.nn.functional.normalize(torch.stack(list(_words(model).values())), dim=1)
    names = list(_words(model))

    def right() -> float:
        seen = torch.nn.functional.normalize(model.project(model.encode(bank.features)), dim=1) @ words.T
        found = np.array(names)[seen.argmax(1).numpy()]
        return float((found == bank.kinds).mean())

    before = right()
    distance = align(model, [bank], 200)
    assert before < 0.5
    assert right() > 0.95
    assert distance < 0.3


def test_the_last_steps_see_what_inference_keeps(settings: TrainConfig, bank_file: Path) -> None:
    from sparsewsi.bags.bag import Bag
    from train.run import kept

    config = replace(settings, steps=8, dense=0.25, anneal=0.5, hard=0.25, patches_hard=50)
    assert [config.is_hard(step) for step in range(8)] == [False] * 6 + [True] * 2
    assert [config.patches_at(step) for step in (5, 6)] == [20, 50]
    assert sparsity(config, 5, 20)[1] is not None
    assert sparsity(config, 6, 50)[1] is None
    model, sparselearn = build(config, 24, "made-up")
    torch.nn.init.normal_(model.scorer.head.weight)
    example = MosaicStream((load_bank(bank_file, "train"),), 0, 1).example(0, 50)
    short = kept(model, example)
    coords = torch.arange(100, dtype=torch.int32).reshape(50, 2)
    selection = model.select(Bag(example.features, coords, 224, 0.5, "made-up", "mosaic"))
    assert torch.equal(short.rows, selection.indices)
    assert torch.equal(short.indices, example.indices[selection.indices])
    assert short.kinds == tuple(example.kinds[i] for i in selection.indices)
    stage = StageModule(model, sparselearn)
    assert train_step(stage, [example], config, step=7)["n"] == config.num_tokens
    assert all(p.grad is None for p in model.scorer.parameters())


def test_of_a_slide_encoder_that_looks_around_hard_steps_keep_what_inference_keeps(
    settings: TrainConfig, bank_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparsewsi.bags.bag import Bag

    seen = []
    monkeypatch.setattr(run, "answer_loss", lambda model, visual, packed: seen.append(visual) or visual.sum())
    config = replace(settings, steps=8, hard=0.25, slide_encoder="longnet")
    model, sparselearn = build(config, 24, "made-up")
    torch.nn.init.normal_(model.scorer.head.weight)
    example = MosaicStream((load_bank(bank_file, "train"),), 0, 1).example(0, 50)
    train_step(StageModule(model, sparselearn), [example], config, step=7)
    bag = Bag(example.features, torch.zeros(50, 2, dtype=torch.int32), 224, 0.5, "made-up", "mosaic")
    torch.testing.assert_close(seen[0], model.project(model.select(bag).tokens))


def test_a_run_does_not_go_on_with_other_data_of_the_same_name(settings: TrainConfig, bank_file: Path) -> None:
    bank = bank_file.with_name("own.safetensors")
    bank.write_bytes(bank_file.read_bytes())
    config = replace(settings, banks=[str(bank)], steps=2)
    train(config)
    with safe_open(bank_file, "pt") as file:
        facts = file.metadata()
    parts = load_file(bank_file)
    save_file(parts | {"features": -parts["features"]}, bank, metadata=facts)
    with pytest.raises(ValueError, match=r"holds a run of other settings: contents '\w{8}' \(now '\w{8}'\)"):
        train(config)


def test_a_release_knows_the_slides_it_was_trained_on(settings: TrainConfig, bank_file: Path, tmp_path: Path) -> None:
    from sparsewsi.model import novelty
    from train.checkpoint import release

    folder = tmp_path / "released"
    checkpoint = train(replace(settings, steps=1, dense=1.0))
    bank = load_bank(bank_file, "train")
    with pytest.raises(ValueError, match="at least 4 slides, got 3"):
        release(checkpoint, folder, demo=True, note="A note.", card="# Card", banks=[bank_file])
    assert not folder.exists()
    release(checkpoint, folder, demo=True, note="A note.", card="# Card")
    assert novelty.load(folder) is None
    novelty.save(novelty.summarise(bank.features, np.arange(len(bank.kinds)) % 5), folder)
    release(checkpoint, folder, demo=True, note="Another.", card=None)  # the folder is replaced, summary and all
    model = SparseWSI.from_pretrained(folder)
    assert model.config.note == "Another."
    assert novelty.load(folder) is None
