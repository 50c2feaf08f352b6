"""What is true of a phantom: the kind of any patch, the foci, the tissue of most of the slide."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from sparsewsi.phantom import shader
from sparsewsi.phantom.kinds import KIND_NAMES, NEEDLE_SHARE, NEEDLES
from sparsewsi.phantom.plan import NATIVE_MPP, VERSION, Needle, PhantomMap, phantom_map


@dataclass(frozen=True, eq=False)
class GroundTruth:
    """What is true of a phantom."""

    map: PhantomMap

    @property
    def dominant(self) -> str:
        """The kind of most of the tissue."""
        return self.map.dominant

    @property
    def present(self) -> tuple[str, ...]:
        """Needle kinds in the slide, sorted."""
        return self.map.present

    @property
    def needles(self) -> tuple[Needle, ...]:
        """Every focus with its box in level-0 px."""
        return self.map.needles

    def shares(self, coords: np.ndarray, patch_size: int) -> np.ndarray:
        """Which share of each patch is which kind: float32 (N, 10), columns in the order of KIND_NAMES.

        coords (N, 2): corners in level-0 px; patch_size: side in level-0 px. Sampled on 16 x 16 points of a patch.
        """
        coords = np.asarray(coords, np.float64).reshape(-1, 2)
        steps = (np.arange(16) + 0.5) / 16 * patch_size
        out = np.zeros((len(coords), len(KIND_NAMES)), np.float32)
        for start in range(0, len(coords), 4_096):  # bounded memory
            part = coords[start : start + 4_096]
            x, y = np.broadcast_arrays(
                part[:, 0, None, None] + steps[None, None, :], part[:, 1, None, None] + steps[None, :, None]
            )
            scale = self.map.scale
            kinds = shader.kinds_at(
                x.ravel() * scale, y.ravel() * scale, self.map.labels, self.map.pure, self.map.stain.salt
            ).reshape(len(part), -1)
            for kind in range(len(KIND_NAMES)):
                out[start : start + len(part), kind] = (kinds == kind).mean(1)
        return out

    def label_at(self, coords: np.ndarray, patch_size: int) -> np.ndarray:
        """The kind of each patch, str (N,).

        Rule: the needle kind with the largest share, if that is at least 30 % of the patch; else the kind (glass is
        "background") with the largest share.
        coords (N, 2): corners in level-0 px; patch_size: side in level-0 px.
        """
        shares = self.shares(coords, patch_size)
        needles = np.isin(KIND_NAMES, NEEDLES)
        hidden = np.where(needles, shares, 0)
        best = np.where(hidden.max(1) >= NEEDLE_SHARE, hidden.argmax(1), shares.argmax(1))
        return np.array(KIND_NAMES)[best]

    def to_json(self) -> str:
        """What <slide>.truth.json says; seed, size and mpp suffice to make the map again."""
        record = {
            "sparsewsi_phantom": {"seed": self.map.seed, "size": self.map.size, "version": VERSION},
            "mpp": self.map.mpp,
            "dominant": self.dominant,
            "others": list(self.map.others),
            "present": list(self.present),
            "needles": [asdict(needle) for needle in self.needles],
            "label_rule": f"the needle kind that covers {NEEDLE_SHARE:.0%} of a patch or more, else the commonest kind",
        }
        return json.dumps(record, indent=1)


def ground_truth(seed: int, size: int, mpp: float = NATIVE_MPP) -> GroundTruth:
    """What is true of the phantom of a seed, without writing it."""
    return GroundTruth(phantom_map(seed, size, mpp))


def truth_path(slide: str | Path) -> Path:
    """Where the ground truth of a written phantom lies: <slide>.truth.json."""
    return Path(f"{slide}.truth.json")


def load_truth(slide: str | Path) -> GroundTruth:
    """Ground truth of a phantom that write_phantom wrote.

    Raises ValueError if there is no truth beside the slide or another version wrote it.
    """
    path = truth_path(slide)
    if not path.is_file():
        raise ValueError(f"{path.name} is not beside the slide. Only phantoms written by write_phantom have one.")
    record = json.loads(path.read_text())
    stated = record["sparsewsi_phantom"]
    if stated["version"] != VERSION:
        raise ValueError(
            f"{path.name} was written by version {stated['version']} of the generator, this is version {VERSION}. "
            "Write the phantom again."
        )
    return ground_truth(stated["seed"], stated["size"], record["mpp"])
