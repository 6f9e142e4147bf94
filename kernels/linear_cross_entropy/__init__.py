"""The Triton kernels of `ops/linear_cross_entropy`: rows.py and columns.py, between the library products."""
