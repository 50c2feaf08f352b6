"""Encoders by name: a name or a package that is not there is said."""

import sys

import pytest

from sparsewsi.bags.encoders import load_encoder
from sparsewsi.bags.vit import HUB_VITS


def test_a_name_that_does_not_exist_lists_those_that_do():
    with pytest.raises(ValueError, match=r"efficientnet-lite0, efficientnet-lite0-he, conch, .*hf:<id>"):
        load_encoder("resnet")


@pytest.mark.parametrize("name", HUB_VITS)
def test_a_missing_extra_is_named(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=rf"{name} needs timm.*pip install 'sparsewsi\[encoders\]'"):
        load_encoder(name)
