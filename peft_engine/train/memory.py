"""What is known of a run's memory before it runs: the tensors that stay, by count, and what is free.

A model without memory (torch's meta device) is built from the config alone, and gets the adapter as a real
one would. Bytes everywhere.
"""

import copy
import json
import re
import resource
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_engine.ops.nf4 import NESTED_BLOCKSIZE
from peft_engine.train import encoder_decoder
from peft_engine.train import method_options as of_method
from peft_engine.train.settings import RunSettings

MIB = 2**20
ADAM = 2  # states of AdamW as large as what is trained
PARTS = ("embedding", "layers", "head", "rest")


@dataclass(frozen=True)
class Exact:
    """The tensors that stay for the whole training, by part of the model; layers has one entry a layer.

    adapter is None where the method's tensors are made of the base's own values, which are not read.
    """

    layers: list[int]
    weights: dict[str, int]
    adapter: dict[str, int] | None

    @property
    def total(self) -> int:
        """Weights, the adapter in float32, and AdamW's states of it."""
        return sum(self.weights.values()) + (1 + ADAM) * sum((self.adapter or {}).values())


def depth_of(config: Any) -> int:
    """How many layers the config's text model has."""
    return config.get_text_config().num_hidden_layers


def stored_dtype(name: str, config: Any) -> Any:
    """The dtype that "auto" comes to: the config's, else that of the first weight of the folder's files."""
    import torch

    found = getattr(config.get_text_config(), "dtype", None) or getattr(config, "dtype", None)
    if isinstance(found, torch.dtype):
        return found
    named = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    for file in sorted(Path(name).expanduser().glob("*.safetensors")):
        with open(file, "rb") as opened:
            header = json.loads(opened.read(struct.unpack("<Q", opened.read(8))[0]))
        found = [named[t["dtype"]] for k, t in header.items() if t.get("dtype") in named]
        if found:
            return found[0]
    return torch.float32


def dtype_in_words(name: str, dtype: str, config: Any) -> str:
    """A --dtype as the command tells of it, "auto" with what it comes to."""
    return dtype if dtype != "auto" else f"{stored_dtype(name, config)} as stored".removeprefix("torch.")


def dtype_of(settings: RunSettings, config: Any) -> Any:
    """The dtype that the base is computed in."""
    import torch

    return (
        stored_dtype(settings.model, config) if settings.dtype == "auto" else getattr(torch, settings.dtype)
    )


def skeleton(config: Any, dtype: Any) -> Any:
    """The model on the meta device: shapes and names, no memory."""
    import torch

    with torch.device("meta"):  # a copy, as it writes the dtype there
        return encoder_decoder.auto_class(config).from_config(copy.deepcopy(config), dtype=dtype)


def exact(settings: RunSettings, config: Any) -> Exact:
    """Counts the weights as they will be held, and the adapter's tensors."""
    from peft_engine import attach
    from peft_engine.quantize import parameter, select_linears

    if getattr(config, "quantization_config", None) is not None:  # the shapes are those of the dense model
        config = copy.deepcopy(config)
        del config.quantization_config
    model = skeleton(config, dtype_of(settings, config))
    weights = dict(_tensors(model))
    if settings.base == "nf4":
        for name in select_linears(model, None, "estimate", 64)[0]:
            path = parameter(model, name)
            weights[path] = _nf4_bytes(model.get_parameter(path).numel())
    adapter = None
    if settings.method not in ("prefix", "prompt"):  # these start from values of the base
        attach(
            model,
            of_method.config_of(settings.method, settings.method_options, settings.model, model.config),
            "default",
        )
        adapter = {name: 4 * p.numel() for name, p in model.named_parameters() if p.requires_grad}
    place = places(model, depth_of(config))
    layers: Counter[int] = Counter()
    for name, size in weights.items():
        if isinstance(place(name), int):
            layers[place(name)] += size
    return Exact(
        [layers[i] for i in range(depth_of(config))],
        _by_part(weights, place),
        None if adapter is None else _by_part(adapter, place),
    )


