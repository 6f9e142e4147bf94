"""Linear layers whose weight another module reads without a call of the layer.

An adapter there does nothing, and packed bytes break what reads them.
"""

from torch import backends, nn

# What reads them, by class (of transformers), and which of its layers they are.
READERS = {
    "ConditionalDetrMHAttentionMap": ("k_proj",),
    "DabDetrMHAttentionMap": ("k_linear",),
    "DetrMHAttentionMap": ("k_proj",),
    "Gemma3nTextAltUp": ("correction_coefs",),
    "JambaMambaMixer": ("dt_proj",),
    "LongcatFlashTopkRouter": ("classifier",),
    "LSHSelfAttention": ("query_key", "value"),  # of Reformer, with a cache
    "MaskFormerDetrMHAttentionMap": ("k_proj",),
    "MobileBertLMPredictionHead": ("dense", "decoder"),
    "WavLMAttention": ("q_proj", "k_proj", "v_proj", "out_proj"),
    # the kernels of mamba, with which a GPU trains, take these; dt_proj is read everywhere
    **dict.fromkeys(("MambaMixer", "FalconMambaMixer"), ("x_proj", "dt_proj", "out_proj")),
    **dict.fromkeys(
        (
            "BambaMixer",
            "FalconH1Mixer",
            "GraniteMoeHybridMambaLayer",
            "Mamba2Mixer",
            "NemotronHMamba2Mixer",
            "Zamba2MambaMixer",
        ),
        ("out_proj",),
    ),
}


def never_called(model: nn.Module) -> dict[str, str]:
    """The layers that their module reads, always or on some machine, by path, each with why."""
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        for kind in type(module).__mro__:
            for name in READERS.get(kind.__name__, ()):
                why = f"is read by {type(module).__name__} without a call of the layer"
                found[f"{path}.{name}".removeprefix(".")] = why
    return found


def in_fast_path(model: nn.Module) -> dict[str, str]:
    """The layers that torch's encoder layers read in evaluation, with a kernel of their own: why, by path."""
    found: dict[str, str] = {}
    if not backends.mha.get_fastpath_enabled():
        return found
    for path, module in model.named_modules():
        if not isinstance(module, nn.TransformerEncoderLayer):
            continue
        if getattr(module.self_attn, "batch_first", True) and module.activation_relu_or_gelu:
            why = (
                f"is read by {type(module).__name__} in evaluation without a call of the layer (torch's fast "
                "path); call torch.backends.mha.set_fastpath_enabled(False) first, here and where the model "
                "runs"
            )
            found |= {f"{path}.{name}".removeprefix("."): why for name in ("linear1", "linear2")}
    return found
