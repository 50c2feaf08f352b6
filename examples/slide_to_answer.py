"""From a slide to an answer, then with a selector and a bag of your own.

python examples/slide_to_answer.py [SLIDE] [--model DIR] [--out DIR]
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from sparsewsi import Bag, Selection, SparseWSI, extract_bag, load_bag, save_bag
from sparsewsi.phantom import example_slide
from sparsewsi.report.case import open_case
from sparsewsi.report.scope import word_answer

QUESTION = "Which of these tissues is present in this slide?"
OPTIONS = ["mucin", "carcinoma", "blood", "necrosis"]


def answer_from(slide: Path, model: SparseWSI, out: Path) -> Bag:
    """Slide to answer, in ten lines."""
    bag = extract_bag(slide, model.config.encoder, max_patches=300)
    case = open_case(model, bag, slide)
    print(case.summary, *case.doubts, sep="\n")
    messages = [{"role": "user", "content": QUESTION}]
    text = "".join(case.answer(model, messages, OPTIONS))
    answer = case.measure(model, messages, text, OPTIONS)
    print(f"{QUESTION} {word_answer(answer, model.limits)} {answer.evidence}", case.notice, sep="\n")
    case.write(out, [answer])
    return bag


def select_largest(bag: Bag, model: SparseWSI, k: int = 8) -> Selection:
    """A selector of your own: any k patches, in ascending order. Here those whose features are largest."""
    kept = bag.features.float().norm(dim=1).topk(min(k, len(bag.features))).indices.sort().values
    return replace(model.select(bag), indices=kept, tokens=model.tokens_of(bag, kept))


def make_bag(features: torch.Tensor, coords: torch.Tensor, like: Bag, path: Path) -> Bag:
    """A bag of your own, from features and corners of patches wherever you have them; here saved and read again."""
    bag = Bag(features, coords, like.patch_size, like.mpp, like.encoder, slide="my slide", slide_mpp=like.slide_mpp)
    save_bag(bag, path)
    return load_bag(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slide", type=Path, nargs="?", help="default: the example phantom")
    parser.add_argument("--model", default="assets/demo-model")
    parser.add_argument("--out", type=Path, default=Path("out/example"))
    options = parser.parse_args()
    model = SparseWSI.from_pretrained(options.model)
    bag = answer_from(options.slide or example_slide(), model, options.out)
    half = make_bag(bag.features[::2], bag.coords[::2], bag, options.out / "half.safetensors")
    for name, selection in (("largest features", select_largest(bag, model)), ("every second", model.select(half))):
        probs = model.option_probs(selection, QUESTION, OPTIONS)
        print(f"{name}: {OPTIONS[int(torch.argmax(probs))]} ({probs.max():.0%})")


if __name__ == "__main__":
    main()