def _nf4_bytes(numel: int) -> int:
    """Of a weight as `load_quantized` holds it: two values a byte, a byte for each block, their scales."""
    blocks = -(-numel // 64)
    return -(-numel // 2) + blocks + 4 * -(-blocks // NESTED_BLOCKSIZE) + 4


def _tensors(model: Any) -> Iterator[tuple[str, int]]:
    """The name and bytes of each tensor of the model, a tied one once."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        yield name, tensor.nbytes


def places(model: Any, depth: int) -> Any:
    """Says where a tensor lies, by its name: the number of its layer, else embedding, head or rest."""
    import torch

    stacks = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == depth
    ]
    ends: dict[str, str] = {}
    for part, module in (
        ("head", model.get_output_embeddings()),
        ("embedding", model.get_input_embeddings()),
    ):
        ends |= {f"{name}.": part for name, found in model.named_modules() if found is module and name}

    def place(name: str) -> int | str:
        for stack in stacks:
            inside = re.match(rf"{re.escape(stack)}\.(\d+)\.", name)
            if inside:
                return int(inside[1])
        return next((part for start, part in ends.items() if name.startswith(start)), "rest")

    return place


def _by_part(sizes: dict[str, int], place: Any) -> dict[str, int]:
    parts = dict.fromkeys(PARTS, 0)
    for name, size in sizes.items():
        where = place(name)
        parts["layers" if isinstance(where, int) else where] += size
    return parts


def cannot_fit(settings: RunSettings, config: Any) -> str | None:
    """Why the run cannot fit in what is free, by the tensors that stay alone; None: they fit, so it may."""
    found = exact(settings, config)
    free, who = free_bytes()
    if found.total <= free:
        return None
    what = "the weights" if found.adapter is None else "weights, adapter and optimiser"
    return f"{what} alone take {found.total / MIB:,.0f} MiB, and {who} {free / MIB:,.0f} MiB"


def ran_out(error: BaseException | None) -> bool:
    """Whether an error, or one that caused it, is of memory that could not be had."""
    while error is not None:
        text = str(error).lower()
        if isinstance(error, MemoryError) or (
            isinstance(error, RuntimeError) and ("out of memory" in text or "allocate memory" in text)
        ):
            return True
        error = error.__cause__
    return False


# --- what is free -------------------------------------------------------------------------------------------


def free_bytes() -> tuple[int, str]:
    """What a process may still take, and what says so: the GPU, the system, its control group or a limit."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0], "the GPU has free"
    status = _fields(Path("/proc/self/status"))
    found = [(_fields(Path("/proc/meminfo")).get("MemAvailable", 0), "the system has free")]
    found += [(free, "its control group leaves") for free in _control_groups()]
    for limit, held in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        most = resource.getrlimit(limit)[0]
        if most != resource.RLIM_INFINITY and held in status:
            found.append((max(0, most - status[held]), "ulimit leaves"))
    return min(found)


def _fields(file: Path) -> dict[str, int]:
    """The sizes of a file of /proc, in bytes; none where there is no such file."""
    try:
        lines = [line.split() for line in file.read_text().splitlines()]
    except OSError:
        return {}
    return {line[0].rstrip(":"): int(line[1]) * 1024 for line in lines if len(line) == 3 and line[2] == "kB"}


def _control_groups() -> Iterator[int]:
    """What the limits of the process's control groups leave, of version 1 and 2."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, kinds, path = line.split(":", 2)
        if number == "0":
            root, names = Path("/sys/fs/cgroup"), ("memory.max", "memory.current", "inactive_file")
        elif "memory" in kinds.split(","):
            root = Path("/sys/fs/cgroup/memory")
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        for folder in {root / path.lstrip("/"), root}:  # in a container the path is the host's
            try:
                most = (folder / names[0]).read_text().strip()
                held = int((folder / names[1]).read_text())
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):
                continue
            if most != "max" and int(most) < 2**60:
                yield max(0, int(most) - held + int(stat.get(names[2], 0)))
