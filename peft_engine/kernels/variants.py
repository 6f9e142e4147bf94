"""What is compiled ahead of time: kernels/<op>/variants.py yields Variants, bench/resources.py compiles them.

A variant is one kernel as one kind of launch specialises it: the types of its arguments, which of them are
divisible by 16, which became constants. `launched` takes them down from launches of the op's own functions on
meta tensors (Triton's own binder says how, no GPU is needed), so that what is compiled is what runs.
"""

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
ARCHS = (80, 86, 89, 90, 100, 120)  # compute capabilities, times ten
FEW_ARCHS = (80, 90)  # for variants beside a kernel's main one
TENSOR_CORE = "HMMA|HGMMA|UTCHMMA"  # mma.sync, wgmma and tcgen05: what a dot may become


@dataclass(frozen=True)
class Variant:
    """One kernel with one set of types and constants; its file's variants() yields it.

    name        tells it from the kernel's other variants on an architecture: "bf16, nested"
    kernel      the @triton.jit function
    signature   argument -> Triton type, for what is known at launch only: "*bf16:16", "*u8", "i32:16", "i64".
                ":16" says that a launch finds the pointer or the integer divisible by 16 (every whole tensor;
                most strides and sizes) and compiles for it. An integer is i32 up to 2^31 - 1, i64 above.
    constexprs  argument -> value, for tl.constexpr arguments and for what a launch makes one: None, and an
                integer that is 1
    options     what else the launch passes to the compiler: enable_fp_fusion, maxnreg
    archs       compute capabilities times ten; a tile table yields one variant for each architecture
    wants       regular expressions over opcodes with their modifiers, each to be found in the machine code on
                every architecture: ("LDG.E.128|LDGSTS.E.128", TENSOR_CORE); "4 STG.E.128": at least four
    weights     weights that a program decodes: in one turn of its main loop or, without a loop, in all; None:
                instructions per weight are not counted

    Names in signature and constexprs together are all of the kernel's arguments.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    options: Mapping[str, Any] = field(default_factory=dict)
    archs: tuple[int, ...] = ARCHS
    wants: tuple[str, ...] = ()
    weights: int | None = None


def collect() -> Iterator[Variant]:
    """The variants of every sub-package that has a variants.py, in the order of their names."""
    from peft_engine import kernels

    folders = [Path(entry) for entry in kernels.__path__]
    for op in sorted({path.parent.name for folder in folders for path in folder.glob("*/variants.py")}):
        yield from importlib.import_module(f"peft_engine.kernels.{op}.variants").variants()


def launched(call: Callable[[], Any]) -> list[Variant]:
    """The kernels that `call` launches, in order, none of which runs; tensors may be on the meta device.

    Their names, archs, wants and weights are left to the caller: dataclasses.replace(variant, name=...).
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    backend = make_backend(GPUTarget("cuda", ARCHS[0], 32))
    found: list[Variant] = []

    def note(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        options = dict(keywords)
        for name in [name for name in options if name in kernel.arg_names]:
            del options[name]
        binder = create_function_from_signature(inspect.signature(kernel.fn), kernel.params, backend)
        values, specialised, _ = binder(*arguments, **keywords)
        kinds = dict(zip(kernel.arg_names, specialised, strict=True))
        found.append(
            Variant(
                name="",
                kernel=kernel,
                signature={
                    name: kind + ":16" * (hint == "D")
                    for name, (kind, hint) in kinds.items()
                    if kind != "constexpr"
                },
                constexprs={name: values[name] for name, (kind, _) in kinds.items() if kind == "constexpr"},
                num_warps=options.pop("num_warps", 4),
                num_stages=options.pop("num_stages", 3),
                options=options,
            )
        )

    with mock.patch.object(JITFunction, "run", note):
        call()
    return found
