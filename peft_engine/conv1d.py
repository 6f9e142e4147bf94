"""transformers' Conv1D, the linear layer of GPT-2: y = x W + b, W (in_features, out_features).

The kernels read a weight by its rows of in_features, W^T here. `by_rows` moves the values so that W^T has
them: the Parameter, its shape and its values stay, its strides change.
"""

from typing import Any

from torch import nn


def plain(kind: type) -> type:
    """The class that a class of dense_layers.py stands for; any other class itself."""
    return kind.__dict__.get("stands_for", kind)


def is_conv1d(kind: type) -> bool:
    """Whether a class is transformers' Conv1D, which is imported nowhere here, or stands for it."""
    kind = plain(kind)
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer of torch's or transformers', or a subclass of one."""
    return isinstance(module, nn.Linear) or any(is_conv1d(kind) for kind in type(module).__mro__)


def features(layer: Any) -> tuple[int, int]:
    """in_features and out_features of a linear layer."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.nx, layer.nf


def by_rows(layer: Any) -> None:
    """Lays the weight of a Conv1D out as its transpose, (out_features, in_features), has it in rows."""
    layer.weight.data = layer.weight.data.t().contiguous().t()


def as_made(layer: Any) -> None:
    """Undoes by_rows."""
    layer.weight.data = layer.weight.data.contiguous()
