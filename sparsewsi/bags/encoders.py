"""The patch encoders there are, by name. A new one is a function of the device that returns a PatchEncoder."""

import functools
from collections.abc import Callable

import torch

from sparsewsi.bags.efficientnet import HE, load_efficientnet_lite0, load_efficientnet_lite0_he
from sparsewsi.bags.patch_encoder import PatchEncoder
from sparsewsi.bags.vit import HUB_VITS, load_hub_vit, load_transformers_encoder

ENCODERS: dict[str, Callable[[torch.device], PatchEncoder]] = {
    "efficientnet-lite0": load_efficientnet_lite0,
    HE: load_efficientnet_lite0_he,
    **{name: functools.partial(load_hub_vit, name) for name in HUB_VITS},
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
    return ENCODERS[name](place)
