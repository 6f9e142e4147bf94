"""Where a model's layers end their attentions and their feed-forwards: where bottleneck adapters stand.

Every layer of transformers has sublayers of one form, s' = s + h or s' = LN(s + h) with h = sublayer(s). A
site is one of them: the module whose output is h, the module whose input is s, and LN where the layer has one
after the sum. The families of FAMILIES are known by the names of a layer's children; of others the sublayers
alone are found, by their own names, and s is not.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from peft_engine.methods import copies
from peft_engine.methods.attention_sites import CROSS, uses_interface

ATTENTION, CROSS_ATTENTION, OUTPUT = "mh_adapter", "cross_adapter", "output_adapter"  # the library's words
# What the `adapters` library calls the module that holds a layer's adapters.
HOLDERS = {
    ATTENTION: "attention_adapters",
    CROSS_ATTENTION: "cross_attention_adapters",
    OUTPUT: "output_adapters",
}
# Feed-forwards and attentions by name, in layers of no known family.
FEED_FORWARDS = ("mlp", "feed_forward", "ffn", "ff", "fc2")
ATTENTIONS = ("self_attn", "self_attention", "attention", "attn")
# Families with BART's names whose norms stand after the sum, as BART's do, and before the sublayer.
POST_NORM = ("bart", "blenderbot_small", "led", "marian", "mvp", "plbart")
PRE_NORM = (
    "biogpt", "blenderbot", "bigbird_pegasus", "m2m_100", "mbart", "pegasus", "speech_to_text", "whisper",
    "xglm",
)  # fmt: skip


@dataclass(frozen=True)
class Site:
    """A sublayer: see the head of the file.

    path    of the module whose output is h; adapters live there
    holder  the path of the module that has the adapters in the `adapters` library
    kind    ATTENTION, CROSS_ATTENTION or OUTPUT
    layer   the layer's index, those of a decoder counted on from its encoder's
    source  the path of the module whose input is s, and argument: which; None where s is not known
    norm    the path of LN, None where the sum has none after it
    """

    path: str
    holder: str
    kind: str
    layer: int
    source: str | None
    argument: int
    norm: str | None
    width: int

    @property
    def generic(self) -> bool:
        """Whether the layer is of no known family."""
        return self.source is None


Found = tuple[str, str, str, str | None, int, str | None]  # path, holder, kind, source, argument, norm


def find(model: nn.Module) -> tuple[Site, ...]:
    """The sites of a model in the order of its layers."""
    sites: list[Site] = []
    layers: dict[str, int] = {}
    done: list[str] = []
    hidden = _hidden(model)
    for path, module in model.named_modules():
        if copies.is_ours(path) or any(path.startswith(f"{outer}.") for outer in done):
            continue
        found, layer = list(of_layer(path, module)), path
        if not found:
            found, layer = list(_generic(path, module, hidden)), path.rpartition(".")[0]
        if found:
            done.append(path)
        for where, holder, kind, source, argument, norm in found:
            index = layers.setdefault(layer, len(layers))
            width = hidden or _width(model.get_submodule(source or where)) or 0
            sites.append(Site(where, holder, kind, index, source, argument, norm, width))
    return tuple(sites)


def holder_of(model: nn.Module, path: str) -> str:
    """The `adapters` library's path for what lives at a site."""
    parts = path.split(".")
    for length in range(len(parts)):
        layer = ".".join(parts[:length])
        for where, holder, *_ in of_layer(layer, model.get_submodule(layer)):
            if where == path:
                return holder
    module = model.get_submodule(path)
    kind = next((kind for _, _, kind, *_ in _generic(path, module, None)), OUTPUT)
    return f"{path.rpartition('.')[0]}.{HOLDERS[kind]}".removeprefix(".")


def of_layer(path: str, layer: nn.Module) -> Iterator[Found]:
    """The sites of a layer of a known family, nothing for any other module."""
    for family in FAMILIES:
        sites = list(family(f"{path}.".removeprefix("."), layer))
        if sites:
            yield from sites
            return


