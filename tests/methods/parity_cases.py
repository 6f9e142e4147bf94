"""Small models, adapters and steps that are the same here and under the `adapters` library.

Weights and inputs come from numpy by name, so that two versions of transformers start from the same bits.
Only torch, numpy and transformers are imported: tests/fixtures/adapters_parity.py runs it with the library.
"""

import zlib
from typing import Any

import families
import numpy
import torch
from torch import nn

STEPS = 20
HOULSBY = {"mh_adapter": True, "output_adapter": True, "non_linearity": "swish", "reduction_factor": 4}
PFEIFFER = {
    "mh_adapter": False, "output_adapter": True, "non_linearity": "relu", "reduction_factor": 4,
    "original_ln_before": True,
}  # fmt: skip
PARALLEL = {
    "mh_adapter": False, "output_adapter": True, "non_linearity": "relu", "reduction_factor": 2,
    "is_parallel": True, "scaling": 4.0, "init_weights": "mam_adapter",
}  # fmt: skip
PRESETS = {"houlsby": HOULSBY, "pfeiffer": PFEIFFER, "parallel": PARALLEL}
CROSS = HOULSBY | {"cross_adapter": True, "non_linearity": "gelu", "leave_out": [0, 3]}
BOTH = {
    "mh_adapter": True,
    "output_adapter": True,
    "non_linearity": "tanh",
    "reduction_factor": {"1": 8, "default": 4},
}
NORMS = {"ln_before": True, "ln_after": True}
VARIANTS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "cross": (("t5", "bart"), CROSS),
    "norms": (("bert", "gpt2"), BOTH | NORMS),
    "norms-inside": (("bert",), BOTH | NORMS | {"adapter_residual_before_ln": True}),
    "norms-parallel": (("bert",), BOTH | NORMS | {"is_parallel": True}),
    "read-what-is-added": (
        ("bert", "gpt2"),
        BOTH | {"original_ln_before": True, "residual_before_ln": False},
    ),
    "post-add": (("bert",), BOTH | {"original_ln_before": True, "residual_before_ln": "post_add"}),
    "two-norms": (("bert",), BOTH | {"original_ln_before": True, "ln_before": True}),
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    f"{family}-{preset}": (family, fields)
    for family in ("llama", "mistral", "gpt2", "bert", "roberta", "t5", "bart")
    for preset, fields in PRESETS.items()
} | {
    f"{family}-{variant}": (family, fields)
    for variant, (names, fields) in VARIANTS.items()
    for family in names
}  # fmt: skip


def values(name: str, shape: tuple[int, ...], scale: float) -> torch.Tensor:
    """Normal numbers that depend on the name alone."""
    generator = numpy.random.default_rng(zlib.crc32(name.encode()))
    return torch.from_numpy((scale * generator.standard_normal(shape)).astype(numpy.float32))


@torch.no_grad()
def set_by_name(tensors: dict[str, nn.Parameter]) -> None:
    """Sets parameters by their names: matrices small, norms near one."""
    for name, tensor in tensors.items():
        near_one = "norm" in name.lower() or "ln_" in name
        tensor.copy_(values(name, tuple(tensor.shape), 0.15))
        if tensor.dim() == 1 and near_one and not name.endswith("bias"):
            tensor.add_(1.0)


def build(family: str) -> Any:
    """The family's small model, its weights set by name."""
    model = families.build(family)
    set_by_name(dict(model.named_parameters()))
    return model


def train(model: nn.Module, parameters: list[nn.Parameter], family: str) -> list[float]:
    """The losses of some steps of AdamW on two batches in turn."""
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.01)
    batches = [families.inputs(family, seed=seed) for seed in range(2)]
    losses = []
    for step in range(STEPS):
        loss = model(**batches[step % 2]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses
