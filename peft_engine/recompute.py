"""Activations that the backward computes again from what is saved anyhow, and that are not kept for it.

For dA a layer needs its input. Where that is what a norm or a gated product gave, whose own backward has all
that it was made from, the layer saves that in the input's place: one more pass over it, with the same bits,
for as many bytes less between forward and backward as the input has. The op that makes such an output marks
its memory with `made_by`; whoever would save it asks `instead_of`.

Under hooks for saved tensors, and so inside torch's checkpointing, everything is kept as it is: there what is
saved may be dropped, moved or counted, and a mark would hold it. A write that autograd does not see (`.data`,
numpy) between the op and the layer is not seen here either.
"""

from collections.abc import Callable, Sequence

import torch
from torch import distributed

_MARK = "_peft_engine_made_by"


class Again:
    """How one activation is made again; its value is kept between the backwards of the layers it feeds."""

    __slots__ = ("_left", "_run", "_users", "_value")

    def __init__(self, run: Callable[..., torch.Tensor]):
        self._run, self._users, self._left = run, 0, 0
        self._value: torch.Tensor | None = None

    def one_more(self) -> "Again":
        """For one more layer, whose backward will ask once."""
        self._users += 1
        self._left += 1
        return self

    def __call__(self, *saved: torch.Tensor) -> torch.Tensor:
        """The activation, of the tensors that it was made from; in a backward."""
        kept = self._value
        value = self._run(*saved) if kept is None else kept
        self._left -= 1
        if self._left <= 0:
            self._drop()
        elif kept is None:
            self._value = value
            # not all of the layers may be gone through
            torch.autograd.Variable._execution_engine.queue_callback(self._drop)
        return value

    def _drop(self) -> None:
        self._value, self._left = None, self._users  # a graph that is kept may be gone through once more


def made_by(
    y: torch.Tensor,
    run: Callable[..., torch.Tensor],
    *saved: torch.Tensor,
    weights: Sequence[torch.Tensor] = (),
) -> torch.Tensor:
    """y, whose memory is marked as run(*saved, *weights), of tensors that y's own backward keeps.

    The mark lies on the memory and not on the tensor, whose attributes torch.save would write.
    """
    if y.requires_grad and _plain(y):
        held = (*(t.detach() for t in saved), *map(_lasting, weights))
        layout = y.shape, y.stride(), y.storage_offset(), y.is_contiguous()
        setattr(y.untyped_storage(), _MARK, (Again(run), held, layout, _versions(y, *held)))
    return y


def instead_of(x: torch.Tensor) -> tuple[Again | None, tuple[torch.Tensor, ...]]:
    """What to save for the backward in x's place, and how x is made again of it: None where it is x."""
    # what no longer hangs on the graph (detach, .data) may have been written to behind another counter
    mark = getattr(x.untyped_storage(), _MARK, None) if x.requires_grad and _plain(x) else None
    if mark is None:
        return None, (x,)
    again, held, (shape, stride, offset, contiguous), versions = mark
    whole = (x.shape, x.stride(), x.storage_offset()) == (shape, stride, offset) or (
        contiguous and x.is_contiguous() and x.numel() == shape.numel()
    )
    if not whole or _versions(x, *held) != versions:  # or one of them was written to since
        return None, (x,)
    return again.one_more(), held


def _plain(x: torch.Tensor) -> bool:
    """Whether x has memory of its own, and what is saved stays as it is. torch.compile decides for itself."""
    return (
        type(x) in (torch.Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
        and torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    )


def _lasting(weight: torch.Tensor) -> torch.Tensor:
    """A weight as it can be kept: fully_shard may have freed it before a layer asks for it."""
    alone = not distributed.is_available() or not distributed.is_initialized()
    return weight.detach() if alone else weight.detach().clone()


def _versions(*tensors: torch.Tensor) -> tuple[int, ...]:
    return tuple(t._version for t in tensors)
