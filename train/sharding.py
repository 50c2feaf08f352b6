"""An LLM that does not fit: its layers lie in shards on all processes (FSDP2), those of LoRA with them.

Everything else (slide encoder, scorer, denoiser, projector, the LLM's input vectors) stays whole in every process, as
without sharding. Checkpoints are the same files either way: what is trained is gathered when it is written.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def share_embedding(llm: nn.Module, device: torch.device) -> None:
    """Put the LLM's input vectors onto `device` in every process, as the first process has them."""
    _share(llm, set(llm.get_input_embeddings().parameters()), device)  # type: ignore[operator]


def shard(llm: nn.Module, device: torch.device) -> None:
    """Shard an LLM, layer by layer, onto `device`: at most one layer there is whole.

    The first process has the weights in the CPU's memory. All others may have them on the meta device, but for the
    input vectors (share_embedding): each gets them from the first one, a layer at a time. Gradients are summed over the
    processes, as train.run.sum_gradients does for all other parts. Every process must run the LLM equally often. Raises
    ValueError outside torchrun and for an LLM that does not tell its layers.
    """
    if not dist.is_initialized():
        raise ValueError("--fsdp shards the LLM over several processes. Start with torchrun --nproc_per_node=N, N > 1.")
    names = {name for part in llm.modules() for name in getattr(part, "_no_split_modules", None) or ()}
    layers = [part for part in llm.modules() if type(part).__name__ in names]
    if not layers:
        raise ValueError(f"{type(llm).__name__} does not tell its layers (_no_split_modules). Train without --fsdp.")
    embedding = set(llm.get_input_embeddings().parameters())  # type: ignore[operator]  # run by itself, before the LLM
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for part in [*layers, llm]:
        _share(part, {each for each in part.parameters() if not is_sharded(each)} - embedding, device)
        sharded = fully_shard(part, mesh=mesh, ignored_params=embedding)
        assert isinstance(sharded, FSDPModule)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)  # the loss is divided by all processes' answer tokens


def _share(module: nn.Module, parameters: set[nn.Parameter], device: torch.device) -> None:
    """Put these parameters of a module onto `device` in every process, as the first process has them."""
    moved: dict[nn.Parameter, nn.Parameter] = {}
    for part in module.modules():
        for name, old in part._parameters.items():
            if old is None or old not in parameters:
                continue
            if old not in moved:  # tied weights stay one
                data = torch.empty_like(old, device=device) if old.is_meta else old.detach().to(device)
                dist.broadcast(data, 0)  # not yet run on a GPU: on two CPU processes it was
                moved[old] = nn.Parameter(data, requires_grad=old.requires_grad)
            part._parameters[name] = moved[old]


def is_sharded(tensor: Tensor | None) -> bool:
    """Whether a parameter or gradient lies in shards."""
    return isinstance(tensor, DTensor)


def here(tensor: Tensor) -> Tensor:
    """This process's part of a tensor: its shard, or all of it where it is whole."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(value: Any) -> Any:
    """A sharded tensor put together, on the CPU; anything else as it is. All processes must call it."""
    return value.full_tensor().cpu() if isinstance(value, DTensor) else value


def clip_gradients(parameters: Sequence[nn.Parameter], most: float) -> Tensor:
    """nn.utils.clip_grad_norm_ for parameters some of which are sharded; returns the norm before clipping."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    squares = torch.zeros(2, device=gradients[0].device)  # of the whole ones, of the shards here
    for gradient in gradients:
        squares[int(is_sharded(gradient))] += here(gradient).float().square().sum()
    dist.all_reduce(squares[1:])
    norm = squares.sum().sqrt()
    for gradient in gradients:
        here(gradient).mul_((most / (norm + 1e-6)).clamp(max=1.0))
    return norm


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Within: the sharded parameters that are trained stand whole in their places, so that they can be saved.

    All processes must enter it. Nothing may be run within.
    """
    swapped = []
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if parameter.requires_grad and is_sharded(parameter):
                swapped.append((part, name, parameter, nn.Parameter(whole(parameter.detach()))))
    for part, name, _, replacement in swapped:
        part._parameters[name] = replacement
    try:
        yield
    finally:
        for part, name, parameter, _ in swapped:
            part._parameters[name] = parameter


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """optimizer.state_dict() with every tensor whole. All processes must call it."""
    state = optimizer.state_dict()
    held = {number: {name: whole(value) for name, value in values.items()} for number, values in state["state"].items()}
    return state | {"state": held}


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load the moments that optimizer_state gave, sharded where the parameters are; rates stay as they are.

    The parameters must come in the same groups: raises ValueError if these differ.
    """
    groups = optimizer.state_dict()["param_groups"]  # flags that changed count, not the checkpoint's
    if [group["params"] for group in groups] != [group["params"] for group in state["param_groups"]]:
        raise ValueError(
            "the checkpoint's optimizer has other groups of parameters, as when two learning rates were equal and are "
            "not now, or the other way. Go on with the rates it had, or choose another --out."
        )
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, values in state["state"].items():
        parameter = parameters[number]
        if isinstance(parameter, DTensor):
            for name, value in values.items():
                if value.shape == parameter.shape:
                    value = value.to(parameter.device)
                    values[name] = distribute_tensor(
                        value, parameter.device_mesh, parameter.placements, src_data_rank=None
                    )
    optimizer.load_state_dict(state | {"param_groups": groups})
