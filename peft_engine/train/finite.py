"""Where NaN or inf comes from: the first weight that holds one, the first layer that gives one."""

import torch


class _Found(Exception):
    pass


def first_non_finite(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> str | None:
    """The path of the first module, in the order of the forward, that gives NaN or inf; None: none does."""

    def look(path: str):
        def hook(module, args, output):
            values = output if isinstance(output, (tuple, list)) else [output]
            floats = [v for v in values if isinstance(v, torch.Tensor) and v.is_floating_point()]
            if not all(torch.isfinite(value).all() for value in floats):
                raise _Found(path)

        return hook

    handles = [module.register_forward_hook(look(path)) for path, module in model.named_modules() if path]
    try:
        with torch.no_grad():
            model(**{**inputs, "use_cache": False})
    except _Found as found:
        return str(found)
    finally:
        for handle in handles:
            handle.remove()
    return None


def check_weights(model: torch.nn.Module) -> None:
    """ValueError that names the first weight, or scale of a quantised one, with NaN or inf."""
    scales = [(path, buffer) for path, buffer in model.named_buffers() if path.endswith("absmax")]
    for path, tensor in [*model.named_parameters(), *scales]:
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        if not all(torch.isfinite(bound) for bound in torch.aminmax(tensor.detach())):
            raise ValueError(
                f"train: {path} of the model holds NaN or inf; is its file whole, and the dtype wide enough?"
            )
