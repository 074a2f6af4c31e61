"""The page of ``prefixmemory inspect`` in a real browser, without a network."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from playwright.sync_api import Browser, Locator
from transformers import AutoModelForCausalLM

import tiny
from browser import View, chromium, opened
from command_line import call, jsonl, save_talker
from prefixmemory.rows.rendering import classification_prompt
from prefixmemory.scoring.generation import answers

pytest.importorskip("matplotlib")
__all__ = ["chromium"]  # a fixture of the tests below

ADAPTERS = ("memory", "lora <b>&amp;")  # the name of a folder may hold anything


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command writes about two adapters; rows are labelled with what the first says to them."""
    folder = tmp_path_factory.mktemp("page")
    base = AutoModelForCausalLM.from_pretrained(save_talker(folder / "base"))
    base.generation_config.eos_token_id = [2, *range(6, len(tiny.tokenizer()), 2)]  # so it comes to an end soon
    base.save_pretrained(folder / "base")
    lora = get_peft_model(copy.deepcopy(base), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    memory = tiny.with_memory(base)
    for name, model in zip(ADAPTERS, (memory, lora), strict=True):
        model.active_peft_config.base_model_name_or_path = str(folder / "base")
        model.save_pretrained(folder / name)
    texts = [f"line {i}" for i in range(8)]
    said = answers(memory, tiny.tokenizer(), [classification_prompt(text) for text in texts], 16)
    labels = [answer or "-" for answer in said]
    rows = jsonl(folder / "rows.jsonl", ({"text": a, "label": b} for a, b in zip(texts, labels, strict=True)))
    words = ("--length", 64, "--tokens", 48, "--heads", 2, "--data", rows, "--context-lengths", "0,40")
    printed = call("inspect", *(folder / name for name in ADAPTERS), *words, "--output", folder / "out").success
    assert printed.strip().endswith("index.html")
    return folder / "out"


def record(folder: Path, name: str) -> dict[str, Any]:
    """What the JSON file of an instrument says, by adapter."""
    found: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())["adapters"]
    return found


def choose(view: View, quantity: str, left: str = ADAPTERS[0], right: str = ADAPTERS[1]) -> list[Locator]:
    """Both sides of the view that lays adapters side by side."""
    for name, choice in (("quantity", quantity), ("left", left), ("right", right)):
        view.page.locator(f"#{name}").select_option(choice)
    sides = view.page.locator("#sides > div").all()
    assert [side.locator("h3").inner_text() for side in sides] == [left, right]
    return sides


def numbers_of_map(side: Locator) -> dict[tuple[int, int], str]:
    """What the cells of a map say when one points at them, by layer and head."""
    cells = {}
    for text in side.locator("rect title").all_text_contents():
        layer, head, value = re.fullmatch(r"layer (\d+)(?:, head (\d+))?: (.*)", text).groups()  # type: ignore[union-attr]
        cells[int(layer), int(head or 0)] = value
    return cells


def as_shown(values: list[list[float | None]]) -> dict[tuple[int, int], str]:
    """The numbers of a JSON file as the page has them, to four digits."""
    return {
        (layer, head): "not measured" if value is None else f"{value:.4g}"
        for layer, row in enumerate(values)
        for head, value in enumerate(row)
    }


def same_numbers(shown: dict[tuple[int, int], str], expected: dict[tuple[int, int], str]) -> bool:
    def number(text: str) -> float | str:
        return text if text == "not measured" else float(text)

    return {cell: number(text) for cell, text in shown.items()} == {c: number(text) for c, text in expected.items()}


def test_every_figure_is_there_and_nothing_is_asked_of_the_network(chromium: Browser, folder: Path) -> None:
    with opened(chromium, folder / "index.html") as view:
        assert [text.split(" of ")[0] for text in view.images()] == [
            "Trade-off", "Spectrum", "Attention shift", "Readout", "Long input",
        ]  # fmt: skip
        assert view.faults() == []
        assert view.page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_broken_page_is_noticed(chromium: Browser, folder: Path, tmp_path: Path) -> None:
    """The control of the test above: each fault that it looks for, made on purpose."""
    html = (folder / "index.html").read_text()
    image = re.search(r'"shift": "(.*?)"', html)[1]  # type: ignore[index]
    policy = re.search(r"<meta http-equiv.*?>", html)[0]  # type: ignore[index]
    broken = {
        "image.html": html.replace(image, "AAAA" + image[4:]),
        "request.html": html.replace(policy, "<script src='more.js'></script>"),
        "policy.html": html.replace("<main", "<script src='more.js'></script><main"),
        "script.html": html.replace("draw();\n</script>", "draw(); nowhere.x;\n</script>"),
    }
    found = {}
    for name, text in broken.items():
        assert text != html
        (tmp_path / name).write_text(text)
        with opened(chromium, tmp_path / name) as view:
            found[name] = view.faults()
    assert found["image.html"] == [f"image: Attention shift of {', '.join(ADAPTERS)}"]
    assert f"request: {(tmp_path / 'more.js').as_uri()}" in found["request.html"]
    assert "violates the following Content Security Policy" in found["policy.html"][0]  # ours lets it ask for nothing
    assert len(found["script.html"]) == 1 and "nowhere is not defined" in found["script.html"][0]


