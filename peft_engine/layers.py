"""Fused layers of transformers' models: norms (norms.py), MLPs, and attention with rotary.

A form below stands for every class whose code is that of the one beside it in _FORMS (same_code.py), whatever
its name and family. The fused class is a subclass of the one it stands for and adds no attribute, so that an
instance becomes one by setting its class. The projections inside (q_proj, gate_proj, ...) may be any, adapted
and quantised ones too.
"""

# mypy: disable-error-code="misc"
# (the mixins come first in the order of resolution in order to override what the models declare)

import functools
from typing import Any

import torch
from torch.nn import functional as F
from transformers import activations
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3Attention
from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm
from transformers.models.longt5.modeling_longt5 import LongT5DenseGatedActDense
from transformers.models.mistral.modeling_mistral import MistralAttention
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.phi3.modeling_phi3 import Phi3Attention, Phi3MLP
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention
from transformers.models.smollm3.modeling_smollm3 import SmolLM3Attention
from transformers.models.t5.modeling_t5 import T5DenseGatedActDense, T5LayerNorm

from peft_engine import dispatch, norms, recompute
from peft_engine.dispatch import BackendError, Choice
from peft_engine.made_classes import stands_for, subclass
from peft_engine.methods import virtual_attention
from peft_engine.methods.sharded import class_of
from peft_engine.ops.attention import ATTENTION, AttentionCall, attention, kept_intervals
from peft_engine.ops.dropout import draw_seed
from peft_engine.ops.nf4 import DTYPES
from peft_engine.ops.rms_norm import RMS_NORM, RmsNormCall
from peft_engine.ops.rotary import rotary_by_token
from peft_engine.ops.swiglu import NO_ROOM, SWIGLU, SwigluCall, swiglu
from peft_engine.projections import spare_of
from peft_engine.same_code import same_method

# --- MLP ----------------------------------------------------------------------------------------------------


_ACTIVATIONS: dict[type, str] = {
    torch.nn.SiLU: "silu",
    activations.SiLUActivation: "silu",
    activations.GELUActivation: "gelu",
    activations.GELUTanh: "gelu_tanh",
    activations.NewGELUActivation: "gelu_tanh",
    activations.FastGELUActivation: "gelu_tanh",
}


_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks", "forward")


def is_watched(act: Any) -> bool:
    """Whether an activation has hooks, or a forward of its own, which a fused product would pass by."""
    held = getattr(act, "__dict__", {})
    return any(map(held.get, _HOOKS))


def activation_of(act: Any) -> str:
    """A module's activation as swiglu names it; "" for one that it has not, or that is watched."""
    if is_watched(act):
        return ""
    kind = type(act)
    if kind.__module__ == __name__:
        kind = kind.__bases__[-1]
    if kind is torch.nn.GELU:
        return "gelu_tanh" if act.approximate == "tanh" else "gelu"
    return _ACTIVATIONS.get(kind, "")


def _gated(gate_proj: Any, up_proj: Any, down_proj: Any, x: torch.Tensor, activation: str) -> torch.Tensor:
    """What a gated MLP gives down_proj."""
    gate, up = gate_proj(x), up_proj(x)
    spare = NO_ROOM
    if dispatch.direct(gate):  # elsewhere none is left
        down, of_gate, of_up = (spare_of(m, gate.dtype) for m in (down_proj, gate_proj, up_proj))
        spare = down, of_gate, of_up
    return swiglu(gate, up, activation, spare=spare)


class _MLP:
    """down(act(gate(x)) * up(x)) with the gated product in one pass."""

    _modules: dict[str, Any]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        modules = self._modules
        activation = activation_of(self.act_fn)  # type: ignore[attr-defined]
        if not activation:  # set after the layer was fused
            return super().forward(x)  # type: ignore[misc]
        down_proj = modules["down_proj"]
        between = _gated(modules["gate_proj"], modules["up_proj"], down_proj, x, activation)
        return down_proj(between)


