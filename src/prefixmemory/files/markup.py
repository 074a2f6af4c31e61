"""Text from elsewhere (names, labels, messages) in Markdown and HTML: one function per sink, so that none is markup."""

from __future__ import annotations

import json
import re
from importlib.resources import files

from prefixmemory.files.records import without_nan

#: What Markdown or the HTML in it would read as markup; ``_`` within words it leaves alone.
_MARKUP = re.compile(r"[\\`*\[\]|~]|(?<!\w)_|_(?!\w)")
_HTML = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def in_markdown(text: object) -> str:
    """``text`` as one line of Markdown, also within a table, that shows what it says."""
    line = " ".join(str(text).split())
    escaped = _MARKUP.sub(lambda found: f"\\{found[0]}", line)
    return re.sub("[&<>]", lambda found: _HTML[found[0]], escaped)


def in_code(text: object) -> str:
    """``text`` as a code span of Markdown, whatever backticks it holds itself."""
    line = " ".join(str(text).split())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    space = " " if line[:1] == "`" or line[-1:] == "`" else ""
    return f"{fence}{space}{line}{space}{fence}"


def in_python(text: str) -> str:
    """``text`` as a literal of Python, in double quotes and on one line."""
    return json.dumps(text, ensure_ascii=False)


def in_page(folder: str, content: object) -> str:
    """The page ``page.html`` in ``folder`` of the package, with ``content`` as the JSON that its script reads."""
    data = json.dumps(without_nan(content), ensure_ascii=False).replace("<", "\\u003c")  # no tag, whatever it holds
    template = (files("prefixmemory") / folder / "page.html").read_text(encoding="utf-8")
    return template.replace("__DATA__", data, 1)
