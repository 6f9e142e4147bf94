"""The Triton kernels of `ops/rms_norm`; forward.py and backward.py are called."""
