"""A disk that is full: one line, earlier files as they were, nothing half-written left behind."""

from __future__ import annotations

import errno
import json
import resource
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

import processes
import tiny
from command_line import Answer, call, files_of, jsonl
from prefixmemory.files.full_disk import is_disk_full
from prefixmemory.files.records import write_text

ROWS = [{"text": f"line {i} is dead", "label": "ab"[i % 2]} for i in range(8)]
#: Bytes that a file may have: from the first that is written (run.json) to the largest of a checkpoint (optimizer.pt).
SIZES = (1, 300, 1_000, 2_000, 3_000, 6_000, 9_000, 11_000, 12_500, 14_000)


def words(folder: Path, *more: str) -> list[str]:
    return [
        "train", "--model", str(folder / "base"), "--data", str(folder / "rows.jsonl"), "--output", str(folder / "out"),
        "--batch-size", "4", "--epochs", "2", "--save-steps", "2", "--dtype", "float32", *more,
    ]  # fmt: skip


def train_with_small_files(folder: Path, most: int, told: Path) -> None:
    """A run in a process whose files have ``most`` bytes at most; what was said goes to ``told``.

    To a program that is a full disk; one of a small size takes a right to mount that tests do not have.
    """
    torch.set_num_threads(1)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    answer = call(*words(folder, "--overwrite"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    told.write_text(json.dumps([answer.code, answer.out, answer.err]))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, data, and an earlier run."""
    folder = tmp_path_factory.mktemp("disk")
    tiny.save_tiny(folder / "base")
    jsonl(folder / "rows.jsonl", ROWS)
    call(*words(folder)).success  # noqa: B018
    return folder


@pytest.mark.parametrize("most", SIZES)
def test_a_run_on_a_full_disk_ends_in_one_line_and_the_earlier_one_is_whole(place, most, tmp_path):
    before = files_of(place)
    assert len(before["out/adapter_model.safetensors"]) > 3_000
    process = processes.start(train_with_small_files, place, most, tmp_path / "told")
    process.join(timeout=300)
    assert process.exitcode == 0
    answer = Answer(*json.loads((tmp_path / "told").read_text()))
    assert f"The disk of {place / 'out'} is full" in answer.refusal and "free some space" in answer.refusal
    assert files_of(place) == before
    assert {path.name for path in place.iterdir()} == {"base", "rows.jsonl", "out"}


def test_the_last_complete_checkpoint_is_kept(place, tmp_path, monkeypatch):
    real, after = torch.save, []

    def full_in_the_second_checkpoint(content: object, file: object, *rest: object, **options: object) -> None:
        real(content, file, *rest, **options)
        after.append(file)
        if "checkpoint-4" in str(file):
            raise RuntimeError("[enforce fail at inline_container.cc:862] . PytorchStreamWriter failed writing file")

    monkeypatch.setattr(torch, "save", full_in_the_second_checkpoint)
    new = [*words(place), "--output", str(tmp_path / "new")]
    message = call(*new).refusal
    assert after and f"is kept in {tmp_path / 'new.partial'}" in message and "--resume" in message
    assert [path.name for path in (tmp_path / "new.partial" / "checkpoints").iterdir()] == ["checkpoint-2"]
    monkeypatch.setattr(torch, "save", real)
    call(*new, "--resume").success  # noqa: B018
    assert (tmp_path / "new" / "adapter_model.safetensors").is_file()


def test_a_file_that_cannot_be_written_is_as_it_was_and_leaves_no_other(tmp_path, monkeypatch):
    file = tmp_path / "figures.json"
    write_text(file, "old")

    def full(self: Path, text: str, **options: object) -> None:
        with self.open("w") as stream:
            stream.write(text[:2])
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(file, "new text")
    assert files_of(tmp_path) == {"figures.json": b"old"}


def error_of_torch() -> BaseException:
    with pytest.raises(RuntimeError) as raised:
        torch.save(torch.zeros(1000), "/dev/full")
    return raised.value


def test_a_full_disk_is_known_by_what_libraries_raise():
    assert is_disk_full(OSError(errno.ENOSPC, "x")) and is_disk_full(OSError(errno.EDQUOT, "x"))
    assert is_disk_full(SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"))
    assert is_disk_full(error_of_torch())
    wrapped = ValueError("x")
    wrapped.__cause__ = OSError(errno.ENOSPC, "x")
    assert is_disk_full(wrapped)
    assert not any(map(is_disk_full, [OSError(errno.EACCES, "x"), RuntimeError("out of memory"), ValueError("28")]))
