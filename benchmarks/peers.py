"""The libraries we are compared with: pinned, from the package index, each in a venv of its own, made on first use.

    python -m benchmarks.peers          # make all of them, say which cannot be had and why

They lie under ~/.cache/sparsewsi/peers (--peers-in of every script). Torch is installed once, in a venv that the others
read, so that it takes its 1 GB once.
"""

import argparse
import os
import subprocess
import sys
import venv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path.home() / ".cache" / "sparsewsi" / "peers"
TORCH = "torch==2.13.0"


@dataclass(frozen=True)
class Peer:
    """What pip is asked for; `alone` is installed without what it asks for itself (why stands at its place)."""

    requirements: tuple[str, ...]
    alone: tuple[str, ...] = ()
    torch: bool = False

    @property
    def named(self) -> tuple[str, ...]:
        """What the peer itself is, name==version."""
        return self.alone or self.requirements[:1]


PEERS = {
    "openslide-python": Peer(("openslide-python==1.4.7", "openslide-bin==4.0.1.2", "pillow==12.3.0", "numpy==2.4.6")),
    "tiffslide": Peer(("tiffslide==3.0.1", "imagecodecs==2026.3.6")),  # 4.0.0 asks for Python 3.12
    "fastslide": Peer(("fastslide==0.8.1", "numpy", "pillow")),
    # Asks for a torch older than ours, and for Jupyter, Sphinx and Bokeh, which reading does not use.
    "tiatoolbox": Peer(
        (
            *("openslide-python==1.4.3", "openslide-bin==4.0.0.8", "opencv-python-headless", "pandas", "shapely"),
            *("zarr", "tifffile==2026.3.3", "imagecodecs==2026.3.6", "joblib", "matplotlib", "psutil", "requests"),
            *("scikit-image", "dask", "pyyaml", "tqdm", "defusedxml", "glymur", "wsidicom", "SimpleITK"),
        ),
        alone=("tiatoolbox==2.1.3",),
        torch=True,
    ),
    # Asks for torchvision, which its own models use and finding tissue does not.
    "lazyslide": Peer(
        (
            *("wsidata==0.12.0", "legendkit", "matplotlib-scalebar", "numba", "psutil", "rich", "scikit-image"),
            *("scikit-learn", "seaborn", "huggingface-hub"),
        ),
        alone=("lazyslide==0.13.0",),
        torch=True,
    ),
    "hs2p": Peer(("hs2p==6.1.0", "openslide-python==1.4.7", "openslide-bin==4.0.1.2")),
    "softtorch": Peer(
        ("POT", "scipy", "numba", "torchopt"), alone=("softtorch==0.1.1",), torch=True
    ),  # states Python 3.12
    "difftopk": Peer(("difftopk==0.2.0",), torch=True),
    "torchsort": Peer(("torchsort==0.1.10",), torch=True),
    "pytopk": Peer(("pytopk==0.1.0",), torch=True),
}


class MissingPeer(Exception):
    """A peer that cannot be installed here; the message is the reason, in pip's words."""


def python_of(name: str, folder: Path = FOLDER) -> str:
    """The interpreter of a peer's venv, which is made if it is not there. Raises MissingPeer."""
    peer, place = PEERS[name], folder / name
    python, done = _python(place), place / "done"
    if done.exists():
        return str(python)
    venv.create(place, with_pip=True, clear=True)
    if peer.torch:
        shared = folder / "torch"
        if not (shared / "done").exists():
            venv.create(shared, with_pip=True, clear=True)
            _pip(_python(shared), TORCH, "numpy", "setuptools", "wheel")
            (shared / "done").touch()
        paths = "import sysconfig; print(sysconfig.get_path('purelib'))"
        here, there = (
            subprocess.run([which, "-c", paths], capture_output=True, text=True, check=True).stdout.strip()
            for which in (python, _python(shared))
        )
        (Path(here) / "torch.pth").write_text(there + "\n")
    # A package that compiles against torch must see it.
    build = ("--no-build-isolation",) if peer.torch else ()
    if peer.requirements:
        _pip(python, *build, *peer.requirements)
    if peer.alone:
        _pip(python, "--no-deps", "--ignore-requires-python", *peer.alone)
    done.touch()
    return str(python)


def installed(names: Iterable[str], folder: Path = FOLDER) -> tuple[dict[str, str], dict[str, str]]:
    """(peer -> interpreter, peer -> why it is missing)."""
    pythons, missing = {}, {}
    for name in names:
        try:
            pythons[name] = python_of(name, folder)
        except MissingPeer as reason:
            missing[name] = str(reason)
    return pythons, missing


def _python(place: Path) -> Path:
    return place / ("Scripts" if os.name == "nt" else "bin") / "python"


def _pip(python: Path, *arguments: str) -> None:
    # Without the PATH to nvcc: torchsort would compile for a GPU that torch is not built for.
    environment = os.environ | {"PATH": os.pathsep.join([str(python.parent), "/usr/bin", "/bin"])}
    command = [python, "-m", "pip", "install", "-q", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "rror" in line]
        raise MissingPeer((errors or done.stderr.splitlines() or ["pip said nothing"])[-1].strip())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(PEERS), metavar="PEER", help=", ".join(PEERS))
    parser.add_argument("--peers-in", type=Path, default=FOLDER)
    arguments = parser.parse_args()
    pythons, missing = installed(arguments.names, arguments.peers_in)
    for name, python in pythons.items():
        print(f"{name}: {python}")
    for name, reason in missing.items():
        print(f"{name}: {reason}", file=sys.stderr)


if __name__ == "__main__":
    main()
