"""Shape annotations: jaxtyping's names, which the tests check in every call and nobody else needs to install.

Annotations are strings (``from __future__ import annotations``), so without jaxtyping they are comments.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
else:
    try:
        from jaxtyping import Bool, Float
    except ImportError:
        Bool = Float = None

__all__ = ["Bool", "Float"]
