"""Which checkpoint a run is resumed from when the newest one was not written to its end."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import pytest

import training_process
from prefixmemory.training.checkpoints import last_complete_checkpoint
from training_process import Job

FILES = (
    "adapter_model.safetensors", "adapter_config.json", "optimizer.pt", "scheduler.pt", "rng_state.pth",
    "trainer_state.json",
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("finished")
    assert training_process.run(Job(place / "checkpoints", place / "log.jsonl")) == 0
    return place / "checkpoints"


@pytest.fixture
def folder(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "checkpoints"))


def test_the_newest_is_taken_when_it_is_complete(folder):
    (folder / "checkpoint-late").mkdir()
    (folder / "checkpoint-99").touch()  # a file
    assert last_complete_checkpoint(folder).name == "checkpoint-12"  # by number: as text, 9 comes after 12


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "cut off", "empty"])
def test_a_damaged_one_is_passed_over_by_name(folder, caplog, name, damage):
    file = folder / "checkpoint-12" / name
    if damage == "missing":
        file.unlink()
    else:
        os.truncate(file, file.stat().st_size // 2 if damage == "cut off" else 0)
    with caplog.at_level(logging.WARNING):
        assert last_complete_checkpoint(folder).name == "checkpoint-9"
    assert "checkpoint-12" in caplog.text and name in caplog.text


def test_the_scale_of_fp16_is_whole_where_there_is_one(folder, caplog):
    (folder / "checkpoint-12" / "scaler.pt").write_bytes(b"PK")
    assert last_complete_checkpoint(folder).name == "checkpoint-9" and "scaler.pt is cut off" in caplog.text


def test_each_process_needs_its_random_state(folder, caplog, monkeypatch):
    """The first writes the state of the run without waiting for the others."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for number in (9, 12):
        checkpoint = folder / f"checkpoint-{number}"
        shutil.copy(checkpoint / "rng_state.pth", checkpoint / "rng_state_0.pth")
    (folder / "checkpoint-9" / "rng_state.pth").rename(folder / "checkpoint-9" / "rng_state_1.pth")
    assert last_complete_checkpoint(folder).name == "checkpoint-9" and "rng_state_1.pth is missing" in caplog.text


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".json")])
def test_one_whose_json_is_no_object_is_passed_over(folder, caplog, name):
    (folder / "checkpoint-12" / name).write_text("[1, 2]")
    with caplog.at_level(logging.WARNING):
        assert last_complete_checkpoint(folder).name == "checkpoint-9"
    assert name in caplog.text


def test_changed_weights_are_noticed(folder):
    file = folder / "checkpoint-12" / "adapter_model.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    assert last_complete_checkpoint(folder).name == "checkpoint-9"


def test_a_copy_under_another_number_is_passed_over(folder):
    shutil.copytree(folder / "checkpoint-9", folder / "checkpoint-15")
    assert last_complete_checkpoint(folder).name == "checkpoint-12"


def test_none_is_complete(folder, tmp_path):
    for checkpoint in folder.iterdir():
        (checkpoint / "trainer_state.json").unlink()
    assert last_complete_checkpoint(folder) is None
    assert last_complete_checkpoint(tmp_path / "nowhere") is None


@pytest.mark.parametrize("name", FILES)
def test_after_a_kill_while_writing(tmp_path, name):
    job = Job(tmp_path / "checkpoints", tmp_path / "log.jsonl", die_writing=(name, 6))
    assert training_process.run(job) == -9
    assert last_complete_checkpoint(job.folder).name == "checkpoint-3"
