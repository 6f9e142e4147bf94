"""Fused layers of transformers' decoder models: RMSNorm, the SwiGLU MLP, and attention with rotary.

Each is a subclass of the layer it stands for and adds no attribute, so that an instance becomes one by
setting its class. The projections inside (q_proj, gate_proj, ...) may be any, adapted and quantised ones too.
"""

# mypy: disable-error-code="misc"
# (the mixins come first in the order of resolution in order to override what the models declare)

from typing import Any

import torch
from torch.nn import functional as F
from transformers.models.gemma import modeling_gemma as gemma
from transformers.models.granite import modeling_granite as granite
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.phi3 import modeling_phi3 as phi3
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3 import modeling_qwen3 as qwen3
from transformers.models.smollm3 import modeling_smollm3 as smollm3

from peft_engine import dense, dispatch
from peft_engine.activations import spare_width
from peft_engine.dispatch import BackendError, Choice
from peft_engine.methods import virtual_attention
from peft_engine.methods.lora import LoraLinear, LoraNF4Linear
from peft_engine.methods.sharded import class_of
from peft_engine.ops.attention import ATTENTION, AttentionCall, attention, kept_intervals
from peft_engine.ops.dropout import draw_seed
from peft_engine.ops.nf4 import DTYPES
from peft_engine.ops.rms_norm import RMS_NORM, RmsNormCall, rms_norm
from peft_engine.ops.rotary import rotary_by_token
from peft_engine.ops.swiglu import NO_ROOM, SWIGLU, SwigluCall, swiglu

# --- the projections inside ---------------------------------------------------------------------------------

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(getattr(torch.nn.modules.module, f"_global{hooks}") for hooks in _HOOKS)


def _project(module: Any, x: torch.Tensor) -> torch.Tensor:
    """module(x); a dense layer's product by the library that is the fastest (dense.py)."""
    if not is_dense(module):
        return module(x)
    if type(module) is LoraLinear:
        return module.forward(x, dense.linear)
    return dense.linear(x, module.weight, module.bias)


def library(module: Any) -> str:
    """Whose product runs in a dense linear layer that a fused layer calls, as dense.library says."""
    frozen = is_dense(module) and not any(
        p.requires_grad for p in (module.weight, module.bias) if p is not None
    )
    return dense.library(module.weight) if frozen else "torch"


def is_dense(module: Any) -> bool:
    """Whether a call of the module is its forward alone, and that of a dense linear layer."""
    if type(module) not in (torch.nn.Linear, LoraLinear) or "forward" in module.__dict__:
        return False
    return not any(module.__dict__[hooks] for hooks in _HOOKS) and not any(_GLOBAL_HOOKS)


def _spare(module: Any, dtype: torch.dtype) -> int:
    """The spare columns that a linear layer's one adapter uses behind rows of a dtype."""
    adapters = module._modules.get("lora_A")
    if adapters is None:
        return 0
    if isinstance(module, (LoraLinear, LoraNF4Linear)):
        name = module.active_adapter
        a = adapters._parameters.get(name) if isinstance(name, str) else None
    else:  # PEFT's, whose adapters are linear layers by name
        names = [name for name in module.active_adapters if name in adapters]
        a = adapters[names[0]].weight if len(names) == 1 else None
    return 0 if a is None else spare_width(a.shape[0], a.dtype, dtype)


# --- RMSNorm ------------------------------------------------------------------------------------------------


class _RMSNorm:
    weight: torch.Tensor
    variance_epsilon: float

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        if weight.dtype != hidden_states.dtype:
            # A float32 weight beside a half-precision input gives float32, as the layer's own product does.
            dtype = torch.promote_types(hidden_states.dtype, weight.dtype)
            hidden_states, weight = hidden_states.to(dtype), weight.to(dtype)
        return rms_norm(hidden_states, weight, self.variance_epsilon)


class LlamaRMSNorm(_RMSNorm, llama.LlamaRMSNorm):
    """Llama's RMSNorm in one pass."""


class MistralRMSNorm(_RMSNorm, mistral.MistralRMSNorm):
    """Mistral's RMSNorm in one pass."""


class Qwen2RMSNorm(_RMSNorm, qwen2.Qwen2RMSNorm):
    """Qwen2's RMSNorm in one pass."""


class Qwen3RMSNorm(_RMSNorm, qwen3.Qwen3RMSNorm):
    """Qwen3's RMSNorm in one pass, over the hidden dimension or a head's."""


