"""Fixtures of the page's tests: one desk with a tiny model, its handlers, a slide that was analysed, visitors."""

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import gradio as gr
import pytest
import torch

from sparsewsi.bags.bag import Bag
from sparsewsi.report.case import open_case
from sparsewsi.web.desk import CaseSlide, Desk, Opened
from sparsewsi.web.handlers import Handlers
from sparsewsi.web.layout import lay_out


@pytest.fixture(scope="session")
def desk(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    return Desk(str(tiny_model), tmp_path_factory.mktemp("desk"))


@pytest.fixture(scope="session")
def on(desk: Desk) -> Handlers:
    _, page = lay_out(desk)
    return Handlers(desk, page)


@pytest.fixture(scope="session")
def opened(desk: Desk) -> Opened:
    """Thirty patches of random features, six of them kept."""
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(30, 1280, generator=generator)
    coords = torch.tensor([[224 * (i % 6), 224 * (i // 6)] for i in range(30)])
    bag = Bag(features, coords, 224, 0.5, "efficientnet-lite0", "slide 1", 0.5, "openslide", (1344, 1120))
    return Opened([CaseSlide("token", "", props={"name": bag.slide}, bag=bag)], open_case(desk.model, bag))


@pytest.fixture
def visitor(desk: Desk) -> Iterator[Callable[[], gr.Request]]:
    """What Gradio tells a handler of who asks: somebody new at every call. They are forgotten afterwards."""
    visitors = []

    def come() -> gr.Request:
        visitors.append(gr.Request(session_hash=uuid.uuid4().hex, headers={}))
        return visitors[-1]

    yield come
    for request in visitors:
        desk.forget(request.session_hash)
        assert not desk.turns.busy(str(request.session_hash))


@pytest.fixture
def me(visitor: Callable[[], gr.Request]) -> gr.Request:
    return visitor()
