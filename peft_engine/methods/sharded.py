"""Weights that torch's fully_shard (FSDP2) has spread over processes: DTensors, of which each holds a part.

Training needs nothing: a module's weights are whole while it runs. What reads or replaces weights beside a
forward does.
"""

from collections.abc import Callable, Sequence

import torch
from torch import distributed, nn


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether this process holds a part of the tensor only."""
    return hasattr(tensor, "full_tensor")  # a DTensor's; its class takes long to import


def class_of(module: nn.Module) -> type:
    """The module's class, below the one that fully_shard has put on top of it."""
    over = type(module)
    return over.__bases__[1] if over.__name__.startswith("FSDP") and len(over.__bases__) == 2 else over


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of the tensor; where it is sharded every process must call this."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def refuse(model: nn.Module, who: str) -> None:
    """ValueError for a model whose weights are spread, before its layers are changed."""
    for path, parameter in model.named_parameters():
        if is_sharded(parameter):
            raise ValueError(
                f"{who}: {path} is spread over processes by fully_shard, which no longer manages what is "
                f"changed afterwards: call {who} first, then fully_shard"
            )
    refuse_flat(model, who)


def refuse_flat(model: nn.Module, who: str) -> None:
    """ValueError for torch's older FSDP, whose parameters are pieces of one flat tensor."""
    for path, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise ValueError(
                f"{who}: {path or 'the model'} is wrapped by FullyShardedDataParallel, which cuts weights "
                "into flat pieces; use torch.distributed.fsdp.fully_shard"
            )


def on_first(write: Callable[[], object], tensors: Sequence[torch.Tensor]) -> None:
    """Runs `write`; where a tensor is sharded in the first process alone, and the others wait for it.

    What it raises is raised in all of them, so that none waits for ever.
    """
    if not any(is_sharded(tensor) for tensor in tensors):
        write()
        return
    failed: list[Exception | None] = [None]
    if distributed.get_rank() == 0:
        try:
            write()
        except Exception as error:
            failed = [error]
    distributed.broadcast_object_list(failed)
    if failed[0] is not None:
        raise failed[0]


def gathers(model: nn.Module) -> bool:
    """Whether layers of the model gather their weights to run, and free them afterwards."""
    return (
        distributed.is_available()
        and distributed.is_initialized()
        and any(hasattr(module, "set_reshard_after_backward") for module in model.modules())
    )


def after(output: torch.Tensor, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """The tensors, whose backward waits for that of `output`, which gets a gradient of zeros.

    fully_shard gathers a layer's weights when the gradient of its output comes; what was taken from inside a
    layer may be all that has one.
    """
    return _After.apply(output, *tensors)


class _After(torch.autograd.Function):
    @staticmethod
    def forward(ctx, output, *tensors):
        ctx.output = output.shape, output.dtype, output.device
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx, *gradients):
        shape, dtype, device = ctx.output
        return torch.zeros(shape, dtype=dtype, device=device), *gradients
