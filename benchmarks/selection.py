"""The demo model's slide encoder, scorer and hard top-32 for N patches: CPU time, growth with N, peak memory.

    python -m benchmarks.selection [--model assets/demo-model] [--sizes 10000 100000 1000000]

Each N in a process of its own, on random features. Memory (Linux only) is stated beside that of the features
themselves, N x D in float16, which a bag holds in any case.
"""

import argparse
import json
import re
import time
from pathlib import Path

import numpy as np

from benchmarks.child import run_child
from benchmarks.tables import OUT, Table, report


def measure(model: str, n: int) -> None:
    import torch

    from sparsewsi import Bag, SparseWSI

    torch.set_num_threads(1)
    loaded = SparseWSI.from_pretrained(model)
    config = loaded.config
    features = torch.empty(n, config.feature_dim, dtype=torch.float16)
    for part in features.split(8192):
        part.copy_(torch.randn(part.shape))
    coords = torch.stack([torch.arange(n) % 1000, torch.arange(n) // 1000], 1).int() * 224
    bag = Bag(features, coords, 224, config.mpp, config.encoder, "slide 1")
    loaded.select(Bag(features[:64], coords[:64], 224, config.mpp, config.encoder, "slide 1"))  # warm
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    start = time.process_time()
    kept = loaded.select(bag)
    seconds = time.process_time() - start
    assert len(kept.indices) == config.num_tokens
    memory = {"features": features.nbytes / 2**20, "more": _status("VmHWM") - before, "peak": _status("VmHWM")}
    print(json.dumps({"seconds": seconds} | memory))


def _status(key: str) -> float:
    """MB of this process: VmRSS is what it holds, VmHWM the most it held."""
    found = re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None, f"no {key}"
    return int(found[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="assets/demo-model")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        measure(options.model, options.child)
        return
    rows, seconds = [], []
    for n in options.sizes:
        found, _ = run_child([__file__, "--model", options.model, "--child", str(n)])
        seconds.append(found["seconds"])
        memory = [f"{found['features']:.0f}", f"{found['more']:.0f}", f"{found['peak']:.0f}"]
        rows.append([f"{n:,}", f"{found['seconds']:.2f}", f"{1e6 * found['seconds'] / n:.0f}", *memory])
    exponent = np.polyfit(np.log(options.sizes), np.log(seconds), 1)[0]
    note = f"Slide encoder, scorer and hard top-32 on one thread: time grows as N to the power of {exponent:.2f}."
    columns = ["N", "CPU-s", "us per patch", "features, MB", "more while selecting, MB", "process at most, MB"]
    report(Table("selection", columns, rows, note), options.out)


if __name__ == "__main__":
    main()
