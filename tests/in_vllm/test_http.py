"""``prefixmemory serve``, asked over HTTP while adapters come and go. The server has processes of its own, so that the
plugin must reach them through its entry point."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from served_models import BASE, INVOCATION, expected, prompt, save_memory

from prefixmemory.serving.server import launch

COUNT = 6
NAMES = [f"memory-{number}" for number in range(8)]


class Server:
    """A running server and its folder of adapters."""

    def __init__(self, port: int, folder: Path, models: Path) -> None:
        self.address, self.folder, self.models = f"http://127.0.0.1:{port}", folder, models

    def post(self, path: str, **body: Any) -> tuple[int, str]:
        """Status and text."""
        request = urllib.request.Request(
            self.address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def models_now(self) -> set[str]:
        with urllib.request.urlopen(f"{self.address}/v1/models", timeout=60) as answer:
            return {model["id"] for model in json.load(answer)["data"]}

    def ask(self, adapter: str, text: list[int], **more: Any) -> tuple[int, Any]:
        """The tokens of a streamed answer, or what is wrong."""
        status, body = self.post(
            "/v1/completions", model=adapter, prompt=text, max_tokens=COUNT, temperature=0, ignore_eos=True,
            stream=True, return_token_ids=True, logprobs=0, **more,
        )  # fmt: skip
        if status != 200:
            return status, body
        events = [json.loads(line[6:]) for line in body.splitlines() if line.startswith("data: {")]
        if any("error" in event for event in events):
            return 500, body
        return status, [token for event in events for choice in event["choices"] for token in choice["token_ids"]]

    def load(self, name: str, place: Path | str) -> tuple[int, str]:
        return self.post("/v1/load_lora_adapter", lora_name=name, lora_path=str(place))

    def unload(self, name: str) -> tuple[int, str]:
        return self.post("/v1/unload_lora_adapter", lora_name=name)


@pytest.fixture(scope="module")
def server(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("adapters")
    for number, name in enumerate(NAMES):
        fields = {"active_from": "invocation", "invocation_tokens": list(INVOCATION)} if number % 2 else {}
        save_memory(made, name, seed=200 + number, **fields)
        shutil.copytree(made / name, folder / name)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    started = launch(
        str(made / BASE), {"rotary": str(made / "rotary")}, folder=folder, slots=9,
        more=["--port", str(port), "--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--block-size",
              "32", "--served-model-name", BASE, "--max-cpu-loras", "20"],
    )  # fmt: skip
    environment = {**os.environ, **started.environment, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    log = (tmp_path_factory.mktemp("log") / "server.log").open("w+")
    process = subprocess.Popen(
        [sys.executable, *started.arguments], env=environment, stdout=log, stderr=log, start_new_session=True
    )
    server = Server(port, folder, made)
    try:
        for _ in range(1200):
            assert process.poll() is None, Path(log.name).read_text()[-3000:]
            try:
                if server.models_now():
                    break
            except OSError:
                time.sleep(0.25)
        yield server
        assert process.poll() is None, "the server ended: " + Path(log.name).read_text()[-3000:]
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)
        log.close()


def tokens_of(server: Server, adapter: str, text: list[int]) -> list[int]:
    return expected(server.models, adapter, text, COUNT).tokens


def test_what_was_named_at_the_start_is_there(server):
    assert {BASE, "rotary"} <= server.models_now()
    text = prompt(30, seed=50)
    assert server.ask("rotary", text) == (200, tokens_of(server, "rotary", text))


def test_an_adapter_in_the_folder_is_found_by_its_name(server):
    text = prompt(30, seed=51, invoked=9)
    assert server.ask("memory-7", text) == (200, tokens_of(server, "memory-7", text))


def test_a_hundred_requests_while_adapters_come_and_go(server):
    for name in NAMES:
        if name not in server.models_now():
            assert server.load(name, server.folder / name)[0] == 200
    texts = [prompt(24 + 3 * number, seed=60 + number, invoked=9) for number in range(6)]
    chosen = random.Random(0)
    asked = [(chosen.choice([BASE, *NAMES]), chosen.choice(texts)) for _ in range(100)]
    wanted = [tokens_of(server, name, text) for name, text in asked]
    coming = ["shared", "default"]

    def come_and_go() -> set[int]:
        seen = set()
        for _ in range(4):
            for name in coming:
                shutil.copytree(server.models / name, server.folder / name, dirs_exist_ok=True)
                seen |= {server.load(name, server.folder / name)[0], server.unload(name)[0]}
        return seen

    with ThreadPoolExecutor(33) as pool:
        going = pool.submit(come_and_go)
        found = list(pool.map(lambda question: server.ask(*question), asked))
    assert going.result() == {200}
    assert found == [(200, tokens) for tokens in wanted]
    assert len({tuple(tokens) for tokens in wanted}) > 30  # the check would fail if one had answered for another


def test_a_scale_for_one_request(server):
    text = prompt(30, seed=52)
    assert server.ask("rotary", text, vllm_xargs={"memory_scale": 0}) == (200, tokens_of(server, BASE, text))
    louder = expected(server.models, "rotary", text, COUNT, scale=1.5).tokens
    assert louder != tokens_of(server, "rotary", text)
    assert server.ask("rotary", text, vllm_xargs={"memory_scale": 1.5}) == (200, louder)
    loud = {"model": "rotary", "prompt": text, "vllm_xargs": {"memory_scale": "loud"}}
    status, body = server.post("/v1/completions", **loud)
    assert status == 400 and "memory_scale='loud' is out of range" in body
    _, body = server.post("/v1/completions", **loud, stream=True)  # the status was sent before
    assert "memory_scale='loud' is out of range" in body


def broken(server: Server, name: str, **config: object) -> Path:
    """A copy of a memory whose config says something else."""
    folder = server.folder / name
    shutil.copytree(server.models / "default", folder, dirs_exist_ok=True)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return folder


def cut_off(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def of_another_shape(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({name: tensor[..., :-1].contiguous() for name, tensor in load_file(file).items()}, file)


@pytest.mark.parametrize(
    ("name", "config", "spoil", "problem"),
    [
        ("cut-off", {}, cut_off, "truncated or damaged"),
        ("another-shape", {"weights_sha256": None}, of_another_shape, "does not fit"),
        ("another-model", {"base_model_fingerprint": [0.5, -0.5] * 32}, None, "trained on another base model"),
        ("too-large", {"feature_map": "cosine"}, None, "feature_map='cosine'"),
        ("inside", {"placement": "inside"}, None, "placement"),
    ],
)
def test_a_broken_adapter_is_refused_with_its_reason_and_the_server_goes_on(name, config, spoil, problem, server):
    folder = broken(server, name, **config)
    if spoil is not None:
        spoil(folder)
    status, body = server.load(name, folder)
    assert status in (400, 404, 500) and problem in body, body
    assert "Traceback" not in body
    text = prompt(30, seed=53)
    assert server.ask("rotary", text) == (200, tokens_of(server, "rotary", text))


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [(lambda folder: (folder / "adapter_config.json").write_text("{"), "cannot be read"), (shutil.rmtree, "is gone")],
    ids=["cut off", "gone"],
)
def test_an_adapter_that_breaks_after_it_was_served_is_refused_and_the_server_goes_on(server, spoil, problem):
    """A run that replaces its folder leaves none for a moment."""
    folder = server.folder / "breaking"
    shutil.copytree(server.models / "default", folder, dirs_exist_ok=True)
    text = prompt(30, seed=57)
    assert server.ask("breaking", text) == (200, tokens_of(server, "default", text))
    spoil(folder)
    status, body = server.post("/v1/completions", model="breaking", prompt=text)
    assert status == 400 and f"The adapter 'breaking' {problem}" in body, body
    assert server.ask("rotary", text) == (200, tokens_of(server, "rotary", text))
    shutil.copytree(server.models / "default", folder, dirs_exist_ok=True)
    assert server.ask("breaking", text) == (200, tokens_of(server, "default", text))


def test_a_lora_without_room_for_it_is_refused(server):
    """vLLM would take it, and wrap it around nothing: the base model would answer under its name."""
    folder = server.folder / "a-lora"
    shutil.copytree(server.models / "default", folder, dirs_exist_ok=True)
    config = {"peft_type": "LORA", "r": 8, "target_modules": ["q_proj"], "lora_alpha": 8}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    status, body = server.load("a-lora", folder)
    assert status >= 400 and "Start it with --lora" in body
    assert server.post("/v1/completions", model="a-lora", prompt=prompt(10, seed=58))[0] >= 400


def test_an_option_that_there_is_not_is_refused(server):
    text = prompt(30, seed=59)
    for adapter, extra, problem in (
        ("rotary", {"memory_scal": 0.5}, "memory_scal is no option of a memory"),
        (BASE, {"memory_scale": 0.5}, "is for memories, and the base model is asked"),
    ):
        status, body = server.post("/v1/completions", model=adapter, prompt=text, vllm_xargs=extra)
        assert status == 400 and problem in body, body


def test_a_path_outside_of_the_folder_is_refused(server):
    for place in (server.models / "shared", server.folder / ".." / "shared"):
        status, body = server.load("elsewhere", place)
        assert status >= 400 and "outside of the folders" in body


def test_a_name_that_leads_elsewhere_is_no_adapter(server):
    for name in ("../memory-1", "nobody", "memory-1/../memory-2"):
        status, body = server.ask(name, prompt(10, seed=54))
        assert status == 404 and "does not exist" in body


def test_new_weights_are_served_to_the_next_request(server):
    text = prompt(60, seed=55)
    name = "renewed"
    for seed in (1, 2):
        save_memory(server.models, name, seed=seed)
        shutil.copytree(server.models / name, server.folder / name, dirs_exist_ok=True)
        assert server.ask(name, text) == (200, tokens_of(server, name, text))
