"""What is installed, which weights are at hand, and whether this machine can run a preset: `sparsewsi doctor`."""

import argparse
import importlib.util
import os
import platform
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from sparsewsi.bags.encoders import ENCODERS
from sparsewsi.files import cache_folder
from sparsewsi.presets import BYTES, PRESETS, Preset

PATIENCE = 4.0  # s that the hub has to answer
# Package, and the extra that brings it; "" the base install.
PACKAGES = {
    "torch": "",
    "transformers": "",
    "peft": "",
    "openslide-python": "",
    "openvino": "",
    "gradio": "",
    "timm": "encoders",
    "torchvision": "encoders",
    "ray": "cluster",
    "trackio": "train",
    "bitsandbytes": "-",  # no extra: 4-bit loading on a GPU
}
GATES = {"yes": "on request", "no": "open", "unclear": "sources disagree"}


# ---- tables of what there is


def lay_out(head: Sequence[str], rows: Iterable[Sequence[str]], markdown: bool = False) -> str:
    """A table, in Markdown or in columns for a terminal."""
    lines = [list(head), *(list(row) for row in rows)]
    if markdown:
        return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], ["---"] * len(head), *lines[1:]])
    widths = [max(len(line[place]) for line in lines) for place in range(len(head))]
    padded = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
    return "\n".join(padded)


def count(parameters: int) -> str:
    """1_134_774_272 -> "1.13 B" """
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.3g} M"


def list_encoders() -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and rows of the table of patch encoders."""
    head = ("encoder", "weights", "licence", "gate", "parameters", "D", "µm/px")
    rows = [
        (name, row.source, row.licence, GATES[row.gate], count(row.parameters), str(row.dim), f"{row.mpp:g}")
        for name, row in ENCODERS.items()
    ]
    return head, rows


def list_presets() -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and rows of the table of presets."""
    head = ("preset", "who reads what", "encoder", "µm/px", "licence", "gate", "parameters", "memory")
    rows = [
        (
            preset.id,
            preset.what,
            preset.encoder,
            f"{preset.mpp:g}",
            preset.licence,
            GATES[preset.gate],
            count(preset.parameters),
            f"{memory_of(preset)} GB",
        )
        for preset in PRESETS.values()
    ]
    return head, rows


def memory_of(preset: Preset) -> int:
    """GB that a preset takes, estimated."""
    return preset.estimate_memory(ENCODERS[preset.encoder].parameters)


# ---- what this machine has


def find_packages() -> list[tuple[str, str]]:
    """Each package with its version, or with what installs it."""
    found = []
    for name, extra in PACKAGES.items():
        try:
            state = version(name)
        except PackageNotFoundError:
            how = "pip install " + (name if extra in ("", "-") else f"'sparsewsi[{extra}]'")
            state = f"not installed ({how})"
        found.append((name, state))
    return found


def find_memory() -> tuple[float, str, int]:
    """GB that a model may take here, what has them (the GPU with the most, else the free part of the RAM), and the
    bytes that a parameter takes there."""
    import torch

    from sparsewsi.model.llm import default_device, default_dtype

    wide = default_dtype(default_device()).itemsize
    if torch.cuda.is_available():
        devices = [(torch.cuda.mem_get_info(number)[1], number) for number in range(torch.cuda.device_count())]
        size, number = max(devices)
        return size / 1e9, torch.cuda.get_device_name(number), wide
    return free_ram() / 1e9, f"free RAM; no GPU that torch sees, {8 * wide} bits a parameter", wide


def free_ram() -> int:
    """Bytes of RAM that are free or can be freed."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (OSError, ValueError, AttributeError):  # not Linux
        return 0


def hub_cache() -> Path:
    """Where the hub's client keeps what it fetches."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def free_disk(folder: Path) -> float:
    """GB that are free where a folder is or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free / 1e9


# ---- where weights are


def is_cached(repo: str) -> bool:
    """Whether weights of a repository lie in the hub's cache."""
    snapshots = hub_cache() / f"models--{repo.replace('/', '--')}" / "snapshots"
    return any(file.suffix in (".safetensors", ".bin", ".pth") for file in snapshots.glob("*/**/*"))


def within(seconds: float, ask: Callable[[], str], otherwise: str) -> str:
    """What `ask` says, or `otherwise` where it takes longer; a lookup of a name that never ends is left behind."""
    said: list[str] = []
    thread = threading.Thread(target=lambda: said.append(ask()), daemon=True)
    thread.start()
    thread.join(seconds)
    return said[0] if said else otherwise


