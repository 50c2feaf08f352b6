"""A whole slide from file to features beside the encoder alone on ready tensors: seconds, their ratio, peak memory.

    python -m benchmarks.end_to_end SLIDE [--encoder efficientnet-lite0] [--patches 0] [--runs 3]

Both in processes of their own, in turn, as many patches each, without imports and loading the encoder: extract_bag
with tissue, reading and encoding, and the same batches of one set of patches that were read before the clock started.
--patches takes so many, evenly spaced, for a quick look: they share no tiles, so that reading costs more than twice as
much a patch.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

from benchmarks.child import run_child
from benchmarks.tables import OUT, Table, report

BATCH = 32


def measure(slide: str, encoder: str, patches: int | None, alone: bool) -> None:
    from sparsewsi import extract_bag
    from sparsewsi.bags.encoders import load_encoder
    from sparsewsi.bags.extract import choose_coords, read_patches
    from sparsewsi.slides.slide import open_slide

    loaded = load_encoder(encoder)
    with open_slide(slide) as opened:
        coords = choose_coords(opened, 0.5, 224, patches)
        ready, _ = next(iter(read_patches(opened, coords[:BATCH], 0.5, 224, BATCH)))
    loaded(ready)  # kernels are chosen on the first call
    wall, cpu = time.perf_counter(), time.process_time()
    if alone:
        for start in range(0, len(coords), BATCH):
            loaded(ready[: min(BATCH, len(coords) - start)])
    else:
        assert len(extract_bag(slide, loaded, batch_size=BATCH, max_patches=patches).features) == len(coords)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(json.dumps({"wall": wall, "cpu": cpu, "patches": len(coords)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slide")
    parser.add_argument("--encoder", default="efficientnet-lite0")
    parser.add_argument("--patches", type=int, default=0)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--child", choices=("whole", "alone"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        measure(options.slide, options.encoder, options.patches or None, options.child == "alone")
        return
    same = [__file__, options.slide, "--encoder", options.encoder, "--patches", str(options.patches), "--child"]
    runs = [{which: run_child([*same, which]) for which in ("whole", "alone")} for _ in range(options.runs)]
    rows = []
    for which, name in (("whole", "from the file"), ("alone", "encoder alone")):
        cells = [name, f"{runs[0][which][0]['patches']:,}"]
        for key in ("wall", "cpu"):
            seconds = statistics.median(run[which][0][key] for run in runs)
            ratio = statistics.median(run[which][0][key] / run["alone"][0][key] for run in runs)
            cells += [f"{seconds:.1f}", f"{ratio:.2f}"]
        rows.append([*cells, f"{max(run[which][1] for run in runs):.0f}"])
    note = f"{options.encoder}, one slide, median of {options.runs} run(s), ratios within a run."
    report(Table("end_to_end", ["", "patches", "wall, s", "x", "CPU-s", "x", "peak MB"], rows, note), options.out)


if __name__ == "__main__":
    main()
