"""The Triton kernels of `ops/lora_linear`, and the paths made of them; forward.py and backward.py are called.

down.py, up.py, outer.py   the adapter's skinny products, for one adapter or for rows sorted by adapter
single.py                  the product with the weight decoded on chip and the adapter in the epilogue
workspace.py               the weight dequantised beside the adapter, [[W, sB], [A, 0]], for one library
product paths.py, tiles.py         which path for how many rows, and the tiles: tables, each entry with what
set it
"""