def probe_hub() -> str:
    """Why the hub cannot be asked, or "" if it can."""
    from sparsewsi.bags.hub import require_hub

    def ask() -> str:
        try:
            require_hub("", "")
        except ValueError as error:
            return str(error).rpartition(" (")[2].partition(")")[0]
        return ""

    return within(PATIENCE, ask, f"no answer in {PATIENCE:g} s")


def probe_repository(repo: str) -> str:
    """Whether the files of a repository could be fetched now."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    def ask() -> str:
        try:
            HfApi().auth_check(repo)
        except GatedRepoError:
            return f"gated: accept the terms at https://huggingface.co/{repo}, then hf auth login"
        except RepositoryNotFoundError:
            return "not at the hub, or private"
        except OSError as error:
            return f"cannot be asked for ({type(error).__name__})"
        return "reachable"

    return within(PATIENCE, ask, f"no answer in {PATIENCE:g} s")


def weights_of(preset: Preset) -> tuple[str, ...]:
    """Repositories that a preset needs."""
    row = ENCODERS[preset.encoder]
    return (*preset.source, row.source) if row.on_hub else preset.source


def find_weights(repositories: Iterable[str]) -> tuple[dict[str, str], str]:
    """Each repository with "cached", "reachable", or why it is not; and why the hub cannot be asked, asked once."""
    states = {repo: "cached" if is_cached(repo) else "" for repo in repositories}
    away = probe_hub() if not all(states.values()) else ""
    return {repo: state or ("not cached" if away else probe_repository(repo)) for repo, state in states.items()}, away


def find_demo() -> str:
    """Whether the demonstration model can start without a network."""
    from sparsewsi.model.config import DEFAULT_MODEL
    from sparsewsi.model.embedded import EMBEDDED, GGUF_SHA256, is_whole

    if not (DEFAULT_MODEL / "model.safetensors").is_file():
        return "the demonstration model is not installed: install sparsewsi from its repository or wheel"
    whole = is_whole(cache_folder() / f"{EMBEDDED}-{GGUF_SHA256[:8]}")
    return "cached" if whole else "its LLM is fetched from the package index on first use (98 MB)"


# ---- the report


def report(presets: Sequence[Preset]) -> str:
    """Everything that doctor says about these presets."""
    memory, what, wide = find_memory()
    caches = {"weights of the hub": hub_cache(), "own files": cache_folder()}
    machine = [
        ("Python", platform.python_version()),
        *find_packages(),
        ("processor cores", str(os.cpu_count())),
        ("memory for models", f"{memory:.0f} GB ({what})" if memory else what),
        *((f"disk for {name}", f"{free_disk(folder):.0f} GB free") for name, folder in caches.items()),
    ]
    states, away = find_weights({repo for preset in presets for repo in weights_of(preset)})
    rows = []
    for preset in presets:
        needed = memory_of(preset) * wide // BYTES
        fits = "fits" if memory >= needed else f"{needed - memory:.0f} GB too few" if memory else "not known"
        rows.append((preset.id, f"{needed} GB", fits, preset.encoder, look_at_encoder(preset.encoder)))
        rows += [("", "", "", repo, states[repo]) for repo in weights_of(preset)]
        if not preset.source:
            rows.append(("", "", "", "demonstration model", find_demo()))
    parts = [lay_out(("", "here"), machine), lay_out(("preset", "memory", "here", "needs", "state"), rows)]
    if away:
        parts.append(f"The Hugging Face hub cannot be reached ({away}).")
    if len(presets) == 1:
        parts.append("\n".join(["Run:", *(f"  {line}" for line in presets[0].run)]))
    return "\n\n".join(parts)


def look_at_encoder(name: str) -> str:
    """Whether the package that builds a preset's encoder is here."""
    if ENCODERS[name].on_hub and name != "midnight" and importlib.util.find_spec("timm") is None:
        return "needs pip install 'sparsewsi[encoders]'"
    return "can be built"


def main(argv: Sequence[str] | None = None) -> int:
    """The command doctor; returns the exit status."""
    parser = argparse.ArgumentParser(prog="sparsewsi doctor", description=__doc__)
    parser.add_argument("--preset", choices=PRESETS, metavar="PRESET", help=f"only this one: {', '.join(PRESETS)}")
    parser.add_argument("--tables", action="store_true", help="print the tables of presets and encoders in Markdown")
    given = parser.parse_args(argv)
    if given.tables:
        print("\n\n".join(lay_out(*table, markdown=True) for table in (list_presets(), list_encoders())))
        return 0
    print(report([PRESETS[given.preset]] if given.preset else list(PRESETS.values())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
