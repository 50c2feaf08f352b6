"""The kinds of tissue that a phantom holds: backgrounds, and the needles that hide in them."""

from sparsewsi.phantom import shader

BACKGROUNDS = ("stroma_fibrous", "smooth_muscle", "adipose", "normal_mucosa_colon")
NEEDLES = ("carcinoma", "lymphoid", "mucin", "necrosis", "blood")
KINDS = (*BACKGROUNDS, *NEEDLES, "background")
WORDS = {  # what a question or an answer calls them; the demonstration model was trained on these words
    "stroma_fibrous": "fibrous stroma",
    "smooth_muscle": "smooth muscle",
    "adipose": "fat",
    "normal_mucosa_colon": "colon mucosa",
    "carcinoma": "carcinoma",
    "lymphoid": "lymphoid tissue",
    "mucin": "mucin",
    "necrosis": "necrosis",
    "blood": "blood",
}
KIND_IDS = {
    "background": shader.GLASS,
    "stroma_fibrous": shader.STROMA,
    "smooth_muscle": shader.MUSCLE,
    "adipose": shader.ADIPOSE,
    "normal_mucosa_colon": shader.MUCOSA,
    "carcinoma": shader.CARCINOMA,
    "lymphoid": shader.LYMPHOID,
    "mucin": shader.MUCIN,
    "necrosis": shader.NECROSIS,
    "blood": shader.BLOOD,
}
KIND_NAMES = tuple(sorted(KIND_IDS, key=KIND_IDS.__getitem__))
LAYERS = ("normal_mucosa_colon", "stroma_fibrous", "smooth_muscle", "adipose")  # the order of a bowel wall
NEEDLE_SHARE = 0.3  # a patch is called by its needle when at least this share of it is that needle
