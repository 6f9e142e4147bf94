"""Keys and values of virtual tokens in front of a model's own: what prefix and prompt tuning share.

A stack of layers holds a VirtualTokens module with one encoder per adapter. Before each forward of the stack
its hook asks the active encoders for their keys and values and leaves them at the attention layers, where a
function registered in transformers' attention interface puts them in front of the row's own keys, one copy
for the batch. Nothing is concatenated, the inputs keep their length, and a key/value cache holds real tokens
only; these start at position P, as PEFT has it. A row of a mixed batch whose adapter has no virtual tokens
goes through the model's own attention.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from peft_engine.methods import copies
from peft_engine.methods.attention_sites import Stack, parameters_of
from peft_engine.methods.virtual_attention import FORWARDS, NAME, SITE, Live, register, set_attention
from peft_engine.methods.walks import kept
from peft_engine.ops.prompt_embedding import extend_inputs

CHILD = "peft_engine_virtual_tokens"


class VirtualTokens(nn.Module):
    """The encoders of a stack's adapters by name, and what its hook needs."""

    encoders: nn.ModuleDict

    def __init__(self, stack: Stack, module: nn.Module, lives: list[Live]):
        super().__init__()
        self.encoders = nn.ModuleDict()
        self.lives = lives
        self.active: str | tuple[str | None, ...] | None = None
        # Of a mixed batch: the rows' names, with all that is stacked.
        self.entries: tuple[str | None, ...] = ()
        self.embeddings = stack.embeddings
        self.limit = stack.limit
        self.arguments = parameters_of(module)
        self.shifts: dict[int, Any] = {}  # how far positions move, for the embedding layer's hook, by thread
        self.kept: Any = None  # keys and values that decoding steps use again

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        for own in FORWARDS:  # the config names ours, which the process that reads a pickle may not know
            register(own)

    def passes(self) -> bool:
        """Whether a prompt's own pass runs in this thread."""
        return bool(self.lives) and self.lives[0].catch


# --- putting in and taking out ------------------------------------------------------------------------------


def put(model: nn.Module, stack: Stack, name: str, encoder: nn.Module) -> None:
    """Gives a stack the virtual tokens `encoder` makes for adapter `name`."""
    module = model.get_submodule(stack.path)
    tokens: Any = module._modules.get(CHILD)
    if tokens is None:
        prefix = f"{stack.path}." if stack.path else ""
        lives = []
        for site in stack.sites:
            layer = module.get_submodule(site.path.removeprefix(prefix))
            layer.__dict__[SITE] = Live()
            lives.append(layer.__dict__[SITE])
        tokens = VirtualTokens(stack, module, lives)
        module._modules[CHILD] = tokens
        module.register_forward_pre_hook(before_stack, with_kwargs=True)
        if stack.embeddings:
            module.get_submodule(stack.embeddings).register_forward_pre_hook(_Shift(tokens), with_kwargs=True)
        if not stack.causal and stack.path and not model.config.is_encoder_decoder:  # type: ignore[union-attr]
            model.register_forward_pre_hook(_Labels(tokens, parameters_of(model)), with_kwargs=True)
    tokens.encoders[name] = encoder


def take(model: nn.Module, name: str) -> None:
    """Removes those of adapter `name`, which must not be active; a stack without any is as it was."""
    for module in list(model.modules()):
        tokens: Any = module._modules.get(CHILD)
        if tokens is None or name not in tokens.encoders:
            continue
        del tokens.encoders[name]
        tokens.kept = None
        if not tokens.encoders:
            del module._modules[CHILD]
            _unhook(module, lambda hook: hook is before_stack)
            _unhook(model, lambda hook: isinstance(hook, _Labels))
            for part in module.modules():
                part.__dict__.pop(SITE, None)
                _unhook(part, lambda hook: isinstance(hook, _Shift))


def _unhook(module: nn.Module, mine: Any) -> None:
    for key in [key for key, hook in module._forward_pre_hooks.items() if mine(hook)]:
        del module._forward_pre_hooks[key]
        module._forward_pre_hooks_with_kwargs.pop(key, None)


def of(model: nn.Module) -> list[VirtualTokens]:
    """What the model's stacks hold."""
    return [module for module in model.modules() if isinstance(module, VirtualTokens)]


def encoders(model: nn.Module, name: str) -> list[tuple[str, nn.Module]]:
    """The encoders of adapter `name` with the paths of their stacks."""
    return [
        (path.removesuffix(CHILD).rstrip("."), module.encoders[name])
        for path, module in model.named_modules()
        if isinstance(module, VirtualTokens) and name in module.encoders
    ]


