"""The Triton kernels of `ops/dora_linear`; forward.py and backward.py are called."""
