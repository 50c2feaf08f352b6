"""The map of a slide's features: seconds of a first and of a later call, and peak memory.

    python -m benchmarks.feature_map [--sizes 10000 100000]

Each N in a process of its own, on features that lie in clusters. The first call imports umap-learn and compiles it.
"""

import argparse
import json
import time
from pathlib import Path

from benchmarks.child import run_child
from benchmarks.tables import OUT, Table, report

DIM, CLUSTERS = 1280, 20


def measure(n: int) -> None:
    import torch

    from sparsewsi import Selection
    from sparsewsi.report.umap import map_features

    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(CLUSTERS, DIM, generator=generator)
    features = torch.empty(n, DIM, dtype=torch.float16)
    for part in features.split(8192):
        which = torch.randint(CLUSTERS, (len(part),), generator=generator)
        part.copy_(centres[which] + torch.randn(part.shape, generator=generator))
    selection = Selection(torch.arange(32), torch.randn(n, generator=generator), torch.zeros(32, 4), n)
    taken, mapped = [], 0
    for _ in range(2):
        wall, cpu = time.perf_counter(), time.process_time()
        mapped = len(map_features(features, selection).rows)
        taken.append([time.perf_counter() - wall, time.process_time() - cpu])
    print(json.dumps({"first": taken[0], "later": taken[1], "mapped": mapped}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        measure(options.child)
        return
    rows = []
    for n in options.sizes:
        found, peak = run_child([__file__, "--child", str(n)])
        seconds = [f"{value:.1f}" for value in (*found["first"], *found["later"])]
        rows.append([f"{n:,}", f"{found['mapped']:,}", *seconds, f"{peak:.0f}"])
    columns = ["N", "mapped", "first call, s", "CPU-s", "later call, s", "CPU-s", "peak MB"]
    note = f"UMAP of N patches of {DIM} features; of a large slide a seeded part that holds every kept patch."
    report(Table("feature_map", columns, rows, note), options.out)


if __name__ == "__main__":
    main()
