"""Answer questions about a gigapixel whole-slide image from the 32 patches that matter.

    model = SparseWSI.from_pretrained("assets/demo-model")
    bag = extract_bag("slide.svs", model.config.encoder)
    case = open_case(model, bag, "slide.svs")
    messages = [{"role": "user", "content": "Which tissue is this?"}]
    text = "".join(case.answer(model, messages))
    case.write("out", [case.measure(model, messages, text)])

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
    from sparsewsi.report.answer import Answer
    from sparsewsi.report.case import Case, open_case
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
    "Answer": "report.answer",
    "Case": "report.case",
    "open_case": "report.case",
    "Slide": "slides.slide",
    "SlideError": "slides.slide",
    "open_slide": "slides.slide",
}

__version__ = "0.1.0"
__all__ = [
    "ENCODERS",
    "SELECTORS",
    "Answer",
    "Bag",
    "Case",
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
    "open_case",
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
