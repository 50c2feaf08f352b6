"""What is said wherever an answer is shown."""

from sparsewsi.bags.bag import Bag
from sparsewsi.model.config import SparseWSIConfig
from sparsewsi.report.answer import summarise, word_notice


def test_summary_says_model_encoder_count_share_and_where_mpp_is_from(bag, selection):
    line = summarise(bag, selection, SparseWSIConfig(), "demo-model")
    scan = "0.25 µm/px (stated in the file)"
    for part in ("demo-model", "efficientnet-lite0", "3 of 5 patches", "60 %", "0.5 µm/px", scan):
        assert part in line
    unknown = Bag(bag.features, bag.coords, 100, None, bag.encoder, bag.slide)
    assert "unknown" in summarise(unknown, selection, SparseWSIConfig(), "demo-model")


def test_only_a_demo_model_is_called_one():
    assert word_notice(SparseWSIConfig(demo=True)).startswith("Demo model")
    assert word_notice(SparseWSIConfig()) == "Research use only, not for diagnosis."
