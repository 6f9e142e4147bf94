"""The Triton kernels of `ops/prefix_attention`; forward.py and backward.py are called.

parts.py     what both have in common: packed rows, which keys they see, the scores of a block
tiles.py     the tiles: tables, each entry with what set it
"""
