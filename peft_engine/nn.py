"""Modules: NF4Linear, a linear layer whose frozen weight is held in NF4."""
