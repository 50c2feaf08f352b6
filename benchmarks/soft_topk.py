"""Time of the soft top-K, forward and backward, as multiples of torch.softmax's and of torch.sort's (forward alone).

    python -m benchmarks.soft_topk [--sizes 10000 100000 1000000] [-k 32] [--tau 0.5] [--repeats 10] [--threads 1]

All rows of a size are measured in one run, in turns, so that another load on the machine falls on all of them. The
least times are those to compare on a busy machine.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from train.sparselearn import soft_topk


def forward_backward(operator: Callable[[Tensor], Tensor], scores: Tensor, grad: Tensor) -> Callable[[], None]:
    def run() -> None:
        leaf = scores.detach().requires_grad_()
        operator(leaf).backward(grad)

    return run


def in_turns(tasks: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, tuple[float, float]]:
    """(median, least) seconds of each task; in every round each runs once to warm the caches and five times timed."""
    taken: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(repeats):
        for name, task in tasks.items():
            task()
            for _ in range(5):
                start = time.perf_counter()
                task()
                taken[name].append(time.perf_counter() - start)
    return {name: (statistics.median(times), min(times)) for name, times in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("-k", type=float, default=32)
    parser.add_argument("--tau", type=float, default=0.5)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    k, tau = arguments.k, arguments.tau
    print(f"torch {torch.__version__}, {arguments.threads} thread(s), float32, K = {k:g}, tau = {tau:g}")
    print(f"{'':>9}  {'':<9}{'median':>27}{'least':>32}")
    print(f"{'N':>9}  {'':<9}" + 2 * f"{'ms':>11}{'x softmax':>12}{'x sort':>9}")
    for n in arguments.sizes:
        scores, grad = torch.randn(n), torch.randn(n)
        kernels = {name: lambda z, name=name: soft_topk(z, k, tau, kernel=name) for name in ("laplace", "logistic")}
        operators = {"softmax": lambda z: z.softmax(-1)} | kernels
        tasks: dict[str, Callable[[], object]] = {"sort": functools.partial(torch.sort, scores)}
        for name, operator in operators.items():
            tasks[name] = forward_backward(operator, scores, grad)
        seconds = in_turns(tasks, arguments.repeats)
        for name, both in seconds.items():
            columns = (
                f"{taken * 1e3:>11.3f}{taken / softmax:>12.1f}{taken / sort:>9.2f}"
                for taken, softmax, sort in zip(both, seconds["softmax"], seconds["sort"], strict=True)
            )
            print(f"{n:>9}  {name:<9}" + "".join(columns))


if __name__ == "__main__":
    main()
