"""NF4: 4-bit NormalFloat with one scale per block (QLoRA, Dettmers et al. 2023, arXiv 2305.14314, section 3).

A weight is cut, row-major, into blocks of `blocksize` values. Block b keeps absmax[b] = max |w|; each value
keeps the index of the nearest entry of the 16-entry table CODE to w / absmax[b]. Two indices fill a byte, the
first in the high nibble. Dequantised: w[i] = CODE[index[i]] * absmax[i // blocksize].

Double quantisation stores absmax in 8 bits: the mean (`offset`) is taken off, blocks of 256 share a
`nested_absmax`, and each value is the index of an entry of the 256-entry table ABSMAX_CODE near
absmax / nested_absmax.

The bytes are those of bitsandbytes 0.50 for the same input.
"""

import dataclasses
import functools
import json
import math
from typing import NamedTuple

import torch

from peft_engine import dispatch, native

BLOCKSIZES = (64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCKSIZE = 256
SCALES = ("absmax", "nested_absmax", "offset")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# The 16 quantiles of N(0, 1), scaled to [-1, 1] with an exact zero (QLoRA, appendix E). As every table
# here, in float32 and on the CPU, whatever the caller has made torch's defaults.
CODE_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

CODE = torch.tensor(CODE_VALUES, dtype=torch.float32, device="cpu")


def _absmax_code() -> torch.Tensor:
    """The signed dynamic 8-bit type (Dettmers et al. 2021, arXiv 2110.02861): 256 values in [-1, 1], sorted.

    Seven exponents 10^-6 .. 10^0; the smaller the exponent, the fewer bits are left for the fraction.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32, device="cpu")
        means = (edges[:-1] + edges[1:]) / 2.0
        values += (10 ** (exponent - 6) * means).tolist()
        values += (-(10 ** (exponent - 6)) * means).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32, device="cpu")


ABSMAX_CODE = _absmax_code()


@dataclasses.dataclass(frozen=True, eq=False)
class NF4Tensor:
    """A weight in NF4.

    packed         uint8, (ceil(numel / 2), 1), two indices a byte, the first in the high nibble
    absmax         (ceil(numel / blocksize),) float32, or uint8 when double-quantised
    nested_absmax  (ceil(absmax.numel / 256),) float32, or None
    offset         float32 scalar tensor, the mean taken off absmax, or None
    shape          the shape of the weight
    blocksize      values per absmax, a power of two from 64 to 4096
    dtype          the dtype the weight had, and dequantises to
    """

    packed: torch.Tensor
    absmax: torch.Tensor
    nested_absmax: torch.Tensor | None
    offset: torch.Tensor | None
    shape: tuple[int, ...]
    blocksize: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        numel = math.prod(self.shape)
        blocks = -(-numel // self.blocksize)
        if self.blocksize not in BLOCKSIZES:
            raise ValueError(f"NF4Tensor: blocksize must be one of {BLOCKSIZES}, got {self.blocksize}")
        if self.packed.dtype != torch.uint8 or self.packed.numel() != -(-numel // 2):
            raise ValueError(
                f"NF4Tensor: a weight of shape {self.shape} packs into {-(-numel // 2)} bytes of uint8, "
                f"got {self.packed.numel()} of {self.packed.dtype}"
            )
        if self.absmax.numel() != blocks:
            raise ValueError(
                f"NF4Tensor: a weight of shape {self.shape} in blocks of {self.blocksize} has {blocks} "
                f"scales, got {self.absmax.numel()}; was it packed with another block size?"
            )
        if (self.absmax.dtype == torch.uint8) != (self.nested_absmax is not None):
            given = "None" if self.nested_absmax is None else "given"
            raise ValueError(
                "NF4Tensor: absmax in uint8 needs nested_absmax and offset, absmax in float32 takes neither; "
                f"got {self.absmax.dtype} and nested_absmax {given}"
            )
        for name in ("packed", *SCALES):  # kernels read them as they lie
            t = getattr(self, name)
            small = name == "packed" or (name == "absmax" and self.nested_absmax is not None)
            dtype = torch.uint8 if small else torch.float32
            if t is not None and (t.dtype != dtype or not t.is_contiguous()):
                got = f"{t.dtype} of strides {t.stride()}"
                raise ValueError(f"NF4Tensor: {name} must be {dtype} and contiguous, got {got}")
        if self.nested_absmax is not None and (
            self.offset is None or self.nested_absmax.numel() != -(-blocks // NESTED_BLOCKSIZE)
        ):
            raise ValueError(
                f"NF4Tensor: {blocks} double-quantised scales need {-(-blocks // NESTED_BLOCKSIZE)} values "
                f"in nested_absmax and an offset, got {self.nested_absmax.numel()} and {self.offset}"
            )
        if dispatch.direct(self.packed):
            from peft_engine.kernels.nf4 import tables

            tables.make(self.packed.device)

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes held: packed weight, scales, and the scales of the scales."""
        parts = (self.packed, self.absmax, self.nested_absmax, self.offset)
        return sum(t.numel() * t.element_size() for t in parts if t is not None)

    def require_one_device(self, who: str) -> None:
        """ValueError when the scales are not on the device of the packed bytes."""
        here = self.packed.device
        for name in SCALES:  # asked for every product
            part = getattr(self, name)
            if part is not None and part.device != here:
                where = f"the packed weight is on {here} and its {name} on {part.device}"
                raise ValueError(f"{who}: {where}; move the whole: q.to(device)")

    def to(self, device: torch.device, packed: torch.Tensor | None = None) -> "NF4Tensor":
        """A copy on `device`; `packed`, when given, already holds the packed bytes there."""
        packed = self.packed.to(device, copy=True) if packed is None else packed
        held = {name: t.to(device, copy=True) for name in SCALES if (t := getattr(self, name)) is not None}
        return dataclasses.replace(self, packed=packed, **held)

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight as a dense tensor of `dtype` (its own when None)."""
        return nf4_dequantize(self, dtype=dtype)

    def to_bnb_state_dict(self, prefix: str = "weight") -> dict[str, torch.Tensor]:
        """The tensors bitsandbytes stores for this weight, keys starting with `prefix`."""
        described: dict[str, object] = {
            "quant_type": "nf4",
            "blocksize": self.blocksize,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": list(self.shape),
        }
        out = {
            prefix: self.packed,
            f"{prefix}.absmax": self.absmax,
            f"{prefix}.quant_map": CODE.to(self.device, copy=True),
        }
        if self.nested_absmax is not None and self.offset is not None:
            described |= {
                "nested_blocksize": NESTED_BLOCKSIZE,
                "nested_dtype": "float32",
                "nested_offset": self.offset.item(),
            }
            out[f"{prefix}.nested_absmax"] = self.nested_absmax
            out[f"{prefix}.nested_quant_map"] = ABSMAX_CODE.to(self.device, copy=True)
        state = torch.tensor(list(json.dumps(described).encode()), dtype=torch.uint8, device="cpu")
        return out | {f"{prefix}.quant_state.bitsandbytes__nf4": state}

    @classmethod
    def from_bnb_state_dict(cls, tensors: dict[str, torch.Tensor], prefix: str = "weight") -> "NF4Tensor":
        """Reads what `to_bnb_state_dict` or bitsandbytes wrote; ValueError says what is amiss."""
        kinds = [k for k in tensors if k.startswith(f"{prefix}.quant_state.bitsandbytes__")]
        key = f"{prefix}.quant_state.bitsandbytes__nf4"
        if key not in kinds:
            got = ", ".join(k.rsplit("__", 1)[1] for k in kinds) or "no quant_state"
            raise ValueError(f"from_bnb_state_dict: {prefix}: expected an nf4 quant_state, got {got}")
        try:
            state = json.loads(bytes(tensors[key].tolist()))
            shape, blocksize = tuple(state["shape"]), state["blocksize"]
            dtype = getattr(torch, state["dtype"])
            nested = "nested_blocksize" in state
            if nested and (size := state["nested_blocksize"]) != NESTED_BLOCKSIZE:
                raise ValueError(f"nested_blocksize must be {NESTED_BLOCKSIZE}, got {size}")
            packed, absmax = tensors[prefix], tensors[f"{prefix}.absmax"]
            offset = packed.new_tensor(state["nested_offset"], dtype=torch.float32) if nested else None
            nested_absmax = tensors[f"{prefix}.nested_absmax"] if nested else None
        except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"from_bnb_state_dict: {prefix}: the quant_state is incomplete or broken: {error!r}"
            ) from None
        for table, name in ((CODE, "quant_map"), (ABSMAX_CODE, "nested_quant_map")):
            stored = tensors.get(f"{prefix}.{name}")
            if stored is not None and not torch.equal(stored.float().cpu(), table):
                raise ValueError(
                    f"from_bnb_state_dict: {prefix}.{name} is not the standard table; cannot be read exactly"
                )
        if packed.dtype != torch.uint8:  # bitsandbytes' quant_storage: the same bytes seen as another dtype
            packed = packed.contiguous().view(torch.uint8)
        packed = packed.reshape(-1, 1).contiguous()
        if nested_absmax is not None:
            nested_absmax = nested_absmax.float().contiguous()
        absmax = absmax.contiguous() if nested else absmax.float().contiguous()
        return cls(packed, absmax, nested_absmax, offset, shape, blocksize, dtype)


class Nf4Call(NamedTuple):
    """What dispatch needs to know of a call."""

    device: str
    dtype: torch.dtype
    blocksize: int


QUANTIZE = dispatch.Op("nf4.quantize")
DEQUANTIZE = dispatch.Op("nf4.dequantize")


def nf4_quantize(weight: torch.Tensor, *, blocksize: int = 64, double_quant: bool = False) -> NF4Tensor:
    """Quantises a tensor of any shape to NF4.

    weight: float32, bfloat16 or float16; blocksize: 64, 128, ... 4096; the last block may be short.
    Raises TypeError for another dtype, ValueError for another block size and for NaN or inf in the weight.
    """
    if weight.dtype not in DTYPES:
        raise TypeError(f"nf4_quantize: weight must be float32, bfloat16 or float16, got {weight.dtype}")
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"nf4_quantize: blocksize must be one of {BLOCKSIZES}, got {blocksize}")
    weight = weight.detach()
    flat = weight.reshape(-1)
    run = QUANTIZE.choose(Nf4Call(weight.device.type, weight.dtype, blocksize), weight).run
    packed, absmax = run(flat, blocksize)
    if not absmax.is_meta and not absmax.isfinite().all():
        raise ValueError("nf4_quantize: weight holds NaN or inf, which NF4 cannot; is the checkpoint whole?")
    nested_absmax = offset = None
    if double_quant:
        offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())
        absmax, nested_absmax = _quantize_absmax(absmax - offset)
    return NF4Tensor(packed, absmax, nested_absmax, offset, tuple(weight.shape), blocksize, weight.dtype)


def nf4_dequantize(
    q: NF4Tensor, *, out: torch.Tensor | None = None, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """The dense tensor q stands for, of shape q.shape and `dtype` (None: q's own), written to `out` if given.

    Each value is CODE[index] * absmax in float32, rounded once to `dtype`.
    """
    q.require_one_device("nf4_dequantize")
    if out is not None:
        if tuple(out.shape) != q.shape or not out.is_contiguous() or out.device != q.device:
            raise ValueError(
                f"nf4_dequantize: out must be contiguous, of shape {q.shape} on {q.device}, got "
                f"{tuple(out.shape)} on {out.device}{'' if out.is_contiguous() else ', not contiguous'}"
            )
        if dtype is not None and dtype != out.dtype:
            raise TypeError(f"nf4_dequantize: out is {out.dtype} and dtype {dtype}; give one of them")
        if out.requires_grad and torch.is_grad_enabled():
            raise ValueError("nf4_dequantize: out asks for a gradient, and gets none here; give out.detach()")
        dtype = out.dtype
    dtype = dtype or q.dtype
    if dtype not in DTYPES:
        raise TypeError(f"nf4_dequantize: dtype must be float32, bfloat16 or float16, got {dtype}")
    if out is None:
        out = torch.empty(q.shape, dtype=dtype, device=q.device)
    DEQUANTIZE.choose(Nf4Call(q.device.type, dtype, q.blocksize)).run(q, out)
    torch.autograd.graph.increment_version(out)  # autograd does not see what kernels write
    return out


# --- reference ----------------------------------------------------------------------------------------------


def resolve_absmax(q: NF4Tensor) -> torch.Tensor:
    """The scales in float32, double quantisation undone: ABSMAX_CODE[absmax] * nested_absmax + offset."""
    if q.nested_absmax is None or q.offset is None:
        return q.absmax
    values = ABSMAX_CODE.to(q.device)[q.absmax.long()]
    return values * q.nested_absmax.repeat_interleave(NESTED_BLOCKSIZE)[: values.numel()] + q.offset


def reference_dequantize(q: NF4Tensor, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
    """nf4_dequantize in plain torch; float64 gives the exact value of the stored bytes."""
    out = torch.empty(q.shape, dtype=dtype, device=q.device) if out is None else out
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    code, absmax = CODE.to(q.device, wide), resolve_absmax(q).to(wide)
    packed, flat = q.packed.reshape(-1), out.view(-1)
    for start in range(0, flat.numel(), _CHUNK):
        values = flat[start : start + _CHUNK]
        n = values.numel()
        bytes_ = packed[start // 2 : (start + n + 1) // 2]
        index = torch.stack((bytes_ >> 4, bytes_ & 15), dim=1).reshape(-1)[:n]
        scale = absmax[start // q.blocksize : -(-(start + n) // q.blocksize)]
        values.copy_(code[index.int()] * scale.repeat_interleave(q.blocksize)[:n])
    return out


# Values the reference takes at a time: a multiple of every block size; bounds the memory it needs.
_CHUNK = 1 << 16


def _room_for(weight: torch.Tensor, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    n = weight.numel()
    absmax = weight.new_empty(-(-n // blocksize), dtype=torch.float32)
    return weight.new_empty(-(-n // 2), 1, dtype=torch.uint8), absmax


def reference_quantize(flat: torch.Tensor, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed bytes (ceil(n / 2), 1) and float32 absmax (ceil(n / blocksize),) of a flat tensor."""
    n, (packed, absmax) = flat.numel(), _room_for(flat, blocksize)
    for start in range(0, n, _CHUNK):
        bytes_, scales = _quantize_chunk(flat[start : start + _CHUNK].float(), blocksize)
        packed[start // 2 : start // 2 + bytes_.numel(), 0] = bytes_
        absmax[start // blocksize : start // blocksize + scales.numel()] = scales
    return packed, absmax


def _quantize_chunk(flat: torch.Tensor, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Full blocks are multiplied by 1 / absmax and a short last one is divided by it, as bitsandbytes does:
    the two can differ in the last bit."""
    full = flat.numel() // blocksize * blocksize
    blocks, tail = flat[:full].reshape(-1, blocksize), flat[full:]
    absmax = blocks.abs().amax(dim=1) if full else flat.new_zeros(0)
    scaled = (blocks * (1.0 / absmax.clamp(min=1e-38))[:, None]).clamp(-1, 1).reshape(-1)
    if tail.numel():
        tail_absmax = tail.abs().max().clamp(min=1e-38)
        absmax = torch.cat((absmax, tail_absmax[None]))
        scaled = torch.cat((scaled, (tail / tail_absmax).clamp(-1, 1)))
    if scaled.numel() % 2:
        scaled = torch.nn.functional.pad(scaled, (0, 1))
    code = CODE.to(flat.device)
    index = torch.bucketize(scaled, (code[1:] + code[:-1]) / 2, out_int32=True).to(torch.uint8)
    return index[::2] << 4 | index[1::2], absmax


# --- double quantisation ------------------------------------------------------------------------------------

# bitsandbytes does not search ABSMAX_CODE for the nearest entry: it rounds the scaled value to one of 65,536
# evenly spaced points of [-1, 1] and takes the entry nearest to that point. A value within half a step of a
# midpoint (1.5e-5) may go to the further entry, and the entries next to zero are never used: 0 becomes
# 2.1e-5. What is not a number (0 / 0, in a block of zeros) takes the first point. Found by bisecting all 255
# thresholds.
_ABSMAX_POINTS = 1 << 16
_HALF_RANGE = (_ABSMAX_POINTS - 1) / 2


@functools.cache
def _absmax_points(device: torch.device) -> torch.Tensor:
    """The index into ABSMAX_CODE for each of the evenly spaced points, uint8."""
    points = torch.arange(_ABSMAX_POINTS, dtype=torch.float32, device="cpu") / _HALF_RANGE - 1.0
    return torch.bucketize(points, (ABSMAX_CODE[1:] + ABSMAX_CODE[:-1]) / 2).to(device, torch.uint8)


def _quantize_absmax(centred: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """absmax - offset in blocks of 256: uint8 indices into ABSMAX_CODE, and one float32 scale a block."""
    n = centred.numel()
    blocks = torch.nn.functional.pad(centred, (0, -n % NESTED_BLOCKSIZE)).reshape(-1, NESTED_BLOCKSIZE)
    nested_absmax = blocks.abs().amax(dim=1) if n else centred.new_zeros(0)
    scaled = blocks * (1.0 / nested_absmax)[:, None]
    point = ((scaled + 1.0) * _HALF_RANGE + 0.5).nan_to_num(nan=0.0).clamp(0, _ABSMAX_POINTS - 1).int()
    return _absmax_points(centred.device)[point.reshape(-1)[:n]], nested_absmax


# --- backends -----------------------------------------------------------------------------------------------

native.library.define("nf4_quantize(Tensor weight, int blocksize) -> (Tensor, Tensor)")
native.library.define(
    "nf4_dequantize(Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? offset, int blocksize,"
    " Tensor(a!) out) -> ()"
)


torch.library.register_fake("peft_engine::nf4_quantize", _room_for)


@torch.library.register_fake("peft_engine::nf4_dequantize")
def _(packed, absmax, nested_absmax, offset, blocksize, out) -> None:
    return None


def refuse_unless_cpu(call) -> str | None:
    return None if call.device == "cpu" else f"the tensors are on {call.device}"


def _dequantize(q: NF4Tensor, out: torch.Tensor) -> None:
    torch.ops.peft_engine.nf4_dequantize(q.packed, q.absmax, q.nested_absmax, q.offset, q.blocksize, out)


def refuse_unless_cuda(call) -> str | None:
    return None if call.device == "cuda" else f"the tensors are on {call.device}"


# Triton is imported when the first tensor on a GPU asks for it.
@torch.library.impl(native.library, "nf4_quantize", "CUDA")
def _(weight: torch.Tensor, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    from peft_engine.kernels.nf4.quantize import quantize

    return quantize(weight, blocksize)


@torch.library.impl(native.library, "nf4_dequantize", "CUDA")
def _(packed, absmax, nested_absmax, offset, blocksize, out) -> None:
    from peft_engine.kernels.nf4.library import dequantize

    dequantize(packed, absmax, nested_absmax, offset, blocksize, out)


def _quantize(flat: torch.Tensor, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ops.peft_engine.nf4_quantize(flat.contiguous(), blocksize)


QUANTIZE.register("triton", _quantize, refuse_unless_cuda)
QUANTIZE.register("cpu", _quantize, refuse_unless_cpu)
QUANTIZE.register("reference", reference_quantize)
DEQUANTIZE.register("triton", _dequantize, refuse_unless_cuda)
DEQUANTIZE.register("cuda", _dequantize, refuse_unless_cuda)
DEQUANTIZE.register("cpu", _dequantize, refuse_unless_cpu)
DEQUANTIZE.register("reference", lambda q, out: reference_dequantize(q, out.dtype, out))
