"""The folder of a run: one process at a time has it, and nothing is deleted that no run wrote."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import processes
from command_line import call, files_of, jsonl
from prefixmemory import PrefixMemoryConfig, PrefixMemoryError
from prefixmemory.files.locks import Lock
from prefixmemory.files.records import write_json
from prefixmemory.training.card import write_model_card
from prefixmemory.training.output import Output, remove_run

PLAN: dict[str, Any] = {"base_model": "x", "method": "prefix_memory", "config": {}, "settings": {}, "rows_sha256": "0"}
MODES = {"plain": (False, False), "overwrite": (True, False), "resume": (False, True)}


def write_run(folder: Path, name: str) -> None:
    """What a run leaves in its folder, the checkpoint of its last step included."""
    (folder / "checkpoints" / "checkpoint-3").mkdir(parents=True, exist_ok=True)
    (folder / "runs").mkdir(exist_ok=True)
    (folder / "checkpoints" / "checkpoint-3" / "optimizer.pt").write_bytes(b"state")
    (folder / "runs" / "events.out.tfevents.1.host.2.0").write_bytes(b"losses")
    PrefixMemoryConfig().save_pretrained(str(folder))
    save_file({"a": torch.ones(1)}, folder / "adapter_model.safetensors")
    record = {**PLAN, "train_loss": 1.0, "who": name}
    write_json(folder / "run.json", record)
    write_model_card(folder, record)


@pytest.fixture
def output(tmp_path: Path) -> Output:
    """A place with a finished run."""
    output = Output(tmp_path / "out")
    write_run(output.folder, "first")
    return output


def replace(output: Output) -> None:
    """A second run takes the place of the first."""
    with output.held(overwrite=True, resume=False):
        output.begin(PLAN, resume=False, overwrite=True)
        write_run(output.partial, "second")
        output.finish()


def test_the_runs_of_these_tests_replace_each_other_and_leave_nothing_beside(output):
    # The control: without it, every refusal below could have another reason.
    replace(output)
    replace(output)
    assert b"second" in files_of(output.folder)["run.json"]
    assert [path.name for path in output.folder.parent.iterdir()] == ["out"]
    assert not (output.folder / "checkpoints").exists()


# One process at a time


def hold(folder: Path, ready: Path) -> None:
    with Output(folder).held(overwrite=True, resume=False):
        Output(folder).begin(PLAN, resume=False, overwrite=True)
        ready.write_text("x")
        time.sleep(100)


@pytest.fixture
def holder(output: Output, tmp_path: Path) -> BaseProcess:
    """Another process with a run in the folder of ``output``."""
    process = processes.start(hold, output.folder, tmp_path / "ready")
    deadline = time.monotonic() + 60
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (tmp_path / "ready").unlink()
    yield process
    process.kill()
    process.join()


@pytest.mark.parametrize("mode", MODES)
def test_a_run_that_is_going_on_is_left_alone_and_its_process_named(output, holder, mode, tmp_path):
    before = files_of(tmp_path)
    rows = jsonl(tmp_path.parent / f"{tmp_path.name}.jsonl", [{"prompt": "a", "completion": "b"}])
    words = () if mode == "plain" else (f"--{mode}",)
    message = call("train", "--model", "nowhere", "--data", rows, "--output", output.folder, *words).refusal
    assert f"process {holder.pid} on {socket.gethostname()} has it" in message
    assert str(output.folder) in message and "give another folder" in message
    assert files_of(tmp_path) == before


def test_the_lock_of_a_process_that_was_killed_is_free(output, holder):
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    with pytest.raises(PrefixMemoryError, match=r"already holds a finished run"):
        Output(output.folder).check(overwrite=False, resume=False)
    replace(output)
    assert b"second" in files_of(output.folder)["run.json"]


def test_two_runs_of_one_process_exclude_each_other_too(output):
    other = Output(output.folder)
    with output.held(overwrite=True, resume=False):
        with pytest.raises(PrefixMemoryError, match=f"process {os.getpid()} on"), other.held(True, False):
            pass
        with output.held(overwrite=True, resume=False):  # a run within its own
            pass
        assert Path(output.folder.parent, ".out.lock").exists()
    assert not Path(output.folder.parent, ".out.lock").exists()


def test_a_refused_run_leaves_no_folders_behind(tmp_path):
    output = Output(tmp_path / "a" / "b" / "out")
    with pytest.raises(PrefixMemoryError, match="no interrupted run"), output.held(False, True):
        pass
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    def refuse(self: Path, *args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    lock = Lock(tmp_path / "x" / ".lock")
    with pytest.raises(PrefixMemoryError, match=r"cannot be written: Permission denied."), lock.held("x"):
        pass


# What no run wrote


def photo(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(b"me")


def interrupted(output: Output) -> Path:
    write_run(output.partial, "stopped")
    return output.partial


def replaced(output: Output) -> Path:
    shutil.copytree(output.folder, output.replaced)
    return output.replaced


PLACES = {"finished": lambda output: output.folder, "partial": interrupted, "replaced": replaced}
FOREIGN = ["me.jpg", "runs/me.jpg", "checkpoints/me.jpg", "checkpoints/mine/me.jpg", "data/rows.jsonl", "run.json.bak"]


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("mode", ["overwrite", "resume"])
def test_a_folder_with_a_file_of_the_users_is_refused_by_its_name(output, place, name, mode, tmp_path):
    folder = PLACES[place](output)
    photo(folder, name)
    before = files_of(tmp_path)
    with pytest.raises(PrefixMemoryError) as refused, output.held(*MODES[mode]):
        pass
    assert (
        str(folder) in str(refused.value) and repr(name) in str(refused.value) and "Move it away" in str(refused.value)
    )
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("place", PLACES)
def test_a_card_that_was_edited_is_not_deleted(output, place):
    folder = PLACES[place](output)
    with (folder / "README.md").open("a") as card:
        card.write("My own words.\n")
    with pytest.raises(PrefixMemoryError, match=r"'README.md', which was edited"), output.held(True, False):
        pass
    assert (folder / "README.md").read_text().endswith("My own words.\n")


@pytest.mark.parametrize("content", ["{}", '{"name": "jest", "method": "x"}', "[1]", "no json"])
@pytest.mark.parametrize("place", PLACES)
def test_a_folder_beside_a_run_json_of_another_program_is_refused(output, place, content):
    folder = PLACES[place](output)
    (folder / "run.json").write_text(content)
    problem = f"{folder} holds files that are no run of prefixmemory"
    with pytest.raises(PrefixMemoryError, match=problem), output.held(True, False):
        pass


def test_what_a_user_adds_while_a_run_goes_on_stays(output):
    with output.held(overwrite=True, resume=False):
        output.begin(PLAN, resume=False, overwrite=True)
        write_run(output.partial, "second")
        photo(output.folder, "me.jpg")
        photo(output.partial, "checkpoints/me.jpg")
        output.finish()
    assert files_of(output.replaced) == {"me.jpg": b"me"}
    found = files_of(output.folder)
    assert b"second" in found["run.json"] and found["checkpoints/me.jpg"] == b"me"
    assert [name for name in found if name.startswith("checkpoints/")] == ["checkpoints/me.jpg"]


def test_removing_follows_no_links(output, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    photo(tmp_path / "elsewhere", "adapter_config.json")
    (output.folder / "checkpoints" / "checkpoint-9").symlink_to(tmp_path / "elsewhere")
    remove_run(output.folder)
    assert files_of(tmp_path / "elsewhere") == {"adapter_config.json": b"me"}


def test_a_folder_with_empty_folders_only_is_empty(tmp_path):
    (tmp_path / "out" / "new").mkdir(parents=True)
    (tmp_path / "out.partial" / "checkpoints").mkdir(parents=True)  # the Trainer makes it before anything is written
    with Output(tmp_path / "out").held(overwrite=False, resume=False):
        pass
