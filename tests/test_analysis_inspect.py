"""``prefixmemory inspect``: from saved adapters to JSON, figures and a page, and what it refuses."""

from __future__ import annotations

import base64
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model

import tiny
from prefixmemory.adapters.loading import load_adapter
from prefixmemory.analysis import Tradeoff, figures, tradeoff
from prefixmemory.analysis.inputs import token_ids
from prefixmemory.analysis.inspection import labels
from prefixmemory.analysis.page import page
from prefixmemory.errors import PrefixMemoryError
from prefixmemory_cli import main

FAST = ("--length", "64", "--tokens", "48", "--heads", "2", "--limit", "2", "--context-lengths", "0,20")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, and adapters of four kinds for it."""
    folder = tmp_path_factory.mktemp("inspect")
    base = tiny.save_tiny(folder / "base")
    made = {
        "memory": tiny.with_memory(tiny.build()),
        "inside-2": tiny.with_memory(tiny.build(), placement="inside", prefix_length=2),
        "inside-8": tiny.with_memory(tiny.build(), placement="inside", prefix_length=8),
        "lora": get_peft_model(tiny.build(), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)),
        "peft-prefix": get_peft_model(tiny.build(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
    }
    for name, model in made.items():
        model.active_peft_config.base_model_name_or_path = str(base)
        model.save_pretrained(folder / name)
    return folder


@dataclass
class Inspect:
    """The command in ``folder``."""

    folder: Path
    output: Path
    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]

    def __call__(self, *words: object) -> tuple[int, str, str]:
        arguments = ["prefixmemory", "inspect", *map(str, words), "--output", str(self.output)]
        self.monkeypatch.setattr(sys, "argv", arguments)
        self.monkeypatch.chdir(self.folder)
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = self.capsys.readouterr()
        return int(exit_.value.code or 0), captured.out, captured.err

    def refused(self, *words: object) -> str:
        code, out, err = self(*words)
        lines = err.strip().splitlines()
        assert code == 1
        assert out == ""
        assert lines[-1].startswith("error: ")
        assert not self.output.exists()
        return lines[-1]

    def record(self, name: str) -> dict[str, object]:
        return json.loads((self.output / f"{name}.json").read_text())["adapters"]


@pytest.fixture
def inspect(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Inspect:
    return Inspect(folder, tmp_path / "out", monkeypatch, capsys)


# What it writes


def test_one_command_from_a_saved_adapter_to_everything(inspect: Inspect) -> None:
    pytest.importorskip("matplotlib")
    code, out, _ = inspect("memory", *FAST)
    assert code == 0
    names = [f"{name}.{end}" for name in ("tradeoff", "spectrum", "shift", "readout") for end in ("json", "png")]
    assert [Path(line).name for line in out.splitlines()] == [*names, "index.html"]
    assert sorted(file.name for file in inspect.output.iterdir()) == sorted([*names, "index.html"])
    for name in names[1::2]:
        assert (inspect.output / name).read_bytes().startswith(b"\x89PNG")
    content = json.loads((inspect.output / "tradeoff.json").read_text())
    assert content["conditions"]["text"] == "Northline, test messages"
    assert content["conditions"]["dtype"] == "float32"
    assert content["versions"]["prefixmemory"]
    data = content["adapters"]["memory"]
    assert data["lengths"] == [16, 32, 64]
    measured = [value for row in inspect.record("readout")["memory"]["ablation"]["change"] for value in row]
    assert sum(value is not None for value in measured) == 2


def test_the_files_hold_what_the_functions_return(inspect: Inspect, folder: Path) -> None:
    pytest.importorskip("matplotlib")
    inspect("inside-2", "--what", "tradeoff", "--length", 40)
    adapter = load_adapter(str(folder / "inside-2"), dtype="float32")
    expected = tradeoff(adapter.model, token_ids(adapter.tokenizer, None, 40), [16, 32, 40])
    found = inspect.record("tradeoff")["inside-2"]
    assert (found["lengths"], found["prefix_length"]) == ([16, 32, 40], 2)
    torch.testing.assert_close(torch.tensor(found["values"]), torch.tensor(expected.values))


def test_adapters_of_all_kinds_side_by_side(inspect: Inspect) -> None:
    """With ``all``, an instrument leaves out the adapters of which it knows nothing, and says so."""
    pytest.importorskip("matplotlib")
    code, _, err = inspect("memory", "inside-2", "inside-8", "lora", "peft-prefix", *FAST)
    assert code == 0
    said = " ".join(err.split())
    assert "lora: no tradeoff." in said
    assert "inside-2: no readout. There is no memory in this adapter" in said
    assert "memory: no long-input. memory is right on none of 2 Northline messages" in said
    everyone = ["memory", "inside-2", "inside-8", "lora", "peft-prefix"]
    assert list(inspect.record("tradeoff")) == [name for name in everyone if name != "lora"]
    assert list(inspect.record("spectrum")) == everyone
    assert list(inspect.record("shift")) == everyone
    assert list(inspect.record("readout")) == ["memory"]
    assert inspect.record("tradeoff")["peft-prefix"]["prefix_length"] == 3
    assert (inspect.record("shift")["lora"]["with_prefix"] is None) != (
        inspect.record("shift")["peft-prefix"]["with_prefix"] is None
    )


def test_a_text_and_rows_of_ones_own(inspect: Inspect, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    text = tmp_path / "words.txt"
    text.write_text(("The line is dead. " * 3).rstrip(), encoding="utf-8")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"line {i}", "label": "ab"[i % 2]}) + "\n" for i in range(3)))
    code, _, _ = inspect("memory", "--text", text, "--heads", 1, "--data", rows, "--context-lengths", "9")
    assert code == 0
    length = 53  # a token a character
    assert inspect.record("tradeoff")["memory"]["lengths"] == [16, 32, length]
    assert inspect.record("spectrum")["memory"]["tokens"] == length
    content = json.loads((inspect.output / "readout.json").read_text())
    assert content["conditions"]["rows of ablations"] == "rows.jsonl, 64 at most"


def test_names_of_adapters() -> None:
    assert labels(["runs/a", "runs/b/"]) == ["a", "b"]
    assert labels(["x/adapter", "y/adapter", "z"]) == ["x/adapter", "y/adapter", "z"]


# What it refuses


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("lora", "--what", "readout"), "There is no memory in this adapter"),
        (("inside-2", "--what", "readout"), "There is no memory in this adapter"),
        (("lora", "--what", "tradeoff"), "holds neither"),
        (("memory", "--what", "spektrum"), "Did you mean 'spectrum'?"),
        (("memory", "--length", "8"), "length=8 is out of range"),
        (("memory", "--length", "600"), "600 tokens where the model reads at most 512"),
        (("memory", "--dtype", "float16"), "dtype='float16' is not known"),
        (("memory", "--heads", "0", "--what", "all"), "heads=0 is out of range"),
        (("memory", "--data", "rows.jsonl", "--limit", "0", "--what", "all"), "limit=0 is out of range"),
        (("memory", "--data", "rows.jsonl", "--what", "all"), "The data file rows.jsonl does not exist"),
        (("memory", "memory"), "given twice"),
        (("memory", "no-such-adapter"), "no-such-adapter"),
        (("memory", "--text", "no.txt"), "The text no.txt cannot be read"),
    ],
)
def test_what_cannot_be_known_is_refused_in_one_line(inspect: Inspect, words: tuple[str, ...], message: str) -> None:
    pytest.importorskip("matplotlib")
    what = () if "--what" in words else ("--what", "tradeoff")
    assert message in inspect.refused(*words, *what)


#: By option: a value, and the instruments that read it.
OPTIONS = {
    "--text": ("no.txt", {"tradeoff", "spectrum", "shift", "readout"}),
    "--length": ("20", {"tradeoff"}),
    "--tokens": ("20", {"spectrum", "shift", "readout"}),
    "--heads": ("1", {"readout"}),
    "--data": ("no.jsonl", {"readout", "long-input"}),
    "--limit": ("1", {"readout", "long-input"}),
    "--context": ("no.txt", {"long-input"}),
    "--context-lengths": ("0", {"long-input"}),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_of_other_instruments_is_refused_not_dropped(inspect: Inspect, option: str) -> None:
    value, readers = OPTIONS[option]
    for what in ("tradeoff", "spectrum", "shift", "readout", "long-input", "all"):
        error = inspect.refused("no-such-adapter", "--what", what, option, value)  # which is looked for afterwards
        says = f"{what} does not read {option[2:]}, which is for" in error
        assert says == (what not in readers | {"all"}), error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--limit", "1"), "readout reads limit with data only"),
        (("--limit", "1", "--data", "no.jsonl"), "no-such-adapter"),  # the controls: looked for afterwards
        (("--data", "no.jsonl", "--text", "no.txt"), "readout reads text without data only"),
        (("--data", "no.jsonl", "--tokens", "20"), "readout reads tokens without data only"),
        (("--tokens", "20"), "no-such-adapter"),
    ],
)
def test_ablations_are_measured_on_rows_or_on_the_text(inspect: Inspect, words: tuple[str, ...], message: str) -> None:
    assert message in inspect.refused("no-such-adapter", "--what", "readout", *words)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", (), "The text is empty"),
        (" \n", (), "The text is empty"),
        ("too short", (), "The text has 9 tokens where 16 are needed"),
        ("The line is dead, again.", ("--length", "64"), "The text has 24 tokens where 64 are asked for"),
    ],
)
def test_texts_that_are_too_short(
    inspect: Inspect, tmp_path: Path, text: str, options: tuple[str, ...], message: str
) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "text.txt"
    file.write_text(text)
    assert message in inspect.refused("memory", "--text", file, *options)


def test_bytes_that_are_no_text(inspect: Inspect, tmp_path: Path) -> None:
    file = tmp_path / "text.bin"
    file.write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in inspect.refused("memory", "--text", file)


def test_nothing_is_overwritten(inspect: Inspect) -> None:
    inspect.output.mkdir()
    (inspect.output / "mine.txt").write_text("mine")
    code, _, err = inspect("memory")
    assert code == 1
    assert "exists already" in err
    assert [file.name for file in inspect.output.iterdir()] == ["mine.txt"]


def test_matplotlib_is_asked_for_first(inspect: Inspect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install 'prefixmemory[analysis]'" in inspect.refused("memory")
    with pytest.raises(PrefixMemoryError, match="need matplotlib"):
        figures.tradeoff_figure({})


# Figures and page


def test_figures_say_what_they_show(folder: Path) -> None:
    pytest.importorskip("matplotlib")
    found = {}
    for name in ("inside-2", "inside-8", "memory"):
        adapter = load_adapter(str(folder / name))
        found[name] = tradeoff(adapter.model, token_ids(adapter.tokenizer, None, 64), [16, 64])
    axes = figures.tradeoff_figure(found).axes
    assert [axis.get_xlabel() for axis in axes] == [
        "input length (tokens)", "layer (index)", "prefix length (vectors)", "input length (tokens)", "layer (index)",
    ]  # fmt: skip
    assert all(axis.get_ylabel() for axis in axes)
    lines = axes[0].get_lines()
    assert [line.get_label() for line in lines] == ["inside-2", "inside-8"]
    for index, name in enumerate(("inside-2", "inside-8")):
        means = [float(torch.tensor(values).mean()) for values in found[name].values]
        assert list(lines[index].get_ydata()) == pytest.approx(means)
    looks = [(line.get_color(), line.get_linestyle(), line.get_marker()) for line in lines]
    assert all(a != b for a, b in zip(*looks, strict=True))  # colour, style and marker differ
    colours = {line.get_label(): line.get_color() for axis in (*axes[:2], *axes[3:]) for line in axis.get_lines()}
    assert len(set(colours.values())) == 3  # an adapter has one colour in all panels
    assert list(axes[2].get_lines()[0].get_xdata()) == [2, 8]


def test_adapters_that_read_to_other_lengths_are_named_with_all_of_them() -> None:
    pytest.importorskip("matplotlib")
    long = Tradeoff("ratio", "", None, ["a"], [16, 4096], 8, [[[0.25]], [[0.7]]])
    short = Tradeoff("ratio", "", None, ["a"], [16, 1024], 8, [[[0.25]], [[0.5]]])
    _, by_layer = figures.tradeoff_figure({"long": long, "short": short}).axes
    assert by_layer.get_title().startswith("mean over heads at 1,024 and 4,096 tokens")


def test_a_log_axis_over_part_of_a_decade_has_plain_numbers() -> None:
    agg = pytest.importorskip("matplotlib.backends.backend_agg")
    data = Tradeoff("ratio", "", None, ["a"], [16, 64], 8, [[[0.25]], [[0.7]]])
    figure = figures.tradeoff_figure({"memory": data})
    agg.FigureCanvasAgg(figure).draw()
    shown = [label.get_text() for label in figure.axes[0].get_yticklabels(which="minor") if label.get_text()]
    assert {"0.3", "0.6"} <= set(shown) and not [text for text in shown if "e" in text]


def test_the_page_needs_nothing_from_outside(inspect: Inspect) -> None:
    pytest.importorskip("matplotlib")
    inspect("memory", "inside-2", *FAST)
    html = (inspect.output / "index.html").read_text()
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!data:)""", html)
    assert "default-src 'none'" in html
    found = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)[1])
    assert list(found["images"]) == ["tradeoff", "spectrum", "shift", "readout"]
    assert base64.b64decode(found["images"]["shift"]) == (inspect.output / "shift.png").read_bytes()
    assert list(found["records"]["tradeoff"]) == ["memory", "inside-2"]
    assert found["records"]["shift"]["memory"]["distance"][0] == [0.0] * 4


def test_a_page_with_a_hostile_name_stays_whole() -> None:
    name = "</script><!-- <script>alert(1)"
    html = page({"shift": {name: {"definition": name, "distance": [[0.1]]}}}, {"shift": b"png"}, {"text": name})
    body = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)[1]
    assert "<" not in body
    assert list(json.loads(body)["records"]["shift"]) == [name]
