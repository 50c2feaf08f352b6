"""What a stage trains, what a step costs and sees."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

import train.stage as stages
from sparsewsi.bags.bag import Bag
from sparsewsi.model.prompt import text_ids
from train.align import align, word_of
from train.attention import block_mask, set_attention, takes_blocks
from train.config import TrainConfig
from train.data.bank import load_bank
from train.data.example import Example, Question
from train.data.packing import answer_logits, attention_mask, join, pack, passes, word_target
from train.data.stream import MosaicStream
from train.stage import StageModule, answer_loss, build, choose_sparsity, keep_selected, train_step


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
    assert set_attention(model.llm)  # as for several questions, whose blocks SDPA does not take
    asked, real = [], torch.nn.functional.scaled_dot_product_attention

    def watched(*arguments, **keywords):
        asked.append((keywords.get("attn_mask"), keywords.get("is_causal")))
        return real(*arguments, **keywords)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    for blocks in (False, True):  # a mask of ones, and the word that it is causal
        asked.clear()
        monkeypatch.setattr(
            "train.data.packing.attention_mask",
            lambda packed, device, *_, blocks=blocks: attention_mask(packed, device, True, blocks),
        )
        torch.testing.assert_close(answer_logits(model, visual, one), dense, rtol=1e-4, atol=1e-4)
        assert asked
        assert all(mask is None and causal for mask, causal in asked)


def test_blocks_give_the_logits_of_the_dense_mask(settings: TrainConfig) -> None:
    """What a GPU is given for several questions: FlexAttention's BlockMask, here in its uncompiled form."""
    model, _ = build(settings, 24, "made-up")
    model.llm.float()
    parts, visuals = [], []
    for n in (150, 9):
        features = torch.randn(n, 24, generator=torch.Generator().manual_seed(n))
        questions = (Question("Which tissue?", "mucin"), Question("Which organ?", "colon"))
        parts.append(pack(model.tokenizer, Example(features, torch.arange(n) * 2, 2 * n, questions), "original", None))
        visuals.append(model.project(model.slide_encoder(features)).detach())
    packed, visual = join(parts), torch.cat(visuals)
    assert len(packed.order) > 128  # more than one block
    mask = block_mask(packed.bag, packed.question)
    assert mask.sparsity() > 0
    with torch.no_grad():
        dense = answer_logits(model, visual, packed)
        assert set_attention(model.llm)
        with torch.compiler.set_stance("force_eager"):
            found = answer_logits(model, visual, packed)
            one = answer_logits(model, visuals[1], parts[1])
        torch.testing.assert_close(found, dense, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(one, dense[-len(one) :], rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_blocks_give_the_gradient_of_the_dense_mask_on_a_gpu(settings: TrainConfig, bank_file: Path) -> None:
    stream, gradients = MosaicStream((load_bank(bank_file, "train"),), 0, 2), []
    for blocks in (True, False):
        torch.manual_seed(0)
        model, sparselearn = build(settings, 24, "made-up")
        assert takes_blocks(model.llm)
        if not blocks:
            model.llm.set_attn_implementation("sdpa")
        sparselearn.to(model.device)
        train_step(StageModule(model, sparselearn).train(), [stream.example(0, 150)], settings, step=2)
        gradients.append(torch.cat([p.grad.flatten() for p in model.projector.parameters() if p.grad is not None]))
    torch.testing.assert_close(*gradients, rtol=0.05, atol=0.02 * float(gradients[1].abs().max()))


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
    assert choose_sparsity(config, 39, 64)[1] is None
    tau, k = choose_sparsity(config, 40, 64)
    assert (tau, k) == (pytest.approx(1.0), pytest.approx(48))
    ks = [choose_sparsity(config, step, 64)[1] for step in range(40, 100)]
    assert all(a is not None and b is not None and a >= b for a, b in pairwise(ks))
    assert choose_sparsity(config, 85, 64) == (pytest.approx(0.05), pytest.approx(config.num_tokens))
    literal = replace(settings, steps=100, dense=0.0, anneal=1.0, k_start=0.0)
    assert choose_sparsity(literal, 0, 64) == (pytest.approx(literal.tau_start), literal.num_tokens)


def test_each_bag_of_a_step_has_its_own_k(settings: TrainConfig, bank_file: Path) -> None:
    model, sparselearn = build(settings, 24, "made-up")
    seen, real = [], sparselearn.forward
    sparselearn.forward = lambda *a, k, **b: (seen.append(k), real(*a, k=k, **b))[1]  # type: ignore[method-assign]
    stream = MosaicStream((load_bank(bank_file, "train"),), 0, 1)
    train_step(
        StageModule(model, sparselearn), [stream.example(i, n) for i, n in enumerate((20, 60))], settings, step=2
    )
    assert seen == [choose_sparsity(settings, 2, 20)[1], choose_sparsity(settings, 2, 60)[1]]
    assert seen[0] < seen[1]


def test_alignment_turns_patches_towards_their_tissues_words(settings: TrainConfig, bank_file: Path) -> None:
    bank = load_bank(bank_file, "train")
    torch.manual_seed(0)
    model, _ = build(settings, 24, "made-up")
    names = sorted(map(str, set(bank.kinds)))
    words = model.place_words([word_of(name) for name in names])

    def right() -> float:
        seen = torch.nn.functional.normalize(model.project(model.encode(bank.features)), dim=1) @ words.T
        found = np.array(names)[seen.argmax(1).numpy()]
        return float((found == bank.kinds).mean())

    before = right()
    align(model, [bank], 200)
    assert before < 0.5
    assert right() > 0.95


def test_the_last_steps_see_what_inference_keeps(settings: TrainConfig, bank_file: Path) -> None:
    config = replace(settings, steps=8, dense=0.25, anneal=0.5, hard=0.25, patches_hard=50)
    assert [config.is_hard(step) for step in range(8)] == [False] * 6 + [True] * 2
    assert [config.patches_at(step) for step in (5, 6)] == [20, 50]
    assert choose_sparsity(config, 5, 20)[1] is not None
    assert choose_sparsity(config, 6, 50)[1] is None
    model, sparselearn = build(config, 24, "made-up")
    torch.nn.init.normal_(model.scorer.head.weight)
    example = MosaicStream((load_bank(bank_file, "train"),), 0, 1).example(0, 50)
    short = keep_selected(model, example)
    coords = torch.arange(100, dtype=torch.int32).reshape(50, 2)
    selection = model.select(Bag(example.features, coords, 224, 0.5, "made-up", "mosaic"))
    assert short.rows is not None
    assert torch.equal(short.rows, selection.indices)
    assert torch.equal(short.indices, example.indices[selection.indices])
    assert short.kinds == example.kinds  # of all patches, as nothing of a step is read
    stage = StageModule(model, sparselearn)
    assert train_step(stage, [example], config, step=7)["n"] == config.num_tokens
    assert all(p.grad is None for p in model.scorer.parameters())


def test_of_a_slide_encoder_that_looks_around_hard_steps_keep_what_inference_keeps(
    settings: TrainConfig, bank_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(stages, "answer_loss", lambda model, visual, packed: seen.append(visual) or visual.sum())
    config = replace(settings, steps=8, hard=0.25, slide_encoder="longnet")
    model, sparselearn = build(config, 24, "made-up")
    torch.nn.init.normal_(model.scorer.head.weight)
    example = MosaicStream((load_bank(bank_file, "train"),), 0, 1).example(0, 50)
    train_step(StageModule(model, sparselearn), [example], config, step=7)
    bag = Bag(example.features, torch.zeros(50, 2, dtype=torch.int32), 224, 0.5, "made-up", "mosaic")
    torch.testing.assert_close(seen[0], model.project(model.select(bag).tokens))


def test_letters_are_taught_where_they_are_asked_for_and_texts_stay_as_they_are(settings: TrainConfig) -> None:
    model, _ = build(replace(settings, targets="letter"), 24, "made-up")
    assert model.config.option_scoring == "letter"
    closed, opened = Question("Which tissue?", "blood", ("mucin", "blood")), Question("Which organ?", "colon")
    example = Example(torch.zeros(3, 24), torch.arange(3), 3, (closed, opened))
    letter, text, plain = (
        pack(model.tokenizer, example, "original", None, *targets) for targets in (("letter",), ("text",), ())
    )
    end = model.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert letter.targets.tolist() == [*text_ids(model.tokenizer, "B"), end, *text_ids(model.tokenizer, "colon"), end]
    assert torch.equal(text.targets, plain.targets)
    assert torch.equal(text.text_ids, plain.text_ids)
    assert word_target(closed, "text") == "blood"


def test_a_long_pass_computes_activations_again_and_gives_the_same_gradient(
    settings: TrainConfig, bank_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    stream = MosaicStream((load_bank(bank_file, "train"),), 0, 1)
    gradients = []
    for above in (10_000, 10):
        monkeypatch.setattr(stages, "CHECKPOINT_ABOVE", above)
        torch.manual_seed(0)
        model, sparselearn = build(settings, 24, "made-up")
        train_step(StageModule(model, sparselearn).train(), [stream.example(0, 20)], settings, step=2)
        gradients.append(torch.cat([p.grad.flatten() for p in model.projector.parameters() if p.grad is not None]))
    assert stages.computes_again(model.llm)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    assert "computes activations again on the way back" in capsys.readouterr().err
