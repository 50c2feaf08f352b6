"""SparseWSIConfig <-> config.json of an artefact."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_INSTALLED = Path(__file__).resolve().parents[1] / "demo_model"  # where a wheel has it
DEFAULT_MODEL = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).resolve().parents[2] / "assets" / "demo-model"

SLIDE_ENCODERS = ("pointwise", "longnet", "none", "slidechat")
SCORER_ATTENTIONS = ("local", "global")
PROJECTORS = ("scaled", "plain")
SELECTIONS = ("scores", "evenly")
POSITIONS = ("original", "scaled", "compact")
OPTION_SCORINGS = ("text", "letter")

_CHOICES = {
    "slide_encoder": SLIDE_ENCODERS,
    "scorer_attention": SCORER_ATTENTIONS,
    "projector": PROJECTORS,
    "selection": SELECTIONS,
    "position": POSITIONS,
    "option_scoring": OPTION_SCORINGS,
}
_WHOLE = ("feature_dim", "patch_size", "num_tokens", "dim", "scorer_layers", "heads")  # at least 1
_WHOLE_OR_NONE = ("scorer_dim", "max_position")


class Unavailable(RuntimeError):
    """A model that is neither on this machine nor could be fetched, or is not what it should be; says what to do."""


@dataclass(frozen=True)
class SparseWSIConfig:
    """What a model is made of. Raises ValueError for values that no model can have."""

    llm: str = "smollm2-135m"  # hub id, folder, or the embedded default
    llm_revision: str | None = None
    encoder: str = "efficientnet-lite0"  # key of ENCODERS, or "hf:<id>"
    feature_dim: int = 1280  # D
    mpp: float = 0.5  # um/px at which patches are read
    patch_size: int = 224  # px at mpp
    num_tokens: int = 32  # K
    slide_encoder: str = "pointwise"
    slide_encoder_layers: int = 2
    dim: int = 512  # D_v, width of a visual token
    scorer_layers: int = 2
    scorer_dim: int | None = None  # None: min(dim, 512)
    scorer_attention: str = "local"
    scorer_relative: bool = False  # ours: the scorer also sees each token against its slide's mean and spread
    selection: str = "scores"  # "evenly": its own way keeps patches evenly spaced, all if they are num_tokens or fewer
    diversity: float = 0.0  # ours: weight of likeness in maximal marginal relevance; 0: the paper's hard top-K
    heads: int = 8
    projector: str = "scaled"  # to the spread of the LLM's text embeddings; "plain": two linear layers and a GELU
    position: str = "scaled"  # "scaled" differs from the paper's "original" only where the ids would pass max_position
    max_position: int | None = None  # budget for all position ids; None: the LLM's max_position_embeddings
    option_scoring: str = "text"
    adapter: bool | None = None  # whether the LLM has one, for a folder that lost it; save_pretrained knows
    multi_turn: bool = True  # false: trained on single questions, so a chat asks each on its own
    demo: bool = False  # true: "demonstration model" is said wherever an answer is shown
    note: str = ""  # one sentence shown with it

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(choices)}.")
        for name in _WHOLE + tuple(n for n in _WHOLE_OR_NONE if getattr(self, n) is not None):
            if not _is_whole(getattr(self, name)) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {getattr(self, name)!r}.")
        for name in ("llm", "encoder", "note"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} must be a text, got {getattr(self, name)!r}.")
        for name in ("multi_turn", "demo", "scorer_relative"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}.")
        if not _is_whole(self.slide_encoder_layers) or self.slide_encoder_layers < 0:
            raise ValueError(f"slide_encoder_layers must be 0 or more, got {self.slide_encoder_layers!r}.")
        if not isinstance(self.mpp, int | float) or not 0 < self.mpp < float("inf"):
            raise ValueError(f"mpp must be a positive number of um/px, got {self.mpp!r}.")
        if not isinstance(self.diversity, int | float) or not 0 <= self.diversity < float("inf"):
            raise ValueError(f"diversity must be a number of at least 0, got {self.diversity!r}.")
        if self.scorer_attention == "global" and self.scorer_width % self.heads:
            raise ValueError(f"the scorer's width {self.scorer_width} must be a multiple of heads, got {self.heads}.")
        if self.slide_encoder == "slidechat" and self.feature_dim != self.dim:
            raise ValueError(
                f"slidechat takes features as they are: dim is {self.dim}, feature_dim {self.feature_dim}."
            )
        if self.slide_encoder == "longnet" and self.dim % self.heads:
            raise ValueError(f"dim {self.dim} must be a multiple of heads for longnet, got {self.heads}.")

    @property
    def scorer_width(self) -> int:
        """Hidden size of the scorer."""
        return self.scorer_dim or min(self.dim, 512)

    @property
    def own_selector(self) -> str:
        """What the selector "learned" stands for."""
        return "learned" if self.selection == "scores" else self.selection

    def save(self, folder: str | Path) -> None:
        """Write folder/config.json; the folder is made if it is missing."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> "SparseWSIConfig":
        """Read folder/config.json. Raises ValueError for a missing or broken file and for unknown keys."""
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise ValueError(f"{folder} holds no config.json. Pass the folder that save_pretrained wrote.")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not valid JSON ({error}). Save the model again.") from error
        return cls.from_dict(values, str(path))

    @classmethod
    def from_dict(cls, values: Any, source: str = "the configuration") -> "SparseWSIConfig":
        """A config from parsed JSON; missing keys take their defaults, unknown keys are errors."""
        if not isinstance(values, dict):
            raise ValueError(f"{source} must hold a JSON object, got {type(values).__name__}.")
        unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(
                f"{source} has unknown keys: {', '.join(unknown)}. It may come from a newer version of sparsewsi, "
                "or may not be a SparseWSI model at all."
            )
        return cls(**values)


def name_model(folder_or_repo: str | Path) -> str:
    """A model's name for people: the last part of its folder's path, or its repository on the hub."""
    folder = Path(folder_or_repo).expanduser()
    return folder.resolve().name if folder.is_dir() else str(folder_or_repo)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
