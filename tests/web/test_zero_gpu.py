"""On a Space that is lent a GPU: what goes to the other process, and that answers are the model's."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsewsi.bags.bag import Bag
from sparsewsi.model.selection import Selection
from sparsewsi.model.sparse_wsi import SparseWSI
from sparsewsi.report.case import open_case
from sparsewsi.web.zero_gpu import SECONDS, OnLoan, is_lent

CHAT = [{"role": "user", "content": "Which tissue is this?"}]


class FakeSpaces:
    """Stands in for spaces.GPU, which only a Space has: what is given and returned is copied as between processes."""

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.lent: list[int] = []

    def __call__(self, duration: int) -> Callable[[Callable], Callable]:
        self.lent.append(duration)

        def decorate(function: Callable) -> Callable:
            def call(*given: Any, **named: Any) -> Any:
                given, named = pickle.loads(pickle.dumps((given, named)))
                self.sent += [*given, *named.values()]
                found = function(*given, **named)
                return found if hasattr(found, "__next__") else pickle.loads(pickle.dumps(found))

            return call

        return decorate


@pytest.fixture
def bag() -> Bag:
    features = torch.randn(40, 1280, generator=torch.Generator().manual_seed(1)).half()
    coords = torch.stack([torch.arange(40) % 8, torch.arange(40) // 8], 1).int() * 224
    return Bag(features, coords, 224, 0.5, "efficientnet-lite0", "Smith, John", note="of Smith")


def test_a_case_is_answered_as_without_a_loan_and_never_leaves(tiny_model: Path, bag: Bag) -> None:
    model, spaces = SparseWSI.from_pretrained(tiny_model, device="cpu"), FakeSpaces()
    lent = OnLoan(model, spaces)
    assert sorted(spaces.lent) == sorted(SECONDS.values())
    case, same = open_case(lent, bag), open_case(model, bag)  # type: ignore[arg-type]
    assert torch.equal(case.selection.indices, same.selection.indices)
    assert "".join(case.answer(lent, CHAT)) == "".join(same.answer(model, CHAT))  # type: ignore[arg-type]
    options = ["liver", "fat"]
    one, other = (
        case.measure(reader, CHAT, "fat", options)  # type: ignore[arg-type]
        for reader in (lent, model)
    )
    assert one.probs == other.probs
    assert one.effects == other.effects
    assert torch.equal(case.choose(lent, 3).selection.tokens, same.choose(model, 3).selection.tokens)  # type: ignore[arg-type]
    assert {type(each) for each in spaces.sent} <= {Bag, Selection, list, str, int, torch.Tensor, type(None)}
    assert b"Smith" not in pickle.dumps(spaces.sent)
    assert lent.config is model.config


def test_only_a_space_with_its_package_lends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPACE_ID", raising=False)
    assert not is_lent()
