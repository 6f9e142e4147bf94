"""The Triton kernels of `ops/bottleneck`; forward.py and backward.py are called.

parts.py     what the kernels are made of: mixed products, activations, the norm, both products of a row block
fused.py     a row block in one program: the middle stays in registers, one launch each way
split.py     the same in several launches: for middles too wide for registers, and rows too few to fill a GPU
outer.py     the gradients of weights, biases and norm: split over the rows, added in a fixed order
tiles.py     which of fused and split, and the tiles
"""
