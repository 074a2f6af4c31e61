"""Names and texts from elsewhere in Markdown and HTML: they show what they say, and are no markup."""

from __future__ import annotations

import ast
import json
import re
from html.parser import HTMLParser

import pytest
from markdown_it import MarkdownIt

from prefixmemory.files.markup import in_code, in_markdown, in_page, in_python

NASTY = [
    "<script>alert(1)</script>",
    "a | b",
    "**bold** and _it_ and ~~gone~~",
    "[a link](https://example.org)",
    "![an image](https://example.org/a.png)",
    "`code` and ``more``",
    "back\\slash \\| pipe",
    "a\n\n# heading\n- list",
    "&lt;b&gt; &amp; &",
    "bbh_sports_understanding",
]


class Shown(HTMLParser):
    """Tags and text of some HTML."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def shown(markdown: str) -> Shown:
    return Shown(MarkdownIt("gfm-like", {"linkify": False}).render(markdown))


@pytest.mark.parametrize("text", NASTY)
def test_a_cell_of_a_table_shows_the_text_and_nothing_else(text: str) -> None:
    found = shown(f"| name | score |\n| --- | --- |\n| {in_markdown(text)} | 1 |\n")
    assert set(found.tags) == {"table", "thead", "tbody", "tr", "th", "td"}
    assert found.text.split() == ["name", "score", *text.split(), "1"]


@pytest.mark.parametrize("text", [text for text in NASTY if text != "bbh_sports_understanding"])
def test_without_it_the_same_texts_are_markup(text: str) -> None:
    """The control: each of them would change the table, or read otherwise."""
    found = shown(f"| name | score |\n| --- | --- |\n| {text} | 1 |\n")
    plain = {"table", "thead", "tbody", "tr", "th", "td"}
    assert set(found.tags) != plain or found.text.split() != ["name", "score", *text.split(), "1"]


@pytest.mark.parametrize("text", [*NASTY, "`", "``a`` b```", "a`"])
def test_a_code_span_shows_the_text_and_nothing_else(text: str) -> None:
    found = shown(f"before {in_code(text)} behind")
    assert found.tags == ["p", "code"]
    assert found.text.split() == ["before", *text.split(), "behind"]


@pytest.mark.parametrize(
    "text", ['a"b', "a\\", 'a" + exit() + "', "a\nimport os\n", "a\x1b[31m", "😀", "```\n```python"]
)
def test_a_literal_of_python_is_the_text_and_stays_on_its_line(text: str) -> None:
    literal = in_python(text)
    assert ast.literal_eval(literal) == text
    assert "\n" not in literal


def test_a_name_of_a_task_stays_readable() -> None:
    assert in_markdown("bbh_sports_understanding") == "bbh_sports_understanding"


@pytest.mark.parametrize("folder", ["compare", "analysis"])
def test_the_data_of_a_page_cannot_close_its_script(folder: str) -> None:
    content = {"name": "</script><script>alert(1)</script><!--", "none": float("nan")}
    page, empty = in_page(folder, content), in_page(folder, {})
    assert Shown(page).tags == Shown(empty).tags
    data = re.search(r'<script[^>]*type="application/json"[^>]*>(.*?)</script>', page, re.DOTALL)
    assert data is not None
    assert json.loads(data[1]) == {**content, "none": None}