class Phi3RMSNorm(_RMSNorm, phi3.Phi3RMSNorm):
    """Phi-3's RMSNorm in one pass."""


class SmolLM3RMSNorm(_RMSNorm, smollm3.SmolLM3RMSNorm):
    """SmolLM3's RMSNorm in one pass."""


class GraniteRMSNorm(_RMSNorm, granite.GraniteRMSNorm):
    """Granite's RMSNorm in one pass."""


class GemmaRMSNorm(gemma.GemmaRMSNorm):
    """Gemma's RMSNorm, which multiplies by 1 + weight, in one pass."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight if self.weight.dtype == x.dtype else self.weight.float()
        return rms_norm(x, weight, self.eps, offset=1.0)


# --- MLP ----------------------------------------------------------------------------------------------------


class _MLP:
    _modules: dict[str, Any]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        modules = self._modules
        gate_proj, up_proj, down_proj = modules["gate_proj"], modules["up_proj"], modules["down_proj"]
        gate, up = _project(gate_proj, x), _project(up_proj, x)
        spare = NO_ROOM
        if dispatch.direct(gate):  # elsewhere none is left
            down, of_gate, of_up = (_spare(m, gate.dtype) for m in (down_proj, gate_proj, up_proj))
            spare = down, of_gate, of_up
        return _project(down_proj, swiglu(gate, up, spare=spare))


class LlamaMLP(_MLP, llama.LlamaMLP):
    """Llama's MLP with silu(gate) * up in one pass."""


class MistralMLP(_MLP, mistral.MistralMLP):
    """Mistral's MLP with silu(gate) * up in one pass."""


class Qwen2MLP(_MLP, qwen2.Qwen2MLP):
    """Qwen2's MLP with silu(gate) * up in one pass."""


class Qwen3MLP(_MLP, qwen3.Qwen3MLP):
    """Qwen3's MLP with silu(gate) * up in one pass."""


class SmolLM3MLP(_MLP, smollm3.SmolLM3MLP):
    """SmolLM3's MLP with silu(gate) * up in one pass."""


class GraniteMLP(_MLP, granite.GraniteMLP):
    """Granite's MLP with silu(gate) * up in one pass."""


class GemmaMLP(_MLP, gemma.GemmaMLP):
    """Gemma's MLP with silu(gate) * up in one pass, where it is set to silu."""


class Phi3MLP(phi3.Phi3MLP):
    """Phi-3's MLP, whose gate and up are halves of one product, with silu(gate) * up in one pass."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gate, up = _project(self.gate_up_proj, hidden_states).chunk(2, dim=-1)
        # The gradients of the halves are joined in new memory: room behind them would be lost.
        down = _spare(self.down_proj, gate.dtype) if dispatch.direct(gate) else 0
        return _project(self.down_proj, swiglu(gate, up, spare=(down, 0, 0)))


# --- attention ----------------------------------------------------------------------------------------------

# Arguments that change what attention computes: with one of them the layer's own code runs.
_SPECIAL = frozenset(("position_bias", "softcap", "cache", "is_causal", "s_aux"))


class _Attention:
    _modules: dict[str, Any]
    config: Any
    layer_idx: int
    head_dim: int
    scaling: float
    num_key_value_groups: int
    attention_dropout: float
    is_causal: bool
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
        if self.__dict__.get("use_rope", True):
            q, k = _rotated(q, k, *position_embeddings)  # type: ignore[misc]
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        how = {"scaling": self.scaling, "dropout": self.attention_dropout if self.training else 0.0}
        if virtual_attention.stands_before(self):
            out, _ = virtual_attention.attend(_attend, self, q, k, v, attention_mask, **how)
        else:
            out, _ = _attend(self, q, k, v, attention_mask, **how)
        out = out.reshape(*hidden_states.shape[:-1], -1)
        return _project(self._modules["o_proj"], out), None

    def _heads(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k and v of x (B, T, H), each (B, T, heads, head_dim)."""
        shape = (*x.shape[:-1], -1, self.head_dim)
        modules = self._modules  # a look-up of its own: Module.__getattr__ costs as much as a view
        return (
            _project(modules["q_proj"], x).view(shape),
            _project(modules["k_proj"], x).view(shape),
            _project(modules["v_proj"], x).view(shape),
        )


