"""Bottleneck adapters as the `adapters` library (AdapterHub) has them on disk, both ways.

A folder holds adapter_config.json and adapter.safetensors (or, by the library's default, a pickle). The key
of a tensor is its path in the library: `bert.encoder.layer.0.output.adapters.NAME.adapter_down.0.weight`.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from peft_engine.methods import peft_config, sharded
from peft_engine.methods.bottleneck_config import UNSUPPORTED, BottleneckConfig
from peft_engine.methods.bottleneck_layers import CHILD, leaf_names
from peft_engine.methods.bottleneck_sites import Site, holder_of

WEIGHTS = "adapter.safetensors"
VERSION = "adapters.1.3.0"  # the newest whose fields are known here
# Fields of the library's config that say nothing while phm_layer is False, or are about how training started.
INERT = (
    "phm_dim", "factorized_phm_W", "shared_W_phm", "shared_phm_rule", "factorized_phm_rule", "phm_c_init",
    "phm_init_range", "learn_phm", "hypercomplex_nonlinearity", "phm_rank", "phm_bias", "init_weights_seed",
    "architecture",
)  # fmt: skip
OURS = ("width", "modules_to_save", "task_type")  # fields of ours that the library's config has not
# Around the config: the library's, and what a checkpoint of ours adds.
AROUND = (
    "config", "config_id", "hidden_size", "model_class", "model_name", "model_type", "name", "version",
    "label2id", "type", "base_model_name_or_path",
)  # fmt: skip


def names(sites: Mapping[str, tuple[Site, int]], config: BottleneckConfig, name: str) -> dict[str, str]:
    """The library's key of each of our paths, for an adapter called `name` there."""
    return {
        f"{path}.{CHILD}.{leaf}": f"{site.holder}.adapters.{name}.{leaf}"
        for path, (site, _) in sites.items()
        for leaf in leaf_names(config).values()
    }


def keys(model: nn.Module, paths: Iterable[str], name: str) -> dict[str, str]:
    """The library's keys of our paths; that of a parameter trained whole is its path."""
    out = {}
    for path in paths:
        site, found, leaf = path.partition(f".{CHILD}.")
        out[path] = f"{holder_of(model, site)}.adapters.{name}.{leaf}" if found else path
    return out


def config_to_file(model: Any, config: BottleneckConfig, name: str) -> dict[str, Any]:
    """The fields of the library's adapter_config.json, and our own beside them."""
    fields = dataclasses.asdict(config)
    ours = {field: fields.pop(field) for field in OURS}
    hidden = getattr(getattr(model, "config", None), "hidden_size", None)
    if config.width is not None:
        if hidden is None:
            raise ValueError(
                f"save_adapter: the adapter has width={config.width}, and the file says how many times "
                "narrower than the hidden size it is, which this model's config does not tell; give "
                "reduction_factor"
            )
        fields["reduction_factor"] = _factor(hidden, config.width)
    fields["scaling"] = float(config.scaling)  # the library takes no integer
    return {
        "config": fields,
        "hidden_size": hidden,
        "model_class": sharded.class_of(model).__name__,
        "model_name": getattr(model, "name_or_path", None) or None,
        "model_type": getattr(getattr(model, "config", None), "model_type", None),
        "name": name,
        "version": VERSION,
        **{field: value for field, value in ours.items() if value is not None and field != "width"},
    }


def config_from_file(fields: Any, where: str) -> BottleneckConfig:
    """The config in an adapter_config.json; ValueError names what is unknown, not offered or broken."""
    if not isinstance(fields, dict) or not isinstance(fields.get("config"), dict):
        raise ValueError(
            f"{where}: expected a JSON object with the adapter's fields under 'config', got "
            f"{sorted(fields) if isinstance(fields, dict) else type(fields).__name__}"
        )
    inner = fields["config"]
    kind = inner.get("architecture")
    if kind is not None:
        raise ValueError(f"{where}: config.architecture={kind!r} is no bottleneck adapter; it must be null")
    known = {f.name for f in dataclasses.fields(BottleneckConfig)} - set(OURS)
    outer = ("modules_to_save", "task_type")
    unknown = sorted(fields.keys() - {*AROUND, *outer})
    unknown += [f"config.{field}" for field in sorted(inner.keys() - known - set(INERT))]
    if unknown:
        raise ValueError(
            f"{where}: unknown key {', '.join(map(repr, unknown))}; written by {fields.get('version')!r}, "
            f"known here: {VERSION!r} and older"
        )
    missing = [
        f for f in ("mh_adapter", "output_adapter", "reduction_factor", "non_linearity") if f not in inner
    ]
    if missing:
        raise ValueError(f"{where}: config has no {', '.join(missing)}")
    given = {field: value for field, value in inner.items() if field in known}
    for field, (only, _) in UNSUPPORTED.items():
        if given.get(field, only) is None:
            given.pop(field)
    given |= {field: fields[field] for field in outer if fields.get(field) is not None}
    return peft_config.build(BottleneckConfig, given, where)


def _factor(hidden: int, width: int) -> float:
    """A reduction factor of which the library makes this width: int(hidden // factor)."""
    factor = hidden / width
    # hidden // factor may come out one below for want of a bit.
    return factor if hidden // factor == width else hidden / (width + 0.5)
