"""Triton kernels of `ops/nf4`: none in this version; NF4 runs on the CPU kernels and on the reference."""