def test_side_by_side_are_the_numbers_of_the_json_files(chromium: Browser, folder: Path) -> None:
    tradeoff, spectrum, shift, readout = (record(folder, n) for n in ("tradeoff", "spectrum", "shift", "readout"))
    memory, lora = ADAPTERS
    with opened(chromium, folder / "index.html") as view:
        for name, adapter in (("left", memory), ("right", lora)):  # so it opens
            assert view.page.locator(f"#{name}").input_value() == adapter
        for quantity, expected in {
            "Jensen-Shannon distance, input's keys": [shift[name]["distance"] for name in ADAPTERS],
            "effective rank of the bias": [[[rank] for rank in spectrum[name]["effective_rank"]] for name in ADAPTERS],
            "‖added‖ / ‖attention output‖, 64 tokens": [tradeoff[memory]["values"][-1], None],
            "rise of the loss without the head's memory": [readout[memory]["ablation"]["change"], None],
        }.items():
            for side, values in zip(choose(view, quantity), expected, strict=True):
                if values is None:
                    assert "Not known for this adapter" in side.inner_text()
                else:
                    assert same_numbers(numbers_of_map(side), as_shown(values)), quantity
                    assert side.locator("svg").bounding_box()["height"] > 50  # type: ignore[index]
        left, right = choose(view, "Jensen-Shannon distance, input's keys", lora, memory)  # changed over
        assert same_numbers(numbers_of_map(left), as_shown(shift[lora]["distance"]))
        assert not same_numbers(numbers_of_map(right), as_shown(shift[lora]["distance"]))
        assert view.faults() == []


def test_colours_are_those_of_one_scale(chromium: Browser, folder: Path) -> None:
    """The largest value of both maps has the scale's last colour, wherever it is."""
    values = {
        (side, layer, head): value
        for side, name in enumerate(ADAPTERS)
        for layer, row in enumerate(record(folder, "shift")[name]["distance"])
        for head, value in enumerate(row)
    }
    side, layer, head = max(values, key=values.__getitem__)
    with opened(chromium, folder / "index.html") as view:
        sides = choose(view, "Jensen-Shannon distance, input's keys")
        last = "rgb(254,232,56)"
        cells = [(i, cell) for i in (0, 1) for cell in sides[i].locator("rect:has(title)").all()]
        bright = [(i, cell.locator("title").text_content()) for i, cell in cells if cell.get_attribute("fill") == last]
        assert [(i, text.split(":")[0]) for i, text in bright if text] == [(side, f"layer {layer}, head {head}")]


def test_accuracy_behind_unrelated_text_is_a_table(chromium: Browser, folder: Path) -> None:
    found = record(folder, "long-input")
    assert found[ADAPTERS[0]]["accuracy"] != found[ADAPTERS[1]]["accuracy"]
    with opened(chromium, folder / "index.html") as view:
        for side, name in zip(choose(view, "accuracy behind unrelated text"), ADAPTERS, strict=True):
            rows = [row.locator("td").all_inner_texts() for row in side.locator("tr").all()[1:]]
            data = found[name]
            columns = zip(data["lengths"], data["accuracy"], data["base_accuracy"], strict=True)
            expected = [[float(f"{value:.4g}") for value in column] for column in columns]
            assert [[float(cell) for cell in row] for row in rows] == expected
        assert view.page.locator("#reading").is_hidden()
        assert view.faults() == []


def test_a_narrow_window_can_be_read(chromium: Browser, folder: Path) -> None:
    with opened(chromium, folder / "index.html", width=400) as view:
        left, right = choose(view, "Jensen-Shannon distance, input's keys")
        assert left.bounding_box()["y"] < right.bounding_box()["y"]  # type: ignore[index]
        assert view.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
