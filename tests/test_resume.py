"""A training run that is killed and resumed goes on as if nothing had happened."""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers.trainer_utils import get_last_checkpoint

import training_process
from close import close_training
from training_process import SAVE_STEPS, STEPS, VARIANTS, Job

#: Files of a checkpoint in the order in which they are written.
FILES = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
)
KILLED = -signal.SIGKILL


def losses(log: Path) -> dict[int, float]:
    """Loss by step, as the process wrote them."""
    lines = log.read_text().splitlines() if log.exists() else []
    return {step: loss for step, loss, _ in map(json.loads, lines)}


def weights(log: Path) -> dict[str, torch.Tensor]:
    return torch.load(log.with_suffix(".pt"))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The log of a whole run of a variant, made once; its checkpoints lie beside it."""
    place = tmp_path_factory.mktemp("uninterrupted")

    def log(variant: str) -> Path:
        job = Job(place / variant, place / f"{variant}.jsonl", variant)
        if not job.log.exists():
            assert training_process.run(job) == 0
            assert list(losses(job.log)) == list(range(1, STEPS + 1))
        return job.log

    return log


def check_same_run(resumed: Path, whole: Path, checkpoint: int) -> None:
    """Every loss after ``checkpoint``, and the final memory."""
    found, expected = losses(resumed), losses(whole)
    assert list(found) == list(range(checkpoint + 1, STEPS + 1))
    for step, loss in found.items():
        assert abs(loss - expected[step]) <= 1e-6, step
    ends, expected_ends = weights(resumed), weights(whole)
    assert ends.keys() == expected_ends.keys() and len(ends) == 8  # A, B, and weight and bias of the map, two layers
    for name, tensor in ends.items():
        torch.testing.assert_close(tensor, expected_ends[name], rtol=0, atol=1e-6)


EVENTS = ("on_step_begin", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end", "on_save")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_at_a_random_moment_and_resumed(uninterrupted, tmp_path, variant, seed):
    draw = random.Random(f"{variant} {seed}")
    event = draw.choice(EVENTS)
    # events count finished steps; a checkpoint must exist, and something must be left to do
    step = draw.choice([6, 9]) if event == "on_save" else draw.randrange(SAVE_STEPS, STEPS - 1)
    first = Job(tmp_path / "checkpoints", tmp_path / "first.jsonl", variant, die=(event, step))
    assert training_process.run(first) == KILLED
    assert not first.log.with_suffix(".pt").exists()

    saved = int(Path(get_last_checkpoint(str(first.folder))).name.removeprefix("checkpoint-"))
    assert saved in (step // SAVE_STEPS * SAVE_STEPS, max(step - 1, 0) // SAVE_STEPS * SAVE_STEPS)
    second = Job(first.folder, tmp_path / "second.jsonl", variant, resume=True)
    assert training_process.run(second) == 0
    check_same_run(second.log, uninterrupted(variant), saved)
    for number, loss in losses(first.log).items():
        assert abs(loss - losses(uninterrupted(variant))[number]) <= 1e-6


def test_killed_twice(uninterrupted, tmp_path):
    folder = tmp_path / "checkpoints"
    assert training_process.run(Job(folder, tmp_path / "1.jsonl", die=("on_step_end", 5))) == KILLED
    assert training_process.run(Job(folder, tmp_path / "2.jsonl", resume=True, die=("on_step_begin", 10))) == KILLED
    last = Job(folder, tmp_path / "3.jsonl", resume=True)
    assert training_process.run(last) == 0
    check_same_run(last.log, uninterrupted("plain"), 9)


def test_patience_goes_on_where_it_was(tmp_path):
    """Evaluations at steps 3 (the best), 6 and 9 (worse): stopped at 9, with the memory of step 3."""
    last_steps = {}
    for variant, name in (("early stopping", "kept"), ("early stopping, as by default", "lost")):
        whole = Job(tmp_path / name, tmp_path / f"{name}.jsonl", variant)
        assert training_process.run(whole) == 0
        assert list(losses(whole.log)) == list(range(1, 10))
        folder = tmp_path / f"{name} and killed"
        assert training_process.run(Job(folder, tmp_path / "1.jsonl", variant, die=("on_step_end", 8))) == KILLED
        second = Job(folder, tmp_path / f"{name} 2.jsonl", variant, resume=True)
        assert training_process.run(second) == 0
        last_steps[name] = max(losses(second.log))
        close_training(weights(second.log), weights(whole.log))
    assert last_steps == {"kept": 9, "lost": 12}  # by default transformers counts anew after resuming


@pytest.mark.parametrize("name", FILES)
def test_a_half_written_checkpoint_is_not_resumed_from(uninterrupted, tmp_path, name):
    first = Job(tmp_path / "checkpoints", tmp_path / "first.jsonl", die_writing=(name, 6))
    assert training_process.run(first) == KILLED
    half = first.folder / "checkpoint-6"
    written = [file for file in FILES if (half / file).exists()]
    assert written == list(FILES[: FILES.index(name) + 1])  # so trainer_state.json is there last
    whole = uninterrupted("plain").with_suffix("") / "checkpoint-6"
    assert (half / name).stat().st_size < (whole / name).stat().st_size * 0.6

    # transformers picks the half-written one, and fails on it; it does not train on
    assert get_last_checkpoint(str(first.folder)) == str(half)
    blind = Job(first.folder, tmp_path / "blind.jsonl", resume=True)
    assert training_process.run(blind) == 0
    assert blind.log.with_suffix(".error").exists() and not losses(blind.log)

    second = Job(first.folder, tmp_path / "second.jsonl", resume=first.folder / "checkpoint-3")
    assert training_process.run(second) == 0
    check_same_run(second.log, uninterrupted("plain"), 3)


@pytest.mark.parametrize("name", ["rng_state.pth", "optimizer.pt"])
def test_the_comparison_would_notice_what_a_checkpoint_lacks(uninterrupted, tmp_path, name):
    """The random state and the optimizer matter here, so that the tests above say something about them."""
    log = uninterrupted("plain")
    shutil.copytree(log.with_suffix("") / "checkpoint-6", tmp_path / "checkpoint-6")
    (tmp_path / "checkpoint-6" / name).unlink()
    job = Job(tmp_path / "checkpoints", tmp_path / "log.jsonl", resume=tmp_path / "checkpoint-6")
    assert training_process.run(job) == 0  # transformers does not mind
    difference = max(abs(loss - losses(log)[step]) for step, loss in losses(job.log).items())
    assert difference > 1e-4


def test_the_variants_are_what_they_say(uninterrupted):
    curves = {variant: losses(uninterrupted(variant)) for variant in VARIANTS}
    plain = curves.pop("plain")
    assert curves.pop("gradient checkpointing") == pytest.approx(plain, abs=1e-6)  # dropout masks are redrawn the same
    for variant, curve in curves.items():
        assert max(abs(curve[step] - plain[step]) for step in plain) > 3e-5, variant
