"""Ctrl-C: a checkpoint is kept, the printed command goes on from it, and nothing is lost or changed by the stop."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import TrainerCallback
from transformers.utils import logging

import tiny
from prefixmemory import PrefixMemoryConfig
from prefixmemory.rows.rendering import Example
from prefixmemory.training.interrupt import Interrupted, StopOnSignal
from prefixmemory.training.loop import train
from prefixmemory.training.settings import TrainingSettings
from prefixmemory_cli import main

WEIGHTS = "adapter_model.safetensors"
#: 24 rows in batches of 4: 6 steps an epoch. Rows differ in length, so that their order matters.
ROWS = [{"text": f"line {i} is dead" + " again" * (i % 5), "label": "abc"[i % 3]} for i in range(24)]
EXAMPLES = [Example(f"Text: {row['text']}\nLabel:", f" {row['label']}<eos>") for row in ROWS]


class InterruptAt(TrainerCallback):
    """Ctrl-C (or another signal), ``times`` times, while the Trainer works on step ``step``."""

    def __init__(self, step: int, times: int = 1, number: int = signal.SIGINT) -> None:
        self.step, self.times, self.number = step, times, number

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            for _ in range(self.times):
                signal.raise_signal(self.number)


@pytest.fixture(autouse=True)
def _signals_and_logging() -> Iterator[None]:
    numbers, verbosity = (signal.SIGINT, signal.SIGTERM), logging.get_verbosity()
    handlers = [signal.getsignal(number) for number in numbers]
    yield
    assert [signal.getsignal(number) for number in numbers] == handlers
    logging.set_verbosity(verbosity)  # the command line silences libraries for its process


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """The command line in this process; returns exit code and what was said on stderr after the model was loaded."""

    def run(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["prefixmemory", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main()
        said = capsys.readouterr().err.splitlines(keepends=True)
        return int(exit_.value.code or 0), "".join(line for line in said if not line.startswith("Loading "))

    return run


@pytest.fixture
def place(tmp_path: Path) -> Path:
    # A blank in the folder's name: the printed command must be quoted.
    folder = tmp_path / "my runs"
    tiny.save_tiny(folder / "base")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


def command(place: Path, output: str, *words: str) -> list[str]:
    return [
        "train", "--model", str(place / "base"), "--data", str(place / "rows.jsonl"), "--output", str(place / output),
        "--batch-size", "4", "--save-steps", "2", "--learning-rate", "0.01", "--dtype", "float32", *words,
    ]  # fmt: skip


def printed_command(message: str) -> list[str]:
    """The words after ``prefixmemory`` in the last line of the message."""
    program, *words = shlex.split(message.rstrip().splitlines()[-1].partition("To go on: ")[2])
    assert program == "prefixmemory"
    return words


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int, times: int = 1) -> None:
    """Have the command line interrupted, in place of its progress bar."""
    monkeypatch.setattr("prefixmemory.training.run.show_progress", lambda console: InterruptAt(step, times))


def same_weights(a: Path, b: Path) -> None:
    one, other = load_file(a / WEIGHTS), load_file(b / WEIGHTS)
    assert one.keys() == other.keys() and one
    for name, tensor in one.items():
        assert tensor.abs().max() > 1e-3  # trained at all
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=1e-6)


def wait_for(process: subprocess.Popen[str], folder: Path) -> None:
    """Until the run has written a checkpoint."""
    end = time.monotonic() + 120
    while not list(folder.glob("checkpoint-*/trainer_state.json")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "no checkpoint after two minutes"
        time.sleep(0.01)


def test_ctrl_c_keeps_a_checkpoint_and_the_printed_command_goes_on_to_the_same_memory(place, cli):
    long = ("--epochs", "12")  # 72 steps, so that there is time to interrupt them
    output = place / "memory"
    process = subprocess.Popen(
        [sys.executable, "-m", "prefixmemory", *command(place, "memory", *long)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        wait_for(process, place / "memory.partial" / "checkpoints")
        process.send_signal(signal.SIGINT)
        _, message = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in message
    assert "Stopping after this step; ctrl-C again stops at once." in message
    assert f"Stopped. The checkpoint is kept in {output}.partial." in message
    assert not output.exists()
    reached = max(int(p.name.partition("-")[2]) for p in (place / "memory.partial" / "checkpoints").iterdir())
    assert 2 <= reached < 72

    words = printed_command(message)
    assert words == [*command(place, "memory", *long), "--resume"]
    assert cli(*words) == (0, "")
    assert not (place / "memory.partial").exists()
    assert cli(*command(place, "uninterrupted", *long)) == (0, "")
    same_weights(output, place / "uninterrupted")
    # The record tells of the whole run, not only of its second part.
    records = [json.loads((place / name / "run.json").read_text()) for name in ("memory", "uninterrupted")]
    for name in ("settings", "config", "rows", "trainable_parameters"):
        assert records[0][name] == records[1][name]
    # The negative control: other seeds make memories that differ by more than the tolerance.
    assert cli(*command(place, "other", *long[:1], "1", "--seed", "1")) == (0, "")
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        same_weights(place / "other", place / "uninterrupted")


def same_loss(first: Path, second: Path) -> None:
    """The mean of all steps, whatever was logged before a checkpoint; the Trainer rounds what it logs."""
    losses = [json.loads((folder / "run.json").read_text())["train_loss"] for folder in (first, second)]
    assert losses[0] == pytest.approx(losses[1], abs=2e-4)


@pytest.mark.parametrize("times", [1, 3])  # a scheduler may repeat itself, and is in no hurry
def test_a_scheduler_that_ends_the_process_leaves_a_checkpoint_to_go_on_from(monkeypatch, cli, place, times):
    with monkeypatch.context() as patch:
        patch.setattr("prefixmemory.training.run.show_progress", lambda _: InterruptAt(3, times, signal.SIGTERM))
        code, message = cli(*command(place, "memory", "--epochs", "1"))
    assert code == 143
    assert "checkpoint-3" in [path.name for path in (place / "memory.partial" / "checkpoints").iterdir()]
    assert cli(*printed_command(message)) == (0, "")
    assert cli(*command(place, "uninterrupted", "--epochs", "1")) == (0, "")
    same_weights(place / "memory", place / "uninterrupted")


def test_training_runs_in_a_thread_that_is_not_the_main_one(tmp_path):
    """Where Python lets no signal handler be set."""
    before = signal.getsignal(signal.SIGINT)
    with ThreadPoolExecutor() as pool:
        steps, _ = pool.submit(train_tiny, tmp_path / "thread").result()
        assert steps == 6 and signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("step", [1, 3])
def test_a_run_stopped_before_or_between_checkpoints_goes_on(monkeypatch, cli, place, step):
    with monkeypatch.context() as patch:
        interrupt_at(patch, step)
        code, message = cli(*command(place, "memory", "--epochs", "1"))
    assert code == 130
    checkpoints = place / "memory.partial" / "checkpoints"
    assert f"checkpoint-{step}" in [path.name for path in checkpoints.iterdir()]  # the step was finished
    assert cli(*printed_command(message)) == (0, "")
    assert cli(*command(place, "uninterrupted", "--epochs", "1")) == (0, "")
    same_weights(place / "memory", place / "uninterrupted")
    same_loss(place / "memory", place / "uninterrupted")


def test_a_run_can_be_interrupted_twice(monkeypatch, cli, place):
    words = command(place, "memory", "--epochs", "1")
    for step in (2, 4):
        with monkeypatch.context() as patch:
            interrupt_at(patch, step)
            code, message = cli(*words)
        assert code == 130
        words = printed_command(message)
        assert words.count("--resume") == 1
    assert cli(*words) == (0, "")
    assert cli(*command(place, "uninterrupted", "--epochs", "1")) == (0, "")
    same_weights(place / "memory", place / "uninterrupted")
    same_loss(place / "memory", place / "uninterrupted")


def test_an_interrupted_overwrite_keeps_the_old_run_and_goes_on(monkeypatch, cli, place):
    assert cli(*command(place, "memory", "--epochs", "1", "--seed", "1")) == (0, "")
    old = (place / "memory" / WEIGHTS).read_bytes()
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        code, message = cli(*command(place, "memory", "--epochs", "1", "--overwrite"))
    assert code == 130
    assert (place / "memory" / WEIGHTS).read_bytes() == old
    assert cli(*printed_command(message)) == (0, "")
    assert cli(*command(place, "uninterrupted", "--epochs", "1")) == (0, "")
    same_weights(place / "memory", place / "uninterrupted")


def test_ctrl_c_in_the_last_step_finishes_the_run(monkeypatch, cli, place):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 6)
        code, message = cli(*command(place, "memory", "--epochs", "1"))
    assert code == 0 and "Stopped" not in message
    assert (place / "memory" / WEIGHTS).is_file() and not (place / "memory.partial").exists()


def test_a_second_ctrl_c_on_the_command_line_stops_at_once(monkeypatch, cli, place):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3, times=2)
        code, message = cli(*command(place, "memory", "--epochs", "1"))
    assert code == 130 and "Traceback" not in message
    assert not (place / "memory").exists()
    # What the regular checkpoint of step 2 held is not lost.
    assert cli(*command(place, "memory", "--epochs", "1", "--resume")) == (0, "")
    assert cli(*command(place, "uninterrupted", "--epochs", "1")) == (0, "")
    same_weights(place / "memory", place / "uninterrupted")


@pytest.mark.parametrize("before", [5000.0, None])
def test_the_record_counts_the_seconds_of_all_parts(monkeypatch, cli, place, before):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        assert cli(*command(place, "memory", "--epochs", "1"))[0] == 130
    (file,) = place.glob("memory.partial/checkpoints/checkpoint-3/trainer_state.json")
    state = json.loads(file.read_text())
    assert 0 < state["stateful_callbacks"]["Stopwatch"]["attributes"]["before"] < 1000
    if before is None:
        del state["stateful_callbacks"]["Stopwatch"]  # of an earlier version
    else:
        state["stateful_callbacks"]["Stopwatch"]["attributes"]["before"] = before
    file.write_text(json.dumps(state))
    assert cli(*command(place, "memory", "--epochs", "1", "--resume")) == (0, "")
    seconds = json.loads((place / "memory" / "run.json").read_text())["train_seconds"]
    assert (before or 0) <= seconds < (before or 0) + 1000


def test_a_second_ctrl_c_says_that_the_run_was_stopped(monkeypatch, cli, place):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3, times=2)
        _, message = cli(*command(place, "memory", "--epochs", "1"))
    assert message.rstrip().splitlines()[-1].startswith("Stopped.")


def test_ctrl_c_before_training_leaves_nothing(monkeypatch, cli, place):
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    before = sorted(place.rglob("*"))
    monkeypatch.setattr("prefixmemory.training.run.load_model", interrupted)
    code, message = cli(*command(place, "memory"))
    assert code == 130 and "Traceback" not in message
    assert sorted(place.rglob("*")) == before


def train_tiny(folder: Path, *callbacks: TrainerCallback) -> tuple[int, torch.nn.Module]:
    """Number of steps begun, and the model, which is trained as far as training got."""
    steps = []

    class Count(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            steps.append(state.global_step)

    model = get_peft_model(tiny.build(), PrefixMemoryConfig(task_type="CAUSAL_LM"))
    settings = TrainingSettings(batch_size=4, epochs=1.0, save_steps=100)
    try:
        train(model, tiny.tokenizer(), EXAMPLES, settings, folder, callbacks=[*callbacks, Count()])
    finally:
        model.steps_begun = len(steps)
        train_tiny.last = model
    return len(steps), model


def test_a_reader_that_is_gone_stops_no_step(monkeypatch):
    """``prefixmemory train ... 2>&1 | tee log``: the same ctrl-C ends tee, and the line has nowhere to go."""

    class Gone:
        def write(self, text: str) -> int:
            raise BrokenPipeError

        def flush(self) -> None:
            raise BrokenPipeError

    monkeypatch.setattr("sys.stderr", Gone())
    stop = StopOnSignal()
    stop._on_signal(signal.SIGINT, None)
    assert stop.asked == signal.SIGINT


def test_one_ctrl_c_ends_after_the_step_and_two_end_within_it(tmp_path):
    assert train_tiny(tmp_path / "none")[0] == 6
    with pytest.raises(Interrupted):
        train_tiny(tmp_path / "one", InterruptAt(3))
    assert train_tiny.last.steps_begun == 3
    after_one = {name: p.detach().clone() for name, p in tiny.memory_parameters(train_tiny.last).items()}
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["checkpoint-3"]

    with pytest.raises(KeyboardInterrupt):
        train_tiny(tmp_path / "two", InterruptAt(3, times=2))
    assert train_tiny.last.steps_begun == 3
    # The optimizer step, which comes after the signals, was not made; no checkpoint was written.
    after_two = tiny.memory_parameters(train_tiny.last)
    assert all(not torch.equal(after_one[name], after_two[name]) for name in after_one)
    assert not list(tmp_path.glob("two/*"))