# --- families -----------------------------------------------------------------------------------------------


def _has(module: Any, *names: str) -> bool:
    return all(isinstance(module._modules.get(name), nn.Module) for name in names)


# The sublayers of layers that name their parts so, and no other norm: what gets s, and what gives h.
# Those that stand side by side both get the layer's input.
_BY_NAMES = (
    # Norms before them: Llama, Mistral, Qwen2, Qwen3, Gemma, Phi-3, SmolLM3, ...; VaultGemma.
    (("input_layernorm", "self_attn"), ("post_attention_layernorm", "mlp")),
    (("input_layernorm", "self_attn"), ("pre_feedforward_layernorm", "mlp")),
    # Before and behind: Gemma 2 and 3; GLM 4; T5Gemma's encoder and decoder.
    (
        ("input_layernorm", "post_attention_layernorm"),
        ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ),
    (("input_layernorm", "post_self_attn_layernorm"), ("post_attention_layernorm", "post_mlp_layernorm")),
    (
        ("pre_self_attn_layernorm", "post_self_attn_layernorm"),
        ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ),
    (
        ("pre_self_attn_layernorm", "post_self_attn_layernorm"),
        ("pre_cross_attn_layernorm", "post_cross_attn_layernorm"),
        ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ),
    # Behind: OLMo 2 and 3.
    (("self_attn", "post_attention_layernorm"), ("mlp", "post_feedforward_layernorm")),
    # Side by side: Cohere, Phi; GPT-NeoX, which may have them one after the other; Falcon; GPT-J, CodeGen.
    (("input_layernorm", "self_attn"), ("input_layernorm", "mlp")),
    (("input_layernorm", "attention"), ("post_attention_layernorm", "mlp")),
    (("ln_attn", "self_attention"), ("ln_mlp", "mlp")),
    (("input_layernorm", "self_attention"), ("input_layernorm", "mlp")),
    (("input_layernorm", "self_attention"), ("post_attention_layernorm", "mlp")),
    (("ln_1", "attn"), ("ln_1", "mlp")),
)


# Whose sublayers add s, or a bias of h, where nobody sees it, or whose layers add something else: a multiple
# of h or of s, several streams. Families, and classes of others.
_OTHER_SUMS = (
    "bloom", "gpt_neox_japanese", "granite", "granite_swa", "minimax", "doge", "beam", "inkling", "inkling2",
    "deepseek_v4", "hy_v4", "minicpm3", "granite_docling", "granite4_vision", "glm5_next", "neomme", "esmc",
    "EsmFold2AtomLayer", "MllamaVisionEncoderLayer", "Qwen3OmniMoeCode2WavTransformerLayer",
)  # fmt: skip


def _family(layer: Any) -> str:
    return next(iter(type(layer).__module__.split(".")[-2:-1]), "")


def _is_norm(name: str) -> bool:
    return "norm" in name or name.startswith("ln_")


def _by_names(at: str, layer: Any) -> Iterator[Found]:
    """A norm behind a sublayer is part of it: h is what it gives."""
    norms = {name for name in layer._modules if _is_norm(name)}
    known = _has(layer, "mlp") and not {_family(layer), type(layer).__name__}.intersection(_OTHER_SUMS)
    for parts in _BY_NAMES if known else ():
        names = {name for part in parts for name in part}
        if norms == set(filter(_is_norm, names)) and _has(layer, *names):
            kinds = (ATTENTION, *(CROSS_ATTENTION,) * (len(parts) - 2), OUTPUT)
            for (source, end), kind in zip(parts, kinds, strict=True):
                yield at + end, at + HOLDERS[kind], kind, at + source, 0, None
            return


def _gpt2(at: str, layer: Any) -> Iterator[Found]:
    if not _has(layer, "ln_1", "attn", "ln_2", "mlp"):
        return
    yield f"{at}attn", f"{at}{HOLDERS[ATTENTION]}", ATTENTION, f"{at}ln_1", 0, None
    if _has(layer, "crossattention", "ln_cross_attn"):
        holder = f"{at}{HOLDERS[CROSS_ATTENTION]}"
        yield f"{at}crossattention", holder, CROSS_ATTENTION, f"{at}ln_cross_attn", 0, None
    yield f"{at}mlp", f"{at}{HOLDERS[OUTPUT]}", OUTPUT, f"{at}ln_2", 0, None


def _bert(at: str, layer: Any) -> Iterator[Found]:
    """BERT, RoBERTa, ELECTRA, XLM-R: each sublayer ends in a module that drops, adds and norms."""
    if not _has(layer, "attention", "intermediate", "output") or not _has(layer.attention, "output"):
        return
    for name in ("attention.output", "crossattention.output", "output"):
        try:
            end = layer.get_submodule(name)
        except AttributeError:
            continue
        if _has(end, "dense", "dropout", "LayerNorm"):
            here = at + name
            kind = OUTPUT if name == "output" else ATTENTION
            yield f"{here}.dropout", here, kind, here, 1, f"{here}.LayerNorm"


def _t5(at: str, block: Any) -> Iterator[Found]:
    parts = block._modules.get("layer")
    if not isinstance(parts, nn.ModuleList):
        return
    kinds = {"SelfAttention": ATTENTION, "EncDecAttention": CROSS_ATTENTION, "DenseReluDense": OUTPUT}
    for i, part in enumerate(parts):
        kind = next((kind for name, kind in kinds.items() if _has(part, name)), None)
        if kind is not None and _has(part, "layer_norm", "dropout"):
            here = f"{at}layer.{i}"
            yield f"{here}.dropout", here, kind, f"{here}.layer_norm", 0, None


def _bart(at: str, layer: Any) -> Iterator[Found]:
    """BART's names, norms after the sums or before the sublayers. The layer drops what a sublayer gives in a
    function: an adapter comes before.
    """
    family = _family(layer)
    if not _has(layer, "self_attn", "fc1", "fc2", "final_layer_norm"):
        return
    parts = [
        (name, name, kind)
        for name, kind in (("self_attn", ATTENTION), ("encoder_attn", CROSS_ATTENTION))
        if _has(layer, name, f"{name}_layer_norm")
    ]
    for first, last, kind in (*parts, ("fc1", "fc2", OUTPUT)):
        norm = f"{at}final_layer_norm" if kind == OUTPUT else f"{at}{first}_layer_norm"
        if family in POST_NORM or (family == "opt" and not layer.do_layer_norm_before):
            yield at + last, at + HOLDERS[kind], kind, at + first, 0, norm
        elif family in PRE_NORM or family == "opt":
            yield at + last, at + HOLDERS[kind], kind, norm, 0, None


FAMILIES = (_by_names, _gpt2, _bert, _t5, _bart)


def _generic(path: str, module: nn.Module, hidden: int | None) -> Iterator[Found]:
    """A sublayer known by its own name alone: h is its output, and s is not known."""
    parent, _, name = path.rpartition(".")
    at = f"{parent}.".removeprefix(".")
    if name in FEED_FORWARDS:
        kind = OUTPUT
    elif uses_interface(module):
        kind = CROSS_ATTENTION if name in CROSS else ATTENTION
    elif name in ATTENTIONS:
        kind = ATTENTION
    else:
        return
    if hidden is None or _width(module) == hidden:
        yield path, at + HOLDERS[kind], kind, None, 0, None


def _hidden(model: Any) -> int | None:
    """The width of the layers, from the config of a transformers model."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "hidden_size", None)


def _width(module: nn.Module) -> int | None:
    """The features that a module's last linear layer gives."""
    found = None
    for path, part in module.named_modules():
        if not copies.is_ours(path):
            found = getattr(part, "out_features", None) or getattr(part, "nf", None) or found
    return found
