"""The Triton kernels of `ops/prefix_attention`; forward.py and backward.py are called.

dq.py, dkv.py   the backward's: over a row's keys; over the rows that see a block of keys, or of the prefix
parts.py        what they share: packed rows, which keys they see, the scores of a block
call.py         a call's tensors, sizes and strides in the order in which the kernels take them
tiles.py        the tiles: tables, each entry with what set it
"""
