"""The kernels of `ops/lora_groups`: those of lora_linear over rows sorted by adapter."""
