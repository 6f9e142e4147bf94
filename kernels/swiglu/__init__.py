"""The Triton kernels of `ops/swiglu`; forward.py and backward.py are called."""
