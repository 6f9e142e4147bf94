"""The settings of bottleneck adapters, with the names that the `adapters` library (AdapterHub) gives them."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from peft_engine.methods import peft_config
from peft_engine.ops.bottleneck import ACTIVATIONS, ALIASES

INITS = ("bert", "mam_adapter", "houlsby")
FACTOR = 16
LEAST_FACTOR = 0.001  # beyond, a bottleneck would be a thousand times as wide as what goes into it
# Fields of the library at the one value that is offered, and why not at others.
UNSUPPORTED: dict[str, tuple[Any, str]] = {
    "original_ln_after": (True, "the layer adds its input, and norms, behind every adapter"),
    "use_gating": (False, "a gate is another module than the op computes"),
    "inv_adapter": (None, "an invertible adapter at the embedding is another method"),
    "inv_adapter_reduction_factor": (None, "it belongs to inv_adapter"),
    "phm_layer": (False, "weights made of Kronecker products (Compacter) are another method"),
    "stochastic_depth": (0.0, "dropping whole adapters is for vision models, which are not offered"),
}
SWITCHES = (
    "mh_adapter", "output_adapter", "cross_adapter", "original_ln_before", "ln_before", "ln_after",
    "adapter_residual_before_ln", "is_parallel",
)  # fmt: skip


@dataclass(frozen=True)
class BottleneckConfig:
    """A bottleneck adapter's settings: the fields of the `adapters` library's BnConfig, and `width`.

    mh_adapter           adapters behind the self-attentions; output_adapter: behind the feed-forwards;
                         cross_adapter: behind the decoder's attentions to the encoder
    reduction_factor     hidden size / width of the bottleneck: a number, or one by layer as in
                         {"1": 8, "default": 16}; 16 when nothing is given
    width                the width itself, in place of reduction_factor
    non_linearity        relu, gelu (by erf), silu (swish) or tanh
    is_parallel          beside the sublayer, on the layer's state before it (He et al.); else behind it
    scaling              the factor of what the adapter adds
    original_ln_before   the adapter reads the layer's sum, normed where the layer norms it (Pfeiffer et al.);
                         else what the sublayer gives (Houlsby et al.)
    residual_before_ln   with original_ln_before, what the adapter adds to: True what the sublayer gives,
                         False what the adapter reads, "post_add" the sum before the norm
    ln_before, ln_after  a new LayerNorm in front of, and behind, the bottleneck; with
                         adapter_residual_before_ln the latter comes after the adapter's sum
    init_weights         "bert": normal, deviation 0.02; "mam_adapter": down kaiming-uniform, up zero;
                         "houlsby": normal, deviation 0.01, cut at two
    leave_out            indices of layers without adapters, those of a decoder counted on from its encoder's
    dropout              in training, of what the adapter adds
    modules_to_save      names of modules to train whole, in a copy; task_type: PEFT's word for the task

    `houlsby`, `pfeiffer` and `parallel` are the library's DoubleSeqBnConfig, SeqBnConfig and ParBnConfig.
    Raises TypeError or ValueError that names the field.
    """

    mh_adapter: bool = False
    output_adapter: bool = True
    reduction_factor: float | dict[str, float] | None = None
    non_linearity: str = "relu"
    original_ln_before: bool = False
    original_ln_after: bool = True
    ln_before: bool = False
    ln_after: bool = False
    init_weights: str = "bert"
    is_parallel: bool = False
    scaling: float = 1.0
    use_gating: bool = False
    residual_before_ln: bool | str = True
    adapter_residual_before_ln: bool = False
    inv_adapter: str | None = None
    inv_adapter_reduction_factor: float | None = None
    cross_adapter: bool = False
    leave_out: list[int] = field(default_factory=list)
    dropout: float = 0.0
    phm_layer: bool = False
    stochastic_depth: float = 0.0
    width: int | None = None
    modules_to_save: list[str] | None = None
    task_type: str | None = None

    def __post_init__(self) -> None:
        for name in SWITCHES:
            if type(getattr(self, name)) is not bool:
                raise TypeError(
                    f"BottleneckConfig: {name} must be True or False, got {getattr(self, name)!r}"
                )
        for name, (only, why) in UNSUPPORTED.items():
            if getattr(self, name) != only:
                raise ValueError(
                    f"BottleneckConfig: {name}={getattr(self, name)!r} is not offered, only {only!r}: {why}"
                )
        if not (self.mh_adapter or self.output_adapter or self.cross_adapter):
            raise ValueError(
                "BottleneckConfig: mh_adapter, output_adapter and cross_adapter are all False, which leaves "
                "no adapter; set one"
            )
        _check_width(self)
        _check_numbers(self)
        if self.non_linearity not in (*ACTIVATIONS, *ALIASES):
            raise ValueError(
                f"BottleneckConfig: non_linearity must be one of {', '.join((*ACTIVATIONS, *ALIASES))}, "
                f"got {self.non_linearity!r}"
            )
        if self.init_weights not in INITS:
            raise ValueError(
                f"BottleneckConfig: init_weights must be one of {', '.join(INITS)}, got {self.init_weights!r}"
            )
        if self.residual_before_ln not in (True, False, "post_add"):
            raise ValueError(
                "BottleneckConfig: residual_before_ln must be True, False or 'post_add', "
                f"got {self.residual_before_ln!r}"
            )
        if self.residual_before_ln == "post_add" and not self.original_ln_before:
            raise ValueError(
                "BottleneckConfig: residual_before_ln='post_add' has a meaning only with "
                "original_ln_before=True"
            )
        _check_lists(self)

    @classmethod
    def houlsby(cls, **changes: Any) -> "BottleneckConfig":
        """Adapters behind attention and feed-forward, each before the layer's sum (Houlsby et al. 2019)."""
        start: dict[str, Any] = {"mh_adapter": True, "non_linearity": "swish"}
        return cls(**(start | changes))

    @classmethod
    def pfeiffer(cls, **changes: Any) -> "BottleneckConfig":
        """One adapter a layer, behind the feed-forward's sum and norm (Pfeiffer et al. 2020)."""
        return cls(**({"original_ln_before": True} | changes))

    @classmethod
    def parallel(cls, **changes: Any) -> "BottleneckConfig":
        """One adapter a layer, beside the feed-forward, four times (He et al. 2021)."""
        start: dict[str, Any] = {"is_parallel": True, "scaling": 4.0, "init_weights": "mam_adapter"}
        if "width" not in changes:
            start["reduction_factor"] = 2
        return cls(**(start | changes))

    def width_of(self, hidden: int, layer: int) -> int:
        """The width of the bottleneck in a layer; ValueError where reduction_factor says nothing of it."""
        if self.width is not None:
            return self.width
        factor: Any = self.reduction_factor
        if isinstance(factor, dict):
            found = factor.get(str(layer), factor.get("default"))
            if found is None:
                raise ValueError(
                    f"BottleneckConfig: reduction_factor says nothing of layer {layer}; add a 'default' to it"
                )
            factor = found
        return max(int(hidden // factor), 1)


# --- checks -------------------------------------------------------------------------------------------------


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _check_width(config: BottleneckConfig) -> None:
    factor: Any = config.reduction_factor
    if config.width is not None:
        if factor is not None:
            raise ValueError(
                f"BottleneckConfig: width={config.width!r} and reduction_factor={factor!r} both say how wide "
                "the bottleneck is; give one"
            )
        if type(config.width) is not int or config.width < 1:
            raise ValueError(
                f"BottleneckConfig: width must be an integer of at least 1, got {config.width!r}"
            )
        return
    if factor is None:
        object.__setattr__(config, "reduction_factor", FACTOR)
        return
    if isinstance(factor, Mapping):
        factor = {str(layer): value for layer, value in factor.items()}
        object.__setattr__(config, "reduction_factor", factor)
        bad = [key for key in factor if key != "default" and not key.isdigit()]
        if bad:
            raise ValueError(
                f"BottleneckConfig: reduction_factor's keys are layer indices and 'default', got {bad[0]!r}"
            )
    for value in factor.values() if isinstance(factor, Mapping) else (factor,):
        if not _number(value) or value < LEAST_FACTOR:
            raise ValueError(
                f"BottleneckConfig: reduction_factor must be a number of at least {LEAST_FACTOR}, or map "
                f"layers to such, got {value!r}"
            )


def _check_numbers(config: BottleneckConfig) -> None:
    if isinstance(config.scaling, str):
        raise ValueError(
            f"BottleneckConfig: scaling={config.scaling!r} is not offered: a factor that is learned is no "
            "part of the op, and the up-projection learns it as well; give a number"
        )
    if not _number(config.scaling):
        raise TypeError(f"BottleneckConfig: scaling must be a finite number, got {config.scaling!r}")
    if not _number(config.dropout) or not 0.0 <= config.dropout < 1.0:
        raise ValueError(f"BottleneckConfig: dropout must be in [0, 1), got {config.dropout!r}")


def _check_lists(config: BottleneckConfig) -> None:
    left = config.leave_out
    indices = list(left) if isinstance(left, Iterable) and not isinstance(left, str) else [None]
    if not all(type(i) is int and i >= 0 for i in indices):
        raise TypeError(f"BottleneckConfig: leave_out must be a list of layer indices from 0, got {left!r}")
    object.__setattr__(config, "leave_out", indices)
    saved = config.modules_to_save
    if saved is not None:
        if isinstance(saved, str) or not isinstance(saved, Iterable):
            raise TypeError(f"BottleneckConfig: modules_to_save must be a list of names, got {saved!r}")
        object.__setattr__(config, "modules_to_save", list(saved))
    peft_config.check_task("BottleneckConfig", config.task_type)
