"""The command line in this process, and small things to try it on."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from transformers.utils import logging

import tiny
from prefixmemory_cli import main

WEIGHTS = "adapter_model.safetensors"


@dataclass
class Answer:
    code: int
    out: str
    err: str

    @property
    def refusal(self) -> str:
        """The one line of a command that was refused."""
        assert self.code == 1 and self.out == "", (self.code, self.out, self.err)
        assert self.remarks.startswith("error: ") and self.remarks.count("\n") == 1, self.err
        return self.remarks.removeprefix("error: ").rstrip("\n")

    @property
    def remarks(self) -> str:
        """What stood on stderr beside the line that says what is loaded."""
        return "".join(line for line in self.err.splitlines(keepends=True) if not line.startswith("Loading "))

    @property
    def success(self) -> str:
        """What a command that did its work printed."""
        assert self.code == 0, self.err
        return self.out


def call(*words: object, stdin: str = "") -> Answer:
    """``prefixmemory WORDS``, with ``stdin`` piped into it."""
    out, err = io.StringIO(), io.StringIO()
    verbosity = logging.get_verbosity()
    with (
        mock.patch.object(sys, "argv", ["prefixmemory", *map(str, words)]),
        mock.patch.object(sys, "stdin", io.StringIO(stdin)),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        finally:
            logging.set_verbosity(verbosity)  # the command line silences libraries for its process
    return Answer(code, out.getvalue(), err.getvalue())


def call_line(line: str, stdin: str = "") -> Answer:
    """A command line as a shell reads it; what stands before a pipe is run by the shell, ``prefixmemory`` here."""

    def bash(script: str) -> str:
        return subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout

    before, pipe, ours = line.rpartition(" | ")
    program, *words = bash(f'printf "%s\\0" {ours}').removesuffix("\0").split("\0")
    assert program == "prefixmemory", line
    return call(*words, stdin=bash(before) if pipe else stdin)


def code_blocks(text: str) -> list[tuple[str, str]]:
    """Language (may be empty) and content of every fenced block of a Markdown text."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def jsonl(file: Path, rows: Iterable[Mapping[str, object]]) -> Path:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


def work_in_copy(made: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy what was made once to ``folder``, and go there for the rest of the test."""
    shutil.copytree(made, folder, dirs_exist_ok=True)
    monkeypatch.chdir(folder)
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder`` with its bytes."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS)


def save_talker(folder: Path, seed: int = 0) -> Path:
    """A tiny base model on disk that writes different texts for different prompts, and can be taught a little."""
    tiny.talker(seed).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder
