"""Where a model's attention layers are: which stack each belongs to, its heads, and how positions reach it.

A layer counts when its forward asks transformers' attention interface for the function to call. Families
that do not (Falcon, Bloom, GPT-J, DeBERTa) have no such layer.
"""

import functools
import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn

INTERFACE = "ALL_ATTENTION_FUNCTIONS"  # the name by which a layer's code asks for it
CROSS = ("encoder_attn", "EncDecAttention", "crossattention")
HEAD_DIM = ("qk_head_dim", "head_dim", "attention_head_size", "key_value_proj_dim")
HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")


@dataclass(frozen=True)
class Site:
    """An attention layer: its path, key heads and their width; cross: its keys are the encoder's."""

    path: str
    kv_heads: int
    head_dim: int
    cross: bool

    @property
    def width(self) -> int:
        """Values of one virtual token's key."""
        return self.kv_heads * self.head_dim


@dataclass(frozen=True)
class Stack:
    """A run of layers with a forward of its own.

    causal     whether a token sees only what is before it
    sites      its attention layers in order
    embeddings the path of the embedding layer that counts past tokens (BERT's), "" when the stack takes
               position_ids itself, None when positions are relative or the model is an encoder-decoder
    limit      how many positions it has learned vectors for, None when it learned none
    """

    path: str
    causal: bool
    sites: tuple[Site, ...]
    embeddings: str | None
    limit: int | None


def stacks(model: Any) -> tuple[Stack, ...]:
    """The model's stacks: the encoder and the decoder of an encoder-decoder, else the one it has."""
    paths = {id(module): path for path, module in model.named_modules()}
    if getattr(model.config, "is_encoder_decoder", False):
        encoder, decoder = model.get_encoder(), model.get_decoder()
        return (
            _stack(paths[id(encoder)], encoder, causal=False, shifted=False),
            _stack(paths[id(decoder)], decoder, causal=True, shifted=False),
        )
    stack = getattr(model, "base_model", model)
    # OPT's and Bart's language models call the decoder inside, past the forward of what is around it.
    inner = model.get_decoder() if hasattr(model, "get_decoder") else None
    if inner is not None and id(inner) in map(id, stack.modules()) and _attentions(inner):
        stack = inner
    layers = [layer for path, layer in _attentions(stack) if not _crosses(path)]
    causal = all(getattr(layer, "is_causal", False) or "is_causal" not in vars(layer) for layer in layers)
    return (_stack(paths[id(stack)], stack, causal=bool(layers) and causal, shifted=True),)


def mixes_outside(model: nn.Module, stack: Stack) -> str | None:
    """What mixes the tokens of a stack besides attention, a recurrence or a convolution; None: nothing."""
    for path, module in model.get_submodule(stack.path).named_modules():
        if isinstance(module, nn.Conv1d) and module.kernel_size != (1,):
            return f"the convolution {path}"
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and any(s.path.startswith(f"{path}.") for s in stack.sites):
            for i, layer in enumerate(module):
                if not _attentions(layer):
                    return f"{path}.{i}, which has no attention,"
    return None


def parameters_of(module: nn.Module) -> tuple[str, ...]:
    """The names of the arguments of a module's forward, in order."""
    return tuple(inspect.signature(type(module).forward).parameters)[1:]


def uses_interface(module: nn.Module) -> bool:
    """Whether a module is an attention layer that asks transformers' interface for its function."""
    code = _code(module)
    return code is not None and INTERFACE in code.co_names


def goes_by_name(module: nn.Module) -> bool:
    """Whether an attention layer does part of it itself under transformers' own implementations, by name."""
    code = _code(module)
    return code is not None and ("eager", "sdpa") in code.co_consts


@functools.cache
def names_sdpa(kind: Any) -> bool:
    """Whether a method of a module of transformers does something of its own for the name "sdpa"."""
    theirs = [k for k in kind.__mro__ if k.__module__.startswith("transformers.models.")]
    codes = [code_of(method) for k in theirs for method in vars(k).values()]
    constants = [constant for code in codes if code is not None for constant in code.co_consts]
    return any(c == "sdpa" or (isinstance(c, tuple) and "sdpa" in c) for c in constants)


def code_of(method: Any) -> Any:
    """The code of a function below its decorators; None of what is none."""
    return getattr(inspect.unwrap(method), "__code__", None)


def _code(module: nn.Module) -> Any:
    """The code of a module's forward as transformers has it."""
    for kind in type(module).__mro__:
        forward = vars(kind).get("forward")
        if forward is not None and kind.__module__.startswith("transformers."):
            return code_of(forward)
    return None


# --- parts --------------------------------------------------------------------------------------------------


def _attentions(stack: nn.Module) -> list[tuple[str, Any]]:
    return [(path, module) for path, module in stack.named_modules() if uses_interface(module)]


def _crosses(path: str) -> bool:
    """Whether an attention layer looks at an encoder's output."""
    return not set(CROSS).isdisjoint(path.split("."))


def _stack(path: str, stack: Any, *, causal: bool, shifted: bool) -> Stack:
    prefix = f"{path}." if path else ""
    sites = tuple(
        Site(prefix + inner, *heads_of(module), cross=_crosses(inner)) for inner, module in _attentions(stack)
    )
    embeddings = _embeddings(stack) if shifted else None
    return Stack(path, causal, sites, embeddings, _learned(stack))


def heads_of(module: Any) -> tuple[int, int]:
    """The key heads of an attention layer, and their width."""
    heads = next((getattr(module, name) for name in HEADS if hasattr(module, name)), None)
    if heads is None:
        heads = module.config.num_attention_heads
    head_dim = next((getattr(module, name) for name in HEAD_DIM if hasattr(module, name)), None)
    if head_dim is None:
        head_dim = module.config.hidden_size // heads
    groups = getattr(module, "num_key_value_groups", None) or 1
    return heads // groups, head_dim


def dropout_of(module: Any) -> float:
    """The attention dropout of a layer, by the names and the types that families give it."""
    for name in ("attention_dropout", "attn_dropout", "dropout"):
        found = getattr(module, name, None)
        if found is not None:
            return float(getattr(found, "p", found))
    return 0.0


def _embeddings(stack: Any) -> str | None:
    for name, child in stack.named_children():
        if "past_key_values_length" in parameters_of(child):
            return name
    return "" if "position_ids" in parameters_of(stack) else None


def _learned(stack: Any) -> int | None:
    """The rows of a table of position vectors; RoBERTa's and BART's first rows are no positions."""
    for name in ("wpe", "embed_positions", "embeddings.position_embeddings"):
        try:
            table = stack.get_submodule(name)
        except AttributeError:
            continue
        if isinstance(table, nn.Embedding):
            unused = getattr(table, "offset", 0) or (
                0 if table.padding_idx is None else table.padding_idx + 1
            )
            return table.num_embeddings - unused
    return None
