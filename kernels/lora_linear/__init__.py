"""The Triton kernels of `ops/lora_linear`, and the paths made of them; forward.py and backward.py are called.

down.py, up.py, outer.py   the adapter's skinny products, for one adapter or for rows sorted by adapter
single.py                  the product with the weight decoded on chip and the adapter in the epilogue
workspace.py, fill.py      the weight dequantised with the adapter beside or below it, for one library product
few_rows.py                the call of the CUDA library's product for 1 to 64 rows
paths.py, tiles.py         which path for how many rows, and the tiles: tables, each entry with what set it
"""
