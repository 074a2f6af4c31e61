"""The command's start: help is quick and true, ctrl-C is one line, a missing extra is named."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import typer

import tiny
from command_line import call, jsonl
from prefixmemory.analysis.inspection import INSTRUMENTS
from prefixmemory.compare.engines import ENGINES
from prefixmemory.memories.config import Normalize, Query
from prefixmemory.memories.feature_maps import FEATURE_MAPS
from prefixmemory.models.loading import Dtype
from prefixmemory.models.quantization import Quantization
from prefixmemory.training.recipe import Recipe
from prefixmemory.training.settings import Objective, Scheduler
from prefixmemory_cli.app import app
from processes import run_python

HEAVY = ("torch", "transformers", "peft", "prefixmemory")
MODULES = "import sys; print(*{name.partition('.')[0] for name in sys.modules})"
CALL = "import sys; sys.argv = ['prefixmemory', *{words}]; import prefixmemory_cli as cli\n"


def loaded_by(code: str) -> set[str]:
    """Packages that Python has imported when it ends, after ``code``."""
    out = run_python("-c", f"import atexit\natexit.register(lambda: exec({MODULES!r}))\n{code}")
    return set(out.splitlines()[-1].split())


# Speed, by what is imported


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["recipes", "ls"], ["--version"]], ids=" ".join)
def test_help_imports_none_of_the_libraries(words):
    loaded = loaded_by(CALL.format(words=words) + "cli.main()")
    assert "typer" in loaded and not loaded & set(HEAVY)


def test_the_package_imports_the_libraries():
    # Else the test before this one could be looking in the wrong place.
    assert set(HEAVY) <= loaded_by("import prefixmemory")


# Help is true

CHOICES = {
    ("train", "feature_map"): FEATURE_MAPS,
    ("train", "normalize"): get_args(Normalize),
    ("train", "query"): get_args(Query),
    ("train", "objective"): get_args(Objective),
    ("train", "scheduler"): get_args(Scheduler),
    ("train", "dtype"): get_args(Dtype),
    ("train", "quantization"): get_args(Quantization),
    ("train", "report_to"): get_args(get_args(get_type_hints(Recipe)["report_to"])[0]),
    ("compare", "engine"): ENGINES,
    ("inspect", "what"): (*INSTRUMENTS, "all"),
    ("inspect", "dtype"): get_args(Dtype),
}


def listed(help_: str) -> list[str]:
    """The choices that a help text lists: ``φ: elu, gelu (smooth) or relu; default elu.`` are three."""
    plain = re.sub(r"^φ: |;.*| *\([^)]*\)|\.$", "", help_)
    return re.split(r",? or |, ", plain)


@pytest.mark.parametrize(("command", "option"), CHOICES, ids=" ".join)
def test_help_lists_the_choices_of_the_code(command, option):
    group: typer.core.TyperGroup = typer.main.get_command(app)
    (help_,) = [parameter.help for parameter in group.commands[command].params if parameter.name == option]
    known: Iterable[str] = CHOICES[command, option]
    assert sorted(listed(help_)) == sorted(known)


# Habits of other libraries


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("--set method.r=4", "Did you mean 'rank'?"),
        ("--set training.lr=1", "Did you mean 'learning_rate'?"),
        ("--lr 0", "learning_rate=0.0 is out of range"),
    ],
)
def test_a_name_of_another_library_is_understood_or_leads_to_ours(words, hint):
    assert hint in call("train", "--model", "x", "--data", "x.jsonl", "--output", "y", *words.split()).refusal


def test_the_tilde_is_the_home_folder_wherever_a_path_is_given(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    tiny.save_tiny(tmp_path / "base")
    jsonl(tmp_path / "rows.jsonl", [{"text": f"line {i}", "label": "ab"[i % 2]} for i in range(8)])
    call("recipes", "cp", "classification", "~/mine.yaml").success  # noqa: B018
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("model: ~/base\noutput: ~/memory\ndata: {train: ~/rows.jsonl}\ntraining: {epochs: 1}\n")
    call("train", "~/mine.yaml").success  # noqa: B018
    assert (tmp_path / "memory" / "adapter_model.safetensors").is_file()
    assert "rows 8" in call("evaluate", "~/memory", "--data", "~/rows.jsonl", "--output=~/scores.json").out
    assert (tmp_path / "scores.json").is_file() and not (tmp_path / "~").exists()


# Ctrl-C


def interrupted_after(module: str, start: list[str], folder: Path) -> tuple[int, str]:
    """Exit code and stderr of ``python START``, which gets a ctrl-C as soon as ``module`` is imported, or says so."""
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", *start],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    said, sent = "", False
    with process:
        for line in process.stderr:
            if line.split("|")[-1].strip() == module:
                process.send_signal(signal.SIGINT)
                sent = True
            elif not line.startswith("import time:"):
                said += line
    assert sent, said
    return process.returncode, said


#: Every command, and the module after whose import it is interrupted: ten moments from the first to the last.
MOMENTS = {
    "train --model x --data x.jsonl --output y": "typer",
    "recipes cp lora x.yaml": "prefixmemory_cli.app",
    "evaluate --adapter x --data x.jsonl": "numpy",
    "generate --adapter x --prompt x": "torch._C",
    "chat --adapter x": "torch.distributed",
    "push --adapter x --to a/b": "transformers",
    "inspect x --output y": "accelerate",
    "quickstart": "peft",
    "compare x.yaml": "prefixmemory.tuner.model",
    "recipes validate x.yaml": "prefixmemory.training.settings",
}


@pytest.mark.parametrize(("line", "module"), MOMENTS.items(), ids=MOMENTS.values())
def test_ctrl_c_at_any_moment_of_a_commands_start_is_one_line(tmp_path, line, module):
    start = ["-c", CALL.format(words=line.split()) + "cli.main()"]
    assert interrupted_after(module, start, tmp_path) == (130, "Stopped.\n")
    assert not list(tmp_path.iterdir())


def test_ctrl_c_behind_the_end_of_a_command_says_nothing_more(tmp_path):
    late = "import atexit, os, signal; atexit.register(os.kill, os.getpid(), signal.SIGINT); "  # runs last
    command = [sys.executable, "-c", late + CALL.format(words=["recipes", "validate", "none.yaml"]) + "cli.main()"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("module", ["torch._C", "peft", "prefixmemory_cli.app"])
def test_ctrl_c_is_one_line_where_python_runs_the_package(tmp_path, module):
    start = ["-m", "prefixmemory", "train", "--model", "x", "--data", "x.jsonl", "--output", "y"]
    assert interrupted_after(module, start, tmp_path) == (130, "Stopped.\n")


def test_ctrl_c_is_anothers_where_a_program_imports_the_package(tmp_path):
    # it says when it waits: in the midst of imports, a bare except of somebody's may swallow the signal
    in_front = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a suite in the background
    program = f"{in_front}import prefixmemory, sys, time\nprint('waiting', file=sys.stderr, flush=True)\ntime.sleep(60)"
    (tmp_path / "theirs.py").write_text(program)
    _, said = interrupted_after("waiting", ["-m", "theirs"], tmp_path)
    assert "Stopped." not in said and "KeyboardInterrupt" in said


# Without the extra


@pytest.mark.parametrize("package", ["typer", "rich", "pydantic", "datasets"])
def test_a_command_without_the_extra_names_it(tmp_path, package):
    code = CALL.format(words=["train", "--model", "x", "--data", "x.jsonl", "--output", "y"])
    code += f"from refusal import refuse; refuse({package!r}); cli.main()"
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert (done.returncode, done.stdout) == (1, "")
    line = f"error: {package} is missing, which the commands need. Install it: pip install 'prefixmemory[cli]'\n"
    assert done.stderr == line
