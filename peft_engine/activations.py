"""Activations with spare columns: what a product with an adapter inside writes behind x and dy.

A padded activation is a view (M, K) of a buffer whose rows are longer; its memory is marked, so that whoever
gets the view, or a reshape of it, may use the columns behind it as scratch. Nobody else's columns are ever
touched.
"""

import torch

_MARK = "_peft_engine_columns"
_ALIGN = 64  # elements: rows of 128 bytes in half precision, as the library products read them


def terms_of(adapter: torch.dtype, dtype: torch.dtype) -> int:
    """How many terms an adapter's value takes beside activations of `dtype`: 3 for float32 beside half, else
    1.
    """
    return 3 if adapter == torch.float32 and dtype != torch.float32 else 1


def term_width(rank: int) -> int:
    """The columns of a term: the rank, padded to the 16 bytes that the library products want."""
    return -(-rank // 8) * 8


def spare_width(rank: int, adapter: torch.dtype, dtype: torch.dtype) -> int:
    """The spare columns an adapter of this rank and dtype takes behind activations of `dtype`."""
    return terms_of(adapter, dtype) * term_width(rank)


def row_stride(columns: int, width: int) -> int:
    """The elements from row to row of a buffer with `columns` and `width` spare ones."""
    return -(-(columns + width) // _ALIGN) * _ALIGN


def padded_empty(
    rows: int,
    columns: int,
    rank: int,
    dtype: torch.dtype,
    device: torch.device | str,
    adapter_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """An uninitialised (rows, columns) with room behind each row for an adapter of `rank`.

    For whoever writes the input of a lora_linear, or the gradient of its output: the adapter's product then
    costs no copy. Use the tensor as any other; what lies behind its rows belongs to lora_linear.
    """
    return empty_with_spare(rows, columns, spare_width(rank, adapter_dtype, dtype), dtype, device)


def empty_with_spare(
    rows: int, columns: int, width: int, dtype: torch.dtype, device: torch.device | str
) -> torch.Tensor:
    """padded_empty by the number of spare columns; with none of them a plain tensor."""
    if not width:
        return torch.empty(rows, columns, dtype=dtype, device=device)
    stride = row_stride(columns, width)
    buffer = torch.empty(rows, stride, dtype=dtype, device=device)
    setattr(buffer.untyped_storage(), _MARK, (columns, stride))
    return buffer[:, :columns]


def with_spare(x: torch.Tensor, width: int) -> torch.Tensor | None:
    """(M, K + width) over the memory of x (M, K), when that was made by padded_empty with as much room."""
    mark = getattr(x.untyped_storage(), _MARK, None)
    if mark is None or x.dim() != 2:
        return None
    columns, stride = mark
    fits = x.shape[1] == columns and x.stride() == (stride, 1) and columns + width <= stride
    if not fits or x.storage_offset() % stride:
        return None
    return x.as_strided((x.shape[0], columns + width), (stride, 1))
