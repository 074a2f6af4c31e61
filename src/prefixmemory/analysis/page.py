"""One HTML page with all figures and a side-by-side view; it needs no network and no server."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

from prefixmemory.files.markup import in_page


def page(records: Mapping[str, Any], images: Mapping[str, bytes], conditions: Mapping[str, Any]) -> str:
    """The page.

    Args:
        records: by instrument and adapter, what was measured, as plain data.
        images: by instrument, its figure as PNG.
        conditions: what it was measured on.
    """
    content = {
        "records": _rounded(records),
        "images": {name: base64.b64encode(image).decode("ascii") for name, image in images.items()},
        "conditions": dict(conditions),
    }
    return in_page("analysis", content)


def _rounded(value: Any) -> Any:
    """Plain data to four digits, without the eigenvalues: the page shall open quickly, the JSON files hold it all."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items() if key != "eigenvalues"}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value
