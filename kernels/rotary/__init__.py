"""The Triton kernel of `ops/rotary`: rotate.py, which is its own backward with the angles turned round."""
