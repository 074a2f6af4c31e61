"""What others wrote reaches the terminal as text: escape sequences are written out, and nothing is endless."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from transformers import TextStreamer

import tiny
from command_line import call, jsonl
from prefixmemory.adapters.chat import _Streamer
from prefixmemory.errors import for_terminal
from prefixmemory.progress import say, say_loading
from prefixmemory_cli import LONGEST_LINE
from prefixmemory_cli.common import put

#: A title for the window, red, the screen cleared, a bell, the line begun again, text from right to left.
NASTY = "\x1b]0;mine\x07 \x1b[31m \x9b2J \x07 a\rb \u202egnp.exe \x7f \ud800"
OBEYED = [chr(code) for code in (*range(0, 9), *range(11, 32), *range(127, 160), 0x202E, 0xD800)]


def harmless(text: str) -> bool:
    return not any(sign in text for sign in OBEYED)


def test_what_a_terminal_obeys_is_written_out_and_the_rest_is_left_alone():
    assert for_terminal("\x1b[31m") == "\\x1b[31m"
    assert harmless(for_terminal(NASTY)) and not harmless(NASTY)
    plain = "φ(q)ᵀM = 12 %,\n\ttwo lines, [bold], 日本語, 😀"
    assert for_terminal(plain) == plain


def test_of_a_long_text_begin_and_end_are_left():
    shown = for_terminal("begin " + "x" * 100_000 + " end", 300)
    assert shown.startswith("begin x") and shown.endswith("x end") and "[...]" in shown and len(shown) < 320


def test_every_way_to_print_goes_through_it(capsys):
    out = io.StringIO()
    say(Console(file=out, force_terminal=False), NASTY)
    say_loading(Console(file=out, force_terminal=False), NASTY)
    _Streamer(tiny.tokenizer()).on_finalized_text(NASTY, stream_end=True)
    put(NASTY)
    printed = out.getvalue() + capsys.readouterr().out
    assert printed.count("\\x1b[31m") == 4 and harmless(printed)


def test_without_it_an_answer_would_be_obeyed(capsys):
    TextStreamer(tiny.tokenizer()).on_finalized_text("\x1b[31m", stream_end=True)
    assert not harmless(capsys.readouterr().out)


WORDS = {
    "a name": ("generate", f"no{NASTY}where", "--prompt", "a"),
    "an option": ("train", "--set", f"training.{NASTY}=1", "--model", "m", "--data", "d.jsonl", "--output", "o"),
    "a value": ("train", "--model", "m", "--data", f"{NASTY}.jsonl", "--output", "o"),
}


@pytest.mark.parametrize("case", WORDS)
def test_an_error_shows_what_was_given_as_text(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = call(*WORDS[case]).refusal
    assert harmless(message) and "x1b" in message


@pytest.mark.parametrize("words", [("generate", "x" * 100_000, "--prompt", "a"), ("train", f"--{'x' * 100_000}")])
def test_an_error_shows_the_begin_of_what_is_too_long(words):
    answer = call(*words)
    assert answer.code != 0 and len(answer.err) < LONGEST_LINE + 600 and answer.err.count("\n") <= 2


def test_keys_and_labels_of_files_are_shown_as_text(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text('model: m\noutput: o\ndata: {train: d}\n"\\e[31mred": 1\n')
    assert harmless(call("recipes", "validate", recipe).refusal)
    rows = jsonl(tmp_path / "rows.jsonl", [{"\x1b[31mred": "x", "y": "\x1b[2J"}])
    assert harmless(call("train", "--model", "m", "--data", rows, "--output", tmp_path / "o").refusal)


def test_what_is_said_of_an_evaluation_is_text(tmp_path, monkeypatch):
    from prefixmemory.adapters.evaluate import Scores

    scores = Scores({"data": NASTY}, {NASTY: (1.0, 2.0)})
    monkeypatch.setattr("prefixmemory.adapters.evaluate.evaluate_rows", lambda *args: scores)
    monkeypatch.setattr("prefixmemory.adapters.evaluate.refuse_untrained", lambda adapter: None)
    monkeypatch.setattr("prefixmemory.adapters.loading.load_adapter", lambda *args: None)
    monkeypatch.setattr("prefixmemory.adapters.hub.adapter_folder", lambda name: Path(name))
    rows = jsonl(tmp_path / "rows.jsonl", [{"text": "a", "label": "b"}])
    assert harmless(call("evaluate", tmp_path, "--data", rows).success)
