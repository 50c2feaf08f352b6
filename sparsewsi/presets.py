"""Ways to run this program, as data: which weights, under which licence, and what they need. Nothing is loaded here."""

import math
from dataclasses import dataclass

BYTES = 2  # of a parameter in bfloat16
SPARE = 1.2  # keys, values and activations, as a share of the weights: an estimate


@dataclass(frozen=True)
class Preset:
    """One way to run.

    id:         its name
    what:       who reads what, in a few words
    source:     repositories at the Hugging Face hub that it needs, the reader's first; () where all is in this package
    licence:    of those weights
    gate:       "yes" the hub hands some of them out on request; "no" to everyone
    parameters: of what reads
    encoder:    key of bags.encoders.ENCODERS
    mpp:        um/px of the patches
    run:        the command that uses it; more than one where something is to be made first
    """

    id: str
    what: str
    source: tuple[str, ...]
    licence: str
    gate: str
    parameters: int
    encoder: str
    mpp: float
    run: tuple[str, ...]

    def estimate_memory(self, encoder_parameters: int) -> int:
        """GB that reader and encoder take in bfloat16, with something to spare for what they compute."""
        return math.ceil(BYTES * SPARE * (self.parameters + encoder_parameters) / 1e9)


PRESETS = {
    preset.id: preset
    for preset in (
        Preset(
            "demo",
            "SmolLM2-135M with our adapter, on 32 tokens",
            (),
            "Apache-2.0",
            "no",
            134_515_008,
            "efficientnet-lite0-he",
            0.5,
            ("sparsewsi ask SLIDE",),
        ),
        Preset(
            "open-qwen3",
            "Qwen3-4B-Instruct, on 32 tokens; to be trained",
            ("Qwen/Qwen3-4B-Instruct-2507",),
            "Apache-2.0",
            "no",
            4_022_468_096,
            "h-optimus-0",
            0.5,
            (
                "sparsewsi extract slides/ --encoder h-optimus-0 --out features",
                "python -m train.run own-stage1 --llm Qwen/Qwen3-4B-Instruct-2507 --data captions.json "
                "--features features --out runs/stage1",
                "python -m train.run own-stage2 --data qa.json --features features --out runs/stage2 "
                "--init runs/stage1/checkpoints/last",
                "sparsewsi ask SLIDE --model runs/stage2/checkpoints/last/model",
            ),
        ),
        Preset(
            "medgemma",
            "MedGemma 1.5 4B, on 32 patches as pictures",
            ("google/medgemma-1.5-4b-it",),
            "Health AI Developer Foundations terms",
            "yes",
            4_300_079_472,
            "efficientnet-lite0-he",
            0.5,
            ("sparsewsi ask SLIDE --reader hf:google/medgemma-1.5-4b-it",),
        ),
        Preset(
            "slidechat",
            "SlideChat's Qwen2.5-7B, on all patches",
            ("General-Medical-AI/SlideChat_Weight", "Qwen/Qwen2.5-7B-Instruct"),
            "research only",
            "yes",
            7_634_516_480,
            "conch",
            0.5,
            (
                "python -m train.convert slidechat FOLDER --llm Qwen/Qwen2.5-7B-Instruct --out slidechat",
                "sparsewsi ask SLIDE --model slidechat/model",
            ),
        ),
        Preset(
            "loc-path",
            "LoC-Path's Qwen2.5-7B, on 96 latents; not imported yet",
            ("WinstonHu/LoC-Path", "Qwen/Qwen2.5-7B-Instruct"),
            "Apache-2.0",
            "no",
            7_615_616_512,
            "conch",
            0.5,
            ("python -m train.convert loc-path FOLDER",),
        ),
    )
}
