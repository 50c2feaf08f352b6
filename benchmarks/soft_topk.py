"""Soft top-K, forward and backward, as multiples of torch.sort's time (forward alone), beside PyPI's operators.

    python -m benchmarks.soft_topk [--sizes 1000 100000 1000000] [-k 32] [--tau 0.5] [--repeats 10] [--peers softtorch]

Every operator runs in a process of its own, a peer in its venv (benchmarks/peers.py), on one thread; torch.sort,
torch.softmax and the operator take turns within it, so that another load on the machine falls on all three. Printed:
the median CPU time of the operator, and the medians of its ratios within a turn. A peer that does not end within
--limit CPU-seconds or --memory GB is named with the reason. The peers do not compute the same: softtorch and difftopk
give K rows over all N, torchsort soft ranks of all N, pytopk the smoothed K-th value.
"""

import argparse
import functools
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable

import torch  # nothing of ours up here: peers run this file without it
from torch import Tensor

Operator = Callable[[Tensor], Tensor]  # (N,) scores -> what is differentiated


def with_softtorch(n: int, k: int, tau: float, method: str) -> Operator:
    import softtorch

    return lambda scores: softtorch.topk(scores, k, softness=tau, method=method).indices.sum(-2)


def with_difftopk(n: int, k: int, tau: float) -> Operator:
    from difftopk import DiffTopkNet

    net = DiffTopkNet("bitonic", n, k, steepness=1 / tau, distribution="cauchy")
    return lambda scores: net(scores[None])[1].sum(-1)[0]


def with_torchsort(n: int, k: int, tau: float) -> Operator:
    import torchsort

    return lambda scores: torchsort.soft_rank(scores[None], regularization_strength=tau)[0]


def with_pytopk(n: int, k: int, tau: float) -> Operator:
    from pytopk import NoisedTopK

    return NoisedTopK(k, epsilon=tau, n_sample=5)


def ours(n: int, k: int, tau: float, kernel: str) -> Operator:
    from train.sparselearn import soft_topk

    return lambda scores: soft_topk(scores, k, tau, kernel=kernel)


# row of the table -> (peer whose venv it runs in, "" for ours; the operator)
OPERATORS: dict[str, tuple[str, Callable[[int, int, float], Operator]]] = {
    "ours, laplace": ("", functools.partial(ours, kernel="laplace")),
    "ours, logistic": ("", functools.partial(ours, kernel="logistic")),
    "softtorch, softsort": ("softtorch", functools.partial(with_softtorch, method="softsort")),
    "softtorch, neuralsort": ("softtorch", functools.partial(with_softtorch, method="neuralsort")),
    "difftopk, bitonic": ("difftopk", with_difftopk),
    "torchsort, soft_rank": ("torchsort", with_torchsort),
    "pytopk, NoisedTopK": ("pytopk", with_pytopk),
}


def cpu_seconds(task: Callable[[], object], least: float = 0.05) -> float:
    """Of one call, over as many as take at least `least` seconds: some clocks tick 100 times a second."""
    start, count, spent = time.process_time(), 0, 0.0
    while spent < least:
        task()
        count += 1
        spent = time.process_time() - start
    return spent / count


def measure(name: str, n: int, k: int, tau: float, repeats: int) -> dict[str, float]:
    """In a child: CPU-seconds of the operator and its ratios to torch.sort and to torch.softmax."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    scores = torch.randn(n)
    operator = OPERATORS[name][1](n, k, tau)
    grad = torch.randn(operator(scores.clone()).shape)

    def both_ways(operator: Operator, grad: Tensor) -> None:
        operator(scores.detach().requires_grad_()).backward(grad)

    tasks: list[Callable[[], object]] = [
        lambda: torch.sort(scores),
        lambda: both_ways(lambda x: x.softmax(-1), scores),
        lambda: both_ways(operator, grad),
    ]
    for task in tasks:  # warms up
        task()
    turns = [[cpu_seconds(task) for task in tasks] for _ in range(repeats)]
    return {
        "seconds": statistics.median(own for _, _, own in turns),
        "to_sort": statistics.median(own / sort for sort, _, own in turns),
        "to_softmax": statistics.median(own / softmax for _, softmax, own in turns),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 100_000, 1_000_000])
    parser.add_argument("-k", type=int, default=32)
    parser.add_argument("--tau", type=float, default=0.5)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--limit", type=int, default=120)
    parser.add_argument("--memory", type=int, default=8)
    peers = list(dict.fromkeys(peer for peer, _ in OPERATORS.values() if peer))
    parser.add_argument("--peers", nargs="*", default=peers, choices=peers)
    parser.add_argument("--peers-in")
    parser.add_argument("--out")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        resource.setrlimit(resource.RLIMIT_CPU, (options.limit, options.limit))
        resource.setrlimit(resource.RLIMIT_AS, (options.memory << 30, options.memory << 30))
        print(json.dumps(measure(options.child, options.sizes[0], options.k, options.tau, options.repeats)))
        return

    from pathlib import Path

    from benchmarks.child import run_child
    from benchmarks.peers import FOLDER, PEERS, installed
    from benchmarks.tables import OUT, Table, report

    pythons, missing = installed(options.peers, Path(options.peers_in) if options.peers_in else FOLDER)
    pythons[""] = sys.executable
    rows = []
    for n in options.sizes:
        for name, (peer, _) in OPERATORS.items():
            if peer not in pythons:
                continue
            same = ["-k", str(options.k), "--tau", str(options.tau), "--repeats", str(options.repeats)]
            limits = ["--limit", str(options.limit), "--memory", str(options.memory)]
            command = [__file__, "--child", name, "--sizes", str(n), *same, *limits]
            try:
                found, peak = run_child(command, pythons[peer])
            except RuntimeError as reason:
                why = "memory" if "alloc" in str(reason) or "Memory" in str(reason) else "time or error"
                rows.append([f"{n:,}", name, f"none ({why})", "", "", ""])
                print(f"{name} at {n}: {reason}", file=sys.stderr)
                continue
            figures = [f"{1e3 * found['seconds']:.2f} ms", f"{found['to_sort']:.2f}", f"{found['to_softmax']:.1f}"]
            rows.append([f"{n:,}", name, *figures, f"{peak:.0f}"])
    versions = ", ".join(requirement for name in pythons if name for requirement in PEERS[name].named)
    note = (
        f"Forward and backward, one thread, float32, K = {options.k}, tau = {options.tau:g}; "
        f"torch=={torch.__version__}, {versions}; at most {options.limit} CPU-s and {options.memory} GB."
    )
    note += "".join(f" Without {name}: {reason}" for name, reason in missing.items())
    columns = ["N", "operator", "CPU time", "x torch.sort", "x torch.softmax", "peak MB"]
    report(Table("soft_topk", columns, rows, note), Path(options.out) if options.out else OUT)


if __name__ == "__main__":
    main()