def activate(model: Any, which: str | tuple[str | None, ...] | None) -> None:
    """Sets whose virtual tokens are seen; the attention implementation follows: ours when there are any."""
    held = kept(model, "virtual tokens", lambda: of(model))
    if not held:
        return
    names = which if isinstance(which, tuple) else (which,)
    for tokens in held:
        tokens.active, tokens.kept = which, None
        tokens.entries = model.peft_engine_active if isinstance(which, tuple) else ()
        own = any(name in tokens.encoders for name in names if name is not None)
        for live in tokens.lives:
            live.clear()
            live.waiting = own
    wanted = any(name is not None and name in tokens.encoders for tokens in held for name in names)
    for config in kept(model, "configs", lambda: _configs(model)):
        now = config._attn_implementation
        own = now.removeprefix(NAME)
        if wanted and own == now and own in FORWARDS:
            set_attention(config, register(own))
        elif not wanted and own != now:
            set_attention(config, own)


def _configs(model: nn.Module) -> list[Any]:
    """The configs that say which attention runs in the stacks, each once."""
    stacks = [module for module in model.modules() if CHILD in module._modules]
    found = [getattr(module, "config", None) for stack in stacks for module in stack.modules()]
    named = [c for c in found if isinstance(getattr(c, "_attn_implementation", None), str)]
    return list({id(config): config for config in named}.values())


# --- the hooks ----------------------------------------------------------------------------------------------


