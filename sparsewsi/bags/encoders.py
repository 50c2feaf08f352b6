"""The patch encoders there are, by name, with what is known of each before it is loaded."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sparsewsi.bags.efficientnet import HE, LICENCE, load_efficientnet_lite0, load_efficientnet_lite0_he
from sparsewsi.bags.patch_encoder import PatchEncoder
from sparsewsi.bags.vit import HUB_VITS, MIDNIGHT, load_hub_vit, load_midnight, load_transformers_encoder


@dataclass(frozen=True)
class EncoderRow:
    """What is known of a patch encoder.

    load:       loads it, onto a device
    source:     repository at the Hugging Face hub, or what brings the weights
    licence:    what the weights may be used for, in a few words
    gate:       "yes" the hub hands them out on request; "no" to everyone; "unclear" sources disagree
    parameters: of the network that turns pixels into features
    dim:        D
    mpp:        um/px it was trained at
    patch_size: px that its features are published for, at that mpp
    """

    load: Callable[[torch.device], PatchEncoder]
    source: str
    licence: str
    gate: str
    parameters: int
    dim: int
    mpp: float = 0.5
    patch_size: int = 224

    @property
    def on_hub(self) -> bool:
        """Whether the source is a repository of the hub."""
        return self.source.count("/") == 1


ENCODERS = {
    "efficientnet-lite0": EncoderRow(
        load_efficientnet_lite0, "a package of the base install", LICENCE["efficientnet-lite0"], "no", 3_371_008, 1280
    ),
    HE: EncoderRow(load_efficientnet_lite0_he, "part of sparsewsi", LICENCE[HE], "no", 3_371_008, 1280),
    **{
        name: EncoderRow(
            functools.partial(load_hub_vit, name),
            spec.repo,
            spec.licence,
            spec.gate,
            spec.parameters,
            spec.dim,
            spec.mpp,
        )
        for name, spec in HUB_VITS.items()
    },
    "midnight": EncoderRow(load_midnight, MIDNIGHT, "MIT", "unclear", 1_134_771_200, 3072),
}


def load_encoder(name: str, device: str | torch.device | None = None) -> PatchEncoder:
    """Load a patch encoder by name: a key of ENCODERS, or "hf:<id>" for a vision model of transformers.

    device: default the GPU where there is one, else the CPU.
    Raises ValueError with the remedy for an unknown name, a missing package, a gated model without a token, no network.
    """
    place = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("hf:") and len(name) > 3:
        return load_transformers_encoder(name[3:], place)
    if name not in ENCODERS:
        raise ValueError(
            f"{name!r} is no known patch encoder. Known: {', '.join(ENCODERS)}, and hf:<id> for a vision model of "
            "transformers, e.g. hf:owkin/phikon."
        )
    return ENCODERS[name].load(place)
