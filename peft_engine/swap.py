"""Puts fused layers into a model, takes them out, and says what runs in each layer and why.

A fused layer is a subclass of the layer it stands for, put in by setting the instance's class: tensors,
names, hooks and references stay, and nothing but the class says that a layer is fused. Optimising twice is
optimising once, and copies and pickles of an optimised model are optimised.
"""

import sys
from typing import TypeVar

import torch

from peft_engine import flops, layer_lines
from peft_engine.conv1d import as_made, by_rows, is_conv1d
from peft_engine.heads import attach_head, detach_head
from peft_engine.methods import derived, fused_attention, walks
from peft_engine.methods.attention_sites import uses_interface
from peft_engine.methods.sharded import class_of
from peft_engine.report import Report
from peft_engine.stand_ins import (
    as_it_was,
    fused_class,
    is_peft_layer,
    is_stand_in,
    lay_out,
    refuse_repacked,
    set_class,
    stood_for,
    unreplaced,
)

ModelType = TypeVar("ModelType", bound=torch.nn.Module)


def optimize(model: torch.nn.Module) -> Report:
    """Puts fused layers in the place of the layers of `model` that have one, and the fused loss on its head.

    model: a transformers model, plain, in bitsandbytes' 4 bit or with adapters of ours; a PeftModel.
    Returns what then runs in each layer. A second call changes nothing.
    Raises ValueError, with nothing changed, when bitsandbytes has repacked weights at an evaluation.
    """
    refuse_repacked(model)
    flops.register()
    walks.forget(model)
    detach_head(model)  # an adapter may have come around the head since it was joined with its loss
    # bitsandbytes' layers first: whether PEFT's layer around one can be fused depends on it.
    for adapters in (False, True):
        for module in model.modules():
            if is_peft_layer(module) is adapters and unreplaced(module):
                fused, _, _ = fused_class(module)
                if fused is not None and type(module) is class_of(module) and as_it_was(module) is not fused:
                    set_class(module, fused)
                    lay_out(module, by_rows)
    if "transformers" in sys.modules:
        fused_attention.put(model, [m for m in model.modules() if is_stand_in(m) and uses_interface(m)])
    attach_head(model)
    return explain(model)


def unoptimize(model: ModelType) -> ModelType:
    """The model with its layers as they were before `optimize`; adapters stay.

    Raises ValueError, with nothing changed, for a fused layer whose forward was replaced since.
    """
    there = {name: module for name, module in model.named_modules() if is_stand_in(module)}
    replaced = [name for name, module in there.items() if not unreplaced(module)]
    if replaced:
        raise ValueError(
            f"unoptimize: the forward of {replaced[0]} was replaced after optimize and calls the fused one; "
            "undo that first (accelerate.hooks.remove_hook_from_module(model, recurse=True))"
        )
    wrapped = [name for name, module in there.items() if type(module) is not class_of(module)]
    if wrapped:
        raise ValueError(f"unoptimize: {wrapped[0]} is of a class that fully_shard has made of the fused one")
    for module in there.values():
        for kept in ("_nf4", derived.KEPT):
            module.__dict__.pop(kept, None)
        set_class(module, stood_for(module))
        lay_out(module, as_made)
        if is_conv1d(type(module)):  # PEFT's layer around it, for which it was laid out, may be gone
            as_made(module)
    fused_attention.take(model)
    detach_head(model)
    return model


def explain(model: torch.nn.Module) -> Report:
    """What runs in each layer of `model` as it is set now, and why not something faster; changes nothing."""
    return Report(tuple(layer_lines.lines(model)), layer_lines.cpu())
