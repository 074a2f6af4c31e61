"""Shape annotations: jaxtyping's names, which the tests check in every call and nobody else needs to install.

Annotations are strings (``from __future__ import annotations``), so without jaxtyping they are comments.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
else:
    try:
        from jaxtyping import Bool, Float, Int
    except ImportError:
        Bool = Float = Int = None

__all__ = ["Bool", "Float", "Int"]