class LlamaAttention(_Attention, llama.LlamaAttention):
    """Llama's attention with fused rotary, and documents of a packed row taken one by one."""


class MistralAttention(_Attention, mistral.MistralAttention):
    """Mistral's attention, as LlamaAttention; a sliding window is an interval of keys."""


class Qwen2Attention(_Attention, qwen2.Qwen2Attention):
    """Qwen2's attention, as LlamaAttention."""


class Qwen3Attention(_Attention, qwen3.Qwen3Attention):
    """Qwen3's attention, as LlamaAttention, with its norms of q and k."""

    def _heads(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        shape = (*x.shape[:-1], -1, self.head_dim)
        q, k = _project(self.q_proj, x).view(shape), _project(self.k_proj, x).view(shape)
        return self.q_norm(q), self.k_norm(k), _project(self.v_proj, x).view(shape)


class SmolLM3Attention(_Attention, smollm3.SmolLM3Attention):
    """SmolLM3's attention, as LlamaAttention; some of its layers have no rotary."""


class GemmaAttention(_Attention, gemma.GemmaAttention):
    """Gemma's attention, as LlamaAttention."""


class GraniteAttention(_Attention, granite.GraniteAttention):
    """Granite's attention, as LlamaAttention, with its own scale."""


class Phi3Attention(_Attention, phi3.Phi3Attention):
    """Phi-3's attention, whose q, k and v are parts of one product, read in place; partial rotary."""

    def _heads(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        heads = _project(self.qkv_proj, x).unflatten(-1, (-1, self.head_dim))
        kv: int = self.num_key_value_heads  # type: ignore[assignment]
        return heads.split((heads.shape[-2] - 2 * kv, kv, kv), dim=-2)


def _own_attention(module: Any) -> str:
    """Why the layer's own code runs, or nothing; what is set may change after the layer was fused."""
    implementation = module.config._attn_implementation.removeprefix(virtual_attention.NAME)
    if implementation != "sdpa":
        return f"attention is set to {implementation}; the fused one stands for sdpa"
    if not module.is_causal:
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

_NORMS = (
    LlamaRMSNorm,
    MistralRMSNorm,
    Qwen2RMSNorm,
    Qwen3RMSNorm,
    Phi3RMSNorm,
    SmolLM3RMSNorm,
    GraniteRMSNorm,
    GemmaRMSNorm,
)
_MLPS = (LlamaMLP, MistralMLP, Qwen2MLP, Qwen3MLP, SmolLM3MLP, GraniteMLP, GemmaMLP, Phi3MLP)
_ATTENTIONS = (
    LlamaAttention,
    MistralAttention,
    Qwen2Attention,
    Qwen3Attention,
    SmolLM3Attention,
    GemmaAttention,
    GraniteAttention,
    Phi3Attention,
)
_OPS = {
    cls: op
    for op, classes in (("rms_norm", _NORMS), ("swiglu", _MLPS), ("attention", _ATTENTIONS))
    for cls in classes
}
_FUSED = {cls.__bases__[-1]: cls for cls in _OPS} | {cls: cls for cls in _OPS}
_SUFFIXES = {"RMSNorm": "rms_norm", "MLP": "swiglu", "Attention": "attention"}


def fused_class(module: torch.nn.Module) -> tuple[type | None, str, str]:
    """The fused class for a module (its own, where it has it), the op, and why there is none.

    ("", "") beside None for a module that no op here stands for.
    """
    kind = class_of(module)
    fused = _FUSED.get(kind)
    if fused is None:
        op = next((op for suffix, op in _SUFFIXES.items() if kind.__name__.endswith(suffix)), "")
        if op == "swiglu" and not any("gate" in name for name in module._modules):
            op = ""  # an MLP without a gate
        return None, op, f"no fused layer stands for {kind.__name__}" if op else ""
    op = _OPS[fused]
    why = ""
    other = {p.dtype for p in module.parameters() if p.is_floating_point()}.difference(DTYPES)
    if other:
        why = f"no kernel takes {other.pop()}"
    elif op == "swiglu":
        act = getattr(module, "act_fn", None) or getattr(module, "activation_fn", None)
        if not isinstance(act, torch.nn.SiLU) and getattr(module.config, "hidden_act", "") not in (
            "silu",
            "swish",
        ):
            why = f"its activation is {type(act).__name__}; the fused product is that of SiLU"
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
