"""The Triton kernels, one sub-package per op.

In a checkout they live in the root folder kernels/, which must not be a package itself (PyPI has a package of
that name, and transformers imports it); an installed wheel carries them here.
"""

from pathlib import Path

_checkout = Path(__file__).parents[2] / "kernels"
if (_checkout.parent / "pyproject.toml").exists() and _checkout.is_dir():
    __path__.append(str(_checkout))
