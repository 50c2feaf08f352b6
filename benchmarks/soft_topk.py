"""Time of the soft top-K, forward and backward, as multiples of torch.softmax's and of torch.sort's (forward alone).

    python -m benchmarks.soft_topk [--sizes 10000 100000 1000000] [-k 32] [--tau 0.5] [--repeats 30] [--threads 1]

All rows of a size are measured in one run, in turns, so that another load on the machine falls on all of them; medians.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from train.sparselearn import soft_topk


def forward_backward(operator: Callable[[Tensor], Tensor], scores: Tensor, grad: Tensor) -> Callable[[], None]:
    def run() -> None:
        leaf = scores.detach().requires_grad_()
        operator(leaf).backward(grad)

    return run


def in_turns(tasks: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each task over rounds in which every task runs once."""
    taken: dict[str, list[float]] = {name: [] for name in tasks}
    for task in tasks.values():
        task()
    for _ in range(repeats):
        for name, task in tasks.items():
            start = time.perf_counter()
            task()
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("-k", type=float, default=32)
    parser.add_argument("--tau", type=float, default=0.5)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    k, tau = arguments.k, arguments.tau
    print(f"torch {torch.__version__}, {arguments.threads} thread, float32, K = {k:g}, tau = {tau:g}, medians")
    print(f"{'N':>9}  {'operator':<9}{'ms':>9}{'x softmax':>11}{'x sort':>9}")
    for n in arguments.sizes:
        scores, grad = torch.randn(n), torch.randn(n)
        kernels = {name: lambda z, name=name: soft_topk(z, k, tau, kernel=name) for name in ("laplace", "logistic")}
        operators = {"softmax": lambda z: z.softmax(-1)} | kernels
        tasks = {name: forward_backward(operator, scores, grad) for name, operator in operators.items()}
        seconds = in_turns(tasks | {"sort": scores.sort}, arguments.repeats)
        for name, taken in seconds.items():
            ratios = f"{taken / seconds['softmax']:>11.1f}{taken / seconds['sort']:>9.2f}"
            print(f"{n:>9}  {name:<9}{taken * 1e3:>9.3f}{ratios}")


if __name__ == "__main__":
    main()