class _T5MLP:
    """As T5 v1.1 has it: dropout before the last layer, which may be kept in float32."""

    _modules: dict[str, Any]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        modules = self._modules
        activation = activation_of(modules["act"])
        if not activation:
            return super().forward(hidden_states)  # type: ignore[misc]
        wo = modules["wo"]
        between = modules["dropout"](_gated(modules["wi_0"], modules["wi_1"], wo, hidden_states, activation))
        kept = wo.weight.dtype if isinstance(wo.weight, torch.Tensor) else between.dtype
        return wo(between if kept == torch.int8 else between.to(kept))


class _PackedMLP:
    """As Phi-3 has it: gate and up are halves of one product."""

    _modules: dict[str, Any]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        modules = self._modules
        activation = activation_of(self.activation_fn)  # type: ignore[attr-defined]
        if not activation:
            return super().forward(hidden_states)  # type: ignore[misc]
        gate, up = modules["gate_up_proj"](hidden_states).chunk(2, dim=-1)
        # The gradients of the halves are joined in new memory: room behind them would be lost.
        down = spare_of(modules["down_proj"], gate.dtype) if dispatch.direct(gate) else 0
        return modules["down_proj"](swiglu(gate, up, activation, spare=(down, 0, 0)))


class _TanhGELU:
    """GELU's approximation by tanh, which the model writes in eight passes, in torch's one."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return _gelu(input, "tanh")


class _GELU:
    """torch's own, whose output the layer behind it need not keep: as a module of transformers calls it."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return recompute.made_by(super().forward(input), self.act, input)  # type: ignore[misc,attr-defined]


class _TorchGELU:
    """The same, as torch's module calls it."""

    approximate: str

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return _gelu(input, self.approximate)


def _gelu(input: torch.Tensor, approximate: str) -> torch.Tensor:
    act = functools.partial(F.gelu, approximate=approximate)
    return recompute.made_by(act(input), act, input)


# --- attention ----------------------------------------------------------------------------------------------

# Arguments that change what attention computes: with one of them the layer's own code runs.
_SPECIAL = frozenset(("position_bias", "softcap", "cache", "is_causal", "s_aux"))


