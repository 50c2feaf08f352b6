"""The processes of a run under torchrun, and what they sum and share."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from train.sharding import is_sharded


def rank() -> int:
    """Number of this process among those of the run."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes of the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def choose_device(environment: Mapping[str, str], gpus: int) -> tuple[str, torch.device]:
    """Backend and device of this process, given torchrun's environment and the GPUs of the machine.

    Raises ValueError for more processes on a machine than it has GPUs.
    """
    if not gpus:
        return "gloo", torch.device("cpu")
    local = int(environment.get("LOCAL_RANK", "0"))
    if local >= gpus:
        raise ValueError(f"process {local} of this machine has no GPU: there are {gpus}. Lower --nproc_per_node.")
    return "nccl", torch.device("cuda", local)  # not yet run on a GPU


def sum_over_processes(values: Tensor) -> Tensor:
    """Sums of values over all processes; nothing waits for the device that they lie on."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def share_weights(stage: nn.Module) -> None:
    """Give all processes the first one's trained weights: GPUs that computed the same may differ in the last bit."""
    if dist.is_initialized():
        for parameter in stage.parameters():
            if parameter.requires_grad and not is_sharded(parameter):
                dist.broadcast(parameter.data, 0)


def sum_gradients(stage: nn.Module) -> None:
    """Sum the gradients over all processes in one message.

    DistributedDataParallel would average and would want every parameter used; in dense steps the scorer is not.
    Gradients of sharded parameters have been summed on their way back.
    """
    gradients = [parameter.grad for parameter in stage.parameters() if parameter.grad is not None]
    gradients = [gradient for gradient in gradients if not is_sharded(gradient)]
    if dist.is_initialized() and gradients:
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients])):
            gradient.copy_(part.view_as(gradient))
