"""One kernel variant compiled by Triton for one architecture, with no GPU.

Triton tells sm_80, sm_86 and sm_89 apart by name alone: where its own IR (TTGIR) is the same for them but for
the name, so is the PTX that LLVM makes of it, which takes half of the time. It is made once for what a worker
compiles together; ptxas, and all that is read of the machine code, stay each architecture's own. Of one TTGIR
in PROVED the PTX is made each time, and one that differs is a fault.
"""

import dataclasses
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench.machine_code import Result
from peft_engine.kernels.variants import Variant

ALIKE = (80, 86, 89)
PROVED = 8


@dataclass(frozen=True)
class Compiled:
    """A variant as Triton compiled it."""

    name: str
    variant: Variant
    arch: int
    cubin: bytes
    metadata: Any


def compile_triton(name: str, variant: Variant, arch: int, seen: dict[Any, Any]) -> Compiled | Result:
    """One variant for one architecture; a Result, which says why, where it does not compile.

    seen: the PTX made so far, for the ALIKE; see `sharing`.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = variant.kernel.arg_names
    if set(names) != set(variant.signature) | set(variant.constexprs):
        return Result(name, None, (f"signature and constexprs must name the arguments {', '.join(names)}",))
    source = ASTSource(
        variant.kernel,
        {n: variant.signature[n].split(":")[0] if n in variant.signature else "constexpr" for n in names},
        dict(variant.constexprs),
        {
            (n,): [["tt.divisibility", 16]]
            for n, argument in enumerate(names)
            if variant.signature.get(argument, "").endswith(":16")
        },
    )
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages, **variant.options}
    triton.knobs.compilation.store_binary_only = True  # the stages' texts are not read
    triton.knobs.runtime.add_stages_inspection_hook = sharing(seen)
    try:
        built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    except Exception as error:  # MLIR, LLVM and ptxas each have their own
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return Result(name, None, (f"does not compile: {why}",))
    return Compiled(name, variant, arch, built.asm["cubin"], built.metadata)


def sharing(seen: dict[Any, Any]) -> Callable[..., Any]:
    """A hook for Triton that looks into `seen` before LLVM makes PTX for one of ALIKE.

    seen: TTGIR and options without the architecture's name, to PTX without it and what LLVM says of it.
    """

    def hook(_backend=None, stages=None, options=None, _language=None, arch=0) -> Any:
        if stages is None:
            return "", ""  # what the hook adds to the key of Triton's cache
        if arch not in ALIKE:
            return None
        make_llir, make_ptx = stages["llir"], stages["ptx"]

        def to_ptx(module: Any, metadata: dict[str, Any]) -> str:
            text = str(module).replace(f'"cuda:{arch}"', '"cuda"')
            key = text, dataclasses.replace(options, arch="", supported_fp8_dtypes=())
            known = seen.get(key)
            if known is None or zlib.crc32(text.encode()) % PROVED == 0:
                facts: dict[str, Any] = {}
                ptx = make_ptx(make_llir(module, facts), facts)
                seen[key] = ptx.replace(f".target sm_{arch}\n", ".target\n"), facts
                if known not in (None, seen[key]):
                    raise RuntimeError(f"the PTX for sm_{arch} is not that of the others of {ALIKE}")
            ptx, facts = seen[key]
            metadata.update(facts)
            return ptx.replace(".target\n", f".target sm_{arch}\n")

        stages["llir"], stages["ptx"] = to_ptx, lambda ptx, metadata: ptx
        return None

    return hook