def before_stack(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """A stack's forward pre-hook: leaves keys and values at the layers, moves the positions."""
    tokens: VirtualTokens = module._modules[CHILD]
    if tokens.active is None or tokens.passes():
        return None
    kwargs = {**dict(zip(tokens.arguments, args, strict=False)), **kwargs}
    _check_implementation(module.config, kwargs)
    if hasattr(module, "_maybe_slice_kv_shared_inputs"):
        # Gemma 4's last layers leave out queries by rules for the name "sdpa"; its head leaves out the rest
        kwargs["logits_to_keep"] = 0
    names = tokens.active if isinstance(tokens.active, tuple) else (tokens.active,)
    for name in dict.fromkeys(names):
        if name is not None and name in tokens.encoders:
            kwargs = tokens.encoders[name].change_inputs(module, kwargs)  # type: ignore[operator]
    inputs: Any = kwargs.get("input_ids")
    inputs = kwargs.get("inputs_embeds") if inputs is None else inputs
    rows, queries = inputs.shape[:2]
    past = kwargs.get("past_key_values")
    seen = 0 if past is None else past.get_seq_length()
    decoding = queries == 1 and past is not None and not torch.is_grad_enabled() and bool(seen > 0)
    lengths, groups = _fill(module, tokens, rows, decoding)
    shift: Any = 0
    if tokens.embeddings is not None:
        _check_room(tokens, max(lengths.values()), seen, queries, kwargs.get("position_ids"))
        shift = _shift(lengths, groups, rows, inputs.device)
    tokens.shifts[copies.thread()] = shift
    if tokens.embeddings == "":
        given = kwargs.get("position_ids")
        if given is None:
            given = (torch.arange(queries, device=inputs.device) + seen)[None]
        kwargs["position_ids"] = given + shift
    return (), kwargs


class _Shift:
    """The embedding layer's pre-hook, where that layer makes the positions (BERT, RoBERTa)."""

    def __init__(self, tokens: VirtualTokens):
        self.tokens = tokens

    def __call__(self, module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        shifts, inside = self.tokens.shifts, self.tokens.passes()
        shift = shifts.get(copies.whose(shifts), 0)
        if self.tokens.active is None or inside or (isinstance(shift, int) and shift == 0):
            return None
        kwargs = {**dict(zip(parameters_of(module), args, strict=False)), **kwargs}
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = kwargs["position_ids"] + shift
        elif isinstance(shift, int) or hasattr(module, "create_position_ids_from_input_ids"):
            kwargs["past_key_values_length"] = kwargs.get("past_key_values_length", 0) + shift
        else:
            inputs = kwargs.get("input_ids")
            inputs = kwargs["inputs_embeds"] if inputs is None else inputs
            past = kwargs.get("past_key_values_length", 0)
            kwargs["position_ids"] = torch.arange(inputs.shape[1], device=inputs.device) + past + shift
        return (), kwargs


class _Labels:
    """An encoder model's pre-hook: a label for each token becomes one for each of the longer input, -100; the
    answer to a question moves with its tokens.
    """

    def __init__(self, tokens: VirtualTokens, arguments: tuple[str, ...]):
        self.tokens = tokens
        self.arguments = arguments

    def __call__(self, module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        active = self.tokens.active
        if not isinstance(active, str) or active not in self.tokens.encoders:
            return None
        added: Any = getattr(self.tokens.encoders[active], "added", 0)
        kwargs = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
        labels, inputs = kwargs.get("labels"), kwargs.get("input_ids")
        inputs = kwargs.get("inputs_embeds") if inputs is None else inputs
        if added and labels is not None and inputs is not None and labels.shape == inputs.shape[:2]:
            kwargs |= extend_inputs(added, labels=labels)
        for name in ("start_positions", "end_positions"):
            if kwargs.get(name) is not None:
                kwargs[name] = kwargs[name].clamp(min=0) + added
        return (), kwargs


def _fill(module: Any, tokens: VirtualTokens, rows: int, decoding: bool) -> tuple[dict, dict]:
    """Leaves this forward's keys and values at the layers.

    Returns how many tokens each group of rows has, and the rows (None: all). A group is rows of one adapter,
    of a prompt those with the same stacked on it: its own pass runs through that.
    """
    active = tokens.active
    groups: dict[Any, list[int] | None] = {(active, None): None}
    order: list[Any] = []
    if isinstance(active, tuple):
        split = {name for name, encoder in tokens.encoders.items() if encoder.runs_the_stack}
        entries = zip(active, tokens.entries, strict=True)
        order = [(name, entry if name in split else None) for name, entry in entries]
        groups = dict(copies.row_groups(order, rows, "active"))
        if len(groups) == 1:
            groups = dict.fromkeys(groups)
    found = {}
    for group in groups:
        name = group[0]
        if name not in tokens.encoders:
            continue
        encoder: Any = tokens.encoders[name]
        if encoder.makes_a_graph and torch.is_grad_enabled() and _checkpoints_twice(module):
            raise ValueError(
                f"virtual tokens: the keys of {name!r} come from a graph of their own, which layers that are "
                "checkpointed by a second backward would go through again; call "
                'model.gradient_checkpointing_enable({"use_reentrant": False})'
            )
        # what was made in inference mode has no version, and cannot change outside it
        versions = ((id(p), 0 if p.is_inference() else p._version) for p in encoder.parameters())
        key = (group, *versions)
        kept = tokens.kept.get(key) if decoding and tokens.kept else None
        row = order.index(group) if order else None
        found[key] = kept or encoder.keys_and_values(module, tokens, row)
    tokens.kept = None if torch.is_grad_enabled() else found
    for i, live in enumerate(tokens.lives):
        live.parts = [(groups[key[0]], *kv[i]) for key, kv in found.items() if kv[i]]
        live.waiting = False
    count = {key[0]: tokens.encoders[key[0][0]].positions for key in found}
    return {group: count.get(group, 0) for group in groups}, groups


def _checkpoints_twice(module: nn.Module) -> bool:
    """Whether a layer is checkpointed in torch's older way, which runs a backward inside the backward."""
    functions = [
        getattr(m, "_gradient_checkpointing_func", None)
        for m in module.modules()
        if m.training and getattr(m, "gradient_checkpointing", False)
    ]
    return any(getattr(f, "keywords", {}).get("use_reentrant") for f in functions)


def _shift(lengths: dict, groups: dict, rows: int, device: torch.device) -> Any:
    """How far the positions move: a number, or (rows, 1) in a mixed batch."""
    if len(groups) == 1:
        return next(iter(lengths.values()))
    each = torch.zeros(rows, 1, dtype=torch.long)
    for group, mine in groups.items():
        each[mine] = lengths[group]
    return each.to(device)


def _check_room(tokens: VirtualTokens, most: int, seen: Any, queries: int, given: Any) -> None:
    if tokens.limit is None or torch.compiler.is_compiling():
        return
    over = most + int(seen) + queries > tokens.limit
    if over and given is not None:  # documents packed in one row: each has positions of its own
        over = most + int(given.max()) >= tokens.limit
    if over:
        raise ValueError(
            f"virtual tokens: {most} of them and {int(seen) + queries} tokens exceed the {tokens.limit} "
            "positions the model knows; shorten the input, or train fewer virtual tokens"
        )


def _check_implementation(config: Any, kwargs: dict) -> None:
    """The attention may have been set anew since the adapter was made active, or be asked for weights."""
    asked = kwargs.get("output_attentions")
    asked = config.output_attentions if asked is None else asked
    if asked and config._attn_implementation.removeprefix(NAME) in ("eager", "fused_capped"):
        raise ValueError(
            "virtual tokens: output_attentions=True, and behind virtual tokens no attention weights are "
            "formed; leave it out, or deactivate the adapter: peft_engine.active(model, None)"
        )
    now = config._attn_implementation
    if now in FORWARDS:
        set_attention(config, register(now))
    elif not now.startswith(NAME):
        raise ValueError(
            f"virtual tokens: the model's attention is set to {now!r}, which cannot put keys in front; call "
            "model.set_attn_implementation('sdpa')"
        )


@contextlib.contextmanager
def own_pass(module: nn.Module, tokens: VirtualTokens, row: int | None) -> Iterator[list[Live]]:
    """While it lasts, the stack runs as the base with what is stacked on it, and its keys are kept.

    row: of a mixed batch, whose entry is stacked.
    """
    layers = [m for m in module.modules() if getattr(m, "gradient_checkpointing", False)]
    here = copies.thread()  # others may be in the middle of a forward
    for layer in layers:  # keys caught inside a checkpoint would be made again in backward, elsewhere
        layer.gradient_checkpointing = False  # type: ignore[assignment]
    for live in tokens.lives:
        live.passes[here] = None
    try:
        with copies.only_row(row):
            yield tokens.lives
    finally:
        for layer in layers:
            layer.gradient_checkpointing = True  # type: ignore[assignment]
        for live in tokens.lives:
            live.passes.pop(here, None)
