"""Answer questions about a gigapixel whole-slide image from the 32 patches that matter.

    bag = extract_bag("slide.svs", "efficientnet-lite0")
    model = SparseWSI.from_pretrained("assets/demo-model")
    selection = model.select(bag)
    for piece in model.answer(selection, [{"role": "user", "content": "Which tissue is this?"}]):
        print(piece, end="")

Names are imported when they are first used, so `import sparsewsi` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsewsi.bags.bag import Bag, save_bag
    from sparsewsi.bags.encoders import ENCODERS, load_encoder
    from sparsewsi.bags.extract import extract_bag
    from sparsewsi.bags.foreign import load_bag
    from sparsewsi.model.config import SparseWSIConfig
    from sparsewsi.model.llm import load_llm
    from sparsewsi.model.selection import Selection
    from sparsewsi.model.selector import SELECTORS, Scorer, hard_topk
    from sparsewsi.model.sparse_wsi import SparseWSI
    from sparsewsi.slides.slide import Slide, SlideError, open_slide

_HOME = {
    "Bag": "bags.bag",
    "extract_bag": "bags.extract",
    "load_bag": "bags.foreign",
    "save_bag": "bags.bag",
    "SparseWSIConfig": "model.config",
    "ENCODERS": "bags.encoders",
    "load_encoder": "bags.encoders",
    "load_llm": "model.llm",
    "Selection": "model.selection",
    "SparseWSI": "model.sparse_wsi",
    "SELECTORS": "model.selector",
    "Scorer": "model.selector",
    "hard_topk": "model.selector",
    "Slide": "slides.slide",
    "SlideError": "slides.slide",
    "open_slide": "slides.slide",
}

__version__ = "0.1.0"
__all__ = [
    "ENCODERS",
    "SELECTORS",
    "Bag",
    "Scorer",
    "Selection",
    "Slide",
    "SlideError",
    "SparseWSI",
    "SparseWSIConfig",
    "extract_bag",
    "hard_topk",
    "load_bag",
    "load_encoder",
    "load_llm",
    "open_slide",
    "save_bag",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
