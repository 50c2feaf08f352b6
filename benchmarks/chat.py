"""Time to first token and memory with 32 visual tokens and with many, of one LLM in one run, as ratios to 32.

    python -m benchmarks.chat [--llm smollm2-135m] [--tokens 32 1024 4096 8192] [--repeats 3]

Every number of tokens in a process of its own, in turn; 98 text tokens follow the visual ones, whose content does not
matter to the time. Memory: the KV cache, and what the process took beyond the loaded LLM. `python -m
train.studies.flops` has the same by formula, for Qwen2.5-7B too.
"""

import argparse
import json
import resource
import statistics
import time
from pathlib import Path

from benchmarks.child import run_child
from benchmarks.tables import OUT, Table, report

TEXT = 98


def measure(name: str, tokens: int) -> None:
    import torch

    from sparsewsi.model.llm import load_llm

    llm, _ = load_llm(name)
    width = llm.config.hidden_size
    with torch.inference_mode():
        llm(inputs_embeds=torch.randn(1, 8, width, dtype=llm.dtype, device=llm.device))  # warm
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        inputs = torch.randn(1, tokens + TEXT, width, dtype=llm.dtype, device=llm.device)
        wall, cpu = time.perf_counter(), time.process_time()
        output = llm(inputs_embeds=inputs, use_cache=True, logits_to_keep=1)
        first = int(output.logits[0, -1].argmax())
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    assert first >= 0
    kv = sum(part.nbytes for layer in output.past_key_values.layers for part in (layer.keys, layer.values)) / 2**20
    more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before
    print(json.dumps({"wall": wall, "cpu": cpu, "kv": kv, "more": more, "threads": torch.get_num_threads()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llm", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, nargs="+", default=[32, 1024, 4096, 8192])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        measure(options.llm, options.child)
        return
    runs: dict[int, list[dict]] = {tokens: [] for tokens in options.tokens}
    for _ in range(options.repeats):
        for tokens in options.tokens:
            runs[tokens].append(run_child([__file__, "--llm", options.llm, "--child", str(tokens)])[0])
    base = runs[options.tokens[0]]
    rows = []
    for tokens, found in runs.items():

        def middle(key: str, found: list[dict] = found) -> tuple[float, float]:
            """The median, and the median of the ratios within a round."""
            return statistics.median(one[key] for one in found), statistics.median(
                one[key] / max(few[key], 1e-9) for one, few in zip(found, base)
            )

        (wall, slower), (cpu, more_cpu), (kv, larger) = middle("wall"), middle("cpu"), middle("kv")
        more = statistics.median(one["more"] for one in found)
        times = [f"{wall:.2f}", f"{slower:.1f}", f"{cpu:.2f}", f"{more_cpu:.1f}"]
        rows.append([f"{tokens:,}", *times, f"{kv:.1f}", f"{larger:.1f}", f"{more:.0f}"])
    note = f"{options.llm}, {TEXT} text tokens, {base[0]['threads']} thread(s), median of {options.repeats} run(s)."
    columns = ["visual tokens", "first token, s", "x", "CPU-s", "x", "KV cache, MB", "x", "process grew by, MB"]
    report(Table("chat", columns, rows, note), options.out)


if __name__ == "__main__":
    main()
