"""The Triton kernels of `ops/nf4`: dequantize.py, quantize.py, and the tables they read."""
