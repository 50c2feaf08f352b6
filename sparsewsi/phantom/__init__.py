"""Phantom slides: computer-generated H&E-like slides whose content is known, as imaging phantoms are.

A seed decides everything. `phantom_map` decides what lies where, `render` paints any rectangle of it, `write_phantom`
writes a pyramidal TIFF with its ground truth, `patches` gives labelled patches without a slide.

No phantom is a patient's tissue, and nothing learnt from phantoms says anything about patients.
"""

from sparsewsi.phantom.kinds import BACKGROUNDS, KINDS, NEEDLES, WORDS
from sparsewsi.phantom.paint import patches, render
from sparsewsi.phantom.plan import VERSION, Needle, phantom_map
from sparsewsi.phantom.slide import EXAMPLE_SEED, EXAMPLE_SIZE, example_slide, write_phantom
from sparsewsi.phantom.truth import GroundTruth, ground_truth, load_truth, truth_path

__all__ = [
    "BACKGROUNDS",
    "EXAMPLE_SEED",
    "EXAMPLE_SIZE",
    "KINDS",
    "NEEDLES",
    "VERSION",
    "WORDS",
    "GroundTruth",
    "Needle",
    "example_slide",
    "ground_truth",
    "load_truth",
    "patches",
    "phantom_map",
    "render",
    "truth_path",
    "write_phantom",
]
