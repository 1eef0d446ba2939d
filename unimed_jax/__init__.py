"""UniMed-CLIP in JAX: one vision-language model for six medical imaging modalities.

Public names load on first use, so that importing the package costs nothing:

    import unimed_jax as uj
    clip = uj.load("folder")
    clip.encode_image(["scan.png"])
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors and type checkers; at run time the names load on first use
    from unimed_jax.errors import UnimedError
    from unimed_jax.infer import Loaded, create_model_and_transforms, get_tokenizer, load

__version__ = "0.1.0"

_PUBLIC = {
    "load": "unimed_jax.infer",
    "Loaded": "unimed_jax.infer",
    "create_model_and_transforms": "unimed_jax.infer",
    "get_tokenizer": "unimed_jax.infer",
    "UnimedError": "unimed_jax.errors",
}
__all__ = ["Loaded", "UnimedError", "create_model_and_transforms", "get_tokenizer", "load"]


def __getattr__(name: str) -> Any:  # PEP 562
    if name in _PUBLIC:
        import importlib

        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'unimed_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
