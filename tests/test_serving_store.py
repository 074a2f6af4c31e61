"""Copies of memories: what a request was given stays as it was, whatever becomes of the folder that it came from."""

from __future__ import annotations

import errno
import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from prefixmemory import PrefixMemoryError
from prefixmemory.serving import server
from prefixmemory.serving.store import Store
from tiny import build, randomize, with_memory


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    with_memory(build(), rank=2).save_pretrained(folder)
    return folder


@pytest.fixture
def store() -> Store:
    return Store(lambda folder: None)


def change(folder: Path, **fields: object) -> None:
    """Another config under the same name."""
    file = folder / CONFIG_NAME
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_the_same_contents_are_one_memory_wherever_they_lie(store, saved, tmp_path):
    shutil.copytree(saved, tmp_path / "again")
    assert store.hold(saved) == store.hold(tmp_path / "again")
    assert len(store.by_number) == 1


@pytest.mark.parametrize("name", [CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME])
def test_new_contents_under_an_old_path_are_new_and_the_old_ones_stay(name, store, saved):
    before = store.hold(saved)
    old = (before.folder / name).read_bytes()
    if name == CONFIG_NAME:
        change(saved, scale=0.5)
    else:
        model = with_memory(build(), rank=2)
        randomize(model, seed=7)
        model.save_pretrained(saved)
    after = store.hold(saved)
    assert after.content != before.content and after.number != before.number
    assert (after.folder / name).read_bytes() == (saved / name).read_bytes() != old
    assert (before.folder / name).read_bytes() == old


def test_copies_lie_where_they_are_told_to_and_go_with_the_store(saved, tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir()
    store = Store(lambda folder: None, within=shared)
    assert store.hold(saved).folder.is_relative_to(shared)
    del store
    assert not list(shared.iterdir())


def test_what_is_refused_leaves_no_copy_and_names_the_folder_that_was_asked_for(saved, tmp_path):
    def refuse(folder: Path) -> None:
        raise PrefixMemoryError(f"{folder} is damaged.")

    store = Store(refuse, within=tmp_path)
    with pytest.raises(PrefixMemoryError, match=f"^{saved} is damaged"):
        store.hold(saved)
    (copies,) = tmp_path.glob("prefixmemory-serving-*")
    assert not list(copies.iterdir()) and not store.by_number


def test_a_memory_that_never_learned_where_to_speak_is_refused(store, saved):
    change(saved, active_from="answer")
    with pytest.raises(PrefixMemoryError, match="was never trained"):
        store.hold(saved)


def test_a_folder_elsewhere_is_refused(saved, tmp_path):
    store = Store(lambda folder: None, allowed=[tmp_path / "other"])
    with pytest.raises(PrefixMemoryError, match="lies outside of the folders"):
        store.hold(saved)


def test_a_disk_that_was_full_for_a_moment_is_asked_again(store, saved, monkeypatch):
    copy = shutil.copyfile

    def full(source: Path, target: Path) -> None:
        target.write_bytes(source.read_bytes()[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(PrefixMemoryError, match=r"cannot be copied to .* \(No space left on device\)\. Make room"):
        store.hold(saved)
    monkeypatch.setattr(shutil, "copyfile", copy)
    held = store.hold(saved)
    assert (held.folder / SAFETENSORS_WEIGHTS_NAME).read_bytes() == (saved / SAFETENSORS_WEIGHTS_NAME).read_bytes()
    assert [path for path in held.folder.parent.iterdir()] == [held.folder]


# A GGUF file, unpacked once


class Saved:
    """A tokenizer or a model that saves a file; ``act`` happens meanwhile."""

    def __init__(self, act: Callable[[Path], None] = lambda folder: None) -> None:
        self.act = act

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.act(folder)
        (folder / "config.json").write_text("{}")


@pytest.fixture
def gguf(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(server, "load_tokenizer", lambda name: Saved())
    file = tmp_path / "m.gguf"
    file.write_bytes(b"x")
    return file


def unpacked(cache: Path) -> list[str]:
    """What lies there, locks aside."""
    return sorted(path.suffix for path in (cache / "prefixmemory").iterdir() if path.suffix != ".lock")


def test_what_was_broken_off_while_unpacking_is_gone(gguf, tmp_path, monkeypatch):
    def interrupt(folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(server, "load_model", lambda name, dtype: Saved(interrupt))
    with pytest.raises(KeyboardInterrupt):
        server.served_model(str(gguf))
    assert unpacked(tmp_path / "cache") == []
    monkeypatch.setattr(server, "load_model", lambda name, dtype: Saved())
    folder = Path(server.served_model(str(gguf)))
    assert (folder / "config.json").is_file() and unpacked(tmp_path / "cache") == [folder.suffix]


def test_two_servers_unpack_a_file_once(gguf, tmp_path, monkeypatch):
    found, begun = [], []

    def wait(folder: Path) -> None:
        begun.append(folder)
        time.sleep(0.3)

    monkeypatch.setattr(server, "load_model", lambda name, dtype: Saved(wait))
    threads = [threading.Thread(target=lambda: found.append(server.served_model(str(gguf)))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(begun) == 1 and len(set(found)) == 1 and len(found) == 2