class _Attention:
    _modules: dict[str, Any]
    config: Any
    layer_idx: int
    head_dim: int
    scaling: float
    attention_dropout: float
    training: bool

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        if _own_attention(self) or any(kwargs.get(name) is not None for name in _SPECIAL):
            return super().forward(  # type: ignore[misc]
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
        q, k, v = self._heads(hidden_states)
        q, k = self._turned(q, k, position_embeddings)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        how = {"scaling": self.scaling, "dropout": self.attention_dropout if self.training else 0.0}
        if virtual_attention.stands_before(self):
            out, _ = virtual_attention.attend(_attend, self, q, k, v, attention_mask, **how)
        else:
            out, _ = _attend(self, q, k, v, attention_mask, **how)
        out = out.reshape(*hidden_states.shape[:-1], -1)
        return self._modules["o_proj"](out), None

    def _heads(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k and v of x (B, T, H), each (B, T, heads, head_dim)."""
        shape = (*x.shape[:-1], -1, self.head_dim)
        modules = self._modules  # a look-up of its own: Module.__getattr__ costs as much as a view
        return (
            modules["q_proj"](x).view(shape),
            modules["k_proj"](x).view(shape),
            modules["v_proj"](x).view(shape),
        )

    def _turned(self, q: torch.Tensor, k: torch.Tensor, angles: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """q and k turned by the cosines and sines of their positions."""
        return _rotated(q, k, *angles)


class _SmolLM3Attention(_Attention):
    """As SmolLM3 has it: some layers have no rotary."""

    use_rope: int

    def _turned(self, q: torch.Tensor, k: torch.Tensor, angles: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return super()._turned(q, k, angles) if self.use_rope else (q, k)


class _NormedAttention(_Attention):
    """As Qwen3 has it: q and k go through norms of their own, a head at a time."""

    def _heads(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = super()._heads(x)
        return self._modules["q_norm"](q), self._modules["k_norm"](k), v


class _PackedAttention(_Attention):
    """As Phi-3 has it: q, k and v are parts of one product, read in place."""

    def _heads(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        heads = self._modules["qkv_proj"](x).unflatten(-1, (-1, self.head_dim))
        kv: int = self.num_key_value_heads  # type: ignore[attr-defined]
        return heads.split((heads.shape[-2] - 2 * kv, kv, kv), dim=-2)


def _own_attention(module: Any) -> str:
    """Why the layer's own code runs, or nothing; what is set may change after the layer was fused."""
    implementation = module.config._attn_implementation.removeprefix(virtual_attention.NAME)
    if implementation != "sdpa":
        return f"attention is set to {implementation}; the fused one stands for sdpa"
    if not getattr(module, "is_causal", True):
        return "it is bidirectional"
    return ""


def _rotated(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor):
    if q.dtype == cos.dtype:
        return rotary_by_token(q, k, cos, sin)
    # Autocast: the angles have the precision of the hidden states, q and k that of the linears.
    turned = rotary_by_token(q.to(cos.dtype), k.to(cos.dtype), cos, sin)
    return turned[0].to(q.dtype), turned[1].to(k.dtype)


def _attend(
    module, q, k, v, mask, *, scaling: float, dropout: float = 0.0, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """Attention as transformers' interface calls it for sdpa; mask None is causal, and one query sees all."""
    queries = q.shape[2]
    # One query over 16 and 500 keys (two cores of a Zen 4, 9 heads of 64): torch takes 8 and 37 us in float32
    # where ours takes 21 and 39, and in bfloat16 20 and 276 where ours takes the same.
    by_torch = queries == 1 and (q.dtype == torch.float32 or dispatch.on_gpu(q))
    if dropout and mask is None and dispatch.on_gpu(q) and q.dtype != torch.float32:
        by_torch = True  # its flash kernel, which has dropout as well
    if not by_torch and not _runs_plainly(q):
        intervals = kept_intervals(mask) if mask is not None and mask.shape[-1] == k.shape[2] else None
        if mask is None and k.shape[2] > queries > 1:  # a static cache before its first token
            k, v = k[:, :, :queries], v[:, :, :queries]  # later slots are empty
        if mask is None or intervals is not None:
            seed = draw_seed(dropout, q.device)
            out = attention(q, k, v, intervals=intervals, scale=scaling, dropout_p=dropout, seed=seed)
            return out.transpose(1, 2), None
    causal = mask is None and queries > 1  # torch's, too, has the first query at the first key
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, scale=scaling, enable_gqa=grouped)
    return out.transpose(1, 2), None


def _runs_plainly(q: torch.Tensor) -> bool:
    """Whether no kernel takes q, and the op would hold all scores: the model's own attention is torch's."""
    if dispatch.forced() is not None:
        return False
    return ATTENTION.choose(AttentionCall(q.device.type, q.dtype, q.shape[3])).backend == "reference"


# --- which class --------------------------------------------------------------------------------------------

# The op, what is fused, and a class that computes what it stands for. Without an op: torch's own, marked.
_FORMS: tuple[tuple[str, type, type], ...] = (
    ("rms_norm", norms.RMSNorm, LlamaRMSNorm),
    ("rms_norm", norms.RMSNormOfInput, Olmo2RMSNorm),
    ("rms_norm", norms.RMSNormOfOnes, GemmaRMSNorm),
    ("rms_norm", norms.RMSNormWithScale, Gemma4RMSNorm),
    ("rms_norm", norms.RMSNormOfWeight, T5LayerNorm),
    ("", norms.LayerNorm, torch.nn.LayerNorm),
    ("swiglu", _MLP, LlamaMLP),
    ("swiglu", _PackedMLP, Phi3MLP),
    ("swiglu", _T5MLP, T5DenseGatedActDense),
    ("swiglu", _T5MLP, LongT5DenseGatedActDense),
    ("gelu", _TanhGELU, activations.NewGELUActivation),
    ("gelu", _TanhGELU, activations.FastGELUActivation),
    ("", _GELU, activations.GELUActivation),
    ("", _TorchGELU, torch.nn.GELU),
    ("attention", _Attention, LlamaAttention),
    ("attention", _Attention, MistralAttention),
    ("attention", _Attention, Qwen2Attention),
    ("attention", _SmolLM3Attention, SmolLM3Attention),
    ("attention", _NormedAttention, Qwen3Attention),
    ("attention", _NormedAttention, Gemma3Attention),
    ("attention", _PackedAttention, Phi3Attention),
)
_ACTS = ("act_fn", "activation_fn", "act")  # what forms call their activation
_NOT_RUN = frozenset(("eager_attention_forward",))  # what is set to eager keeps its own code
_SUFFIXES = {"RMSNorm": "rms_norm", "MLP": "swiglu", "Attention": "attention"}


@functools.cache
def _fused(kind: type) -> tuple[type, str] | None:
    """The fused class for a class of transformers (or itself), and the op; None where there is none."""
    if kind.__module__ == __name__:
        return _fused(kind.__bases__[-1])
    for op, form, like in _FORMS:
        if same_method("forward", kind, like, _NOT_RUN):
            return subclass(form, kind, __name__), op
    return None


def __getattr__(name: str) -> type:
    found = _fused(stands_for(name, __name__))  # a pickle's
    if found is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return found[0]


def fused_class(module: torch.nn.Module) -> tuple[type | None, str, str]:
    """The fused class for a module (its own, where it has it), the op, and why there is none.

    ("", "") beside None for a module that no op here stands for.
    """
    kind = class_of(module)
    found = _fused(kind)
    if found is None:
        op = next((op for suffix, op in _SUFFIXES.items() if kind.__name__.endswith(suffix)), "")
        if op == "swiglu" and not any("gate" in name for name in module._modules):
            op = ""  # an MLP without a gate
        return None, op, f"no fused layer stands for {kind.__name__}" if op else ""
    fused, op = found
    act = getattr(module, "act", F.gelu)
    if not op and getattr(act, "func", act) is not F.gelu:
        return None, "", ""  # of the same code, and another activation
    why = ""
    other = {p.dtype for p in module.parameters() if p.is_floating_point()}.difference(DTYPES)
    if other:
        why = f"no kernel takes {other.pop()}"
    elif op == "rms_norm" and not getattr(module, "with_scale", True):
        why = "it has no weight"
    elif op == "swiglu":
        act = next(getattr(module, name) for name in _ACTS if hasattr(module, name))
        if not activation_of(act):
            why = f"its activation is {type(act).__name__}; the fused products are those of SiLU and GELU"
            if is_watched(act):
                why = "its activation has hooks or another forward, which the fused product would pass by"
    elif op == "attention":
        why = _own_attention(module)
    return (None, op, why) if why else (fused, op, "")


def running(module: torch.nn.Module, dtype: torch.dtype | None = None) -> tuple[str, str, str]:
    """What runs in a module that has a fused class: the op, the backend ("": its own code), why none faster.

    dtype: of the activations; that of the module's first floating-point parameter when None.
    """
    _, op, why = fused_class(module)
    if why:
        return op, "", why
    if op == "gelu":
        return op, "torch", ""
    tensors = [t for t in module.parameters() if t.is_floating_point()]
    device = next(module.parameters()).device.type
    dtype = dtype or (tensors[0].dtype if tensors else torch.float32)
    try:
        choice = _choice(op, device, dtype, getattr(module, "head_dim", 0))
    except BackendError as error:
        return op, "", str(error)
    return op, choice.backend, choice.reason


def _choice(op: str, device: str, dtype: torch.dtype, head_dim: int) -> Choice:
    if op == "rms_norm":
        return RMS_NORM.choose(RmsNormCall(device, dtype, dtype))
    if op == "swiglu":
        return SWIGLU.choose(SwigluCall(device, dtype))
    return ATTENTION.choose(AttentionCall(device, dtype, head_dim))
