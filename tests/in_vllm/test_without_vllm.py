"""``prefixmemory serve --without-vllm``: transformers' own server answers as greedy search does, with the memory."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from served_models import BASE, expected, save_memory

from tiny import tokenizer

COUNT = 8
TEXT = "ab cd ef hello"
PAGED = ("--continuous-batching", "--cb-num-blocks", "32", "--cb-block-size", "16", "--cb-max-batch-tokens", "64")
KINDS = {"inside": {"placement": "inside", "prefix_length": 4}, "asked": {"active_from": "invocation"}}


@contextmanager
def server(made: Path, name: str, log: Path, *more: str) -> Iterator[str]:
    """The address of a server of the adapter ``name``; it has a minute to start."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    words = ["serve", "--without-vllm", "--adapter", f"{name}={made / name}", "--port", str(port), "--device", "cpu",
             "--dtype", "float32", *more]  # fmt: skip
    with log.open("w") as out:
        process = subprocess.Popen([sys.executable, "-m", "prefixmemory", *words], env={**os.environ}, stdout=out,
                                   stderr=out)  # fmt: skip
        try:
            for _ in range(240):
                assert process.poll() is None, log.read_text()[-3000:]
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                    break
                except OSError:
                    time.sleep(0.25)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def save(made: Path, kind: str) -> Path:
    fields = dict(KINDS[kind])
    if "active_from" in fields:
        fields["invocation_tokens"] = tokenizer()(" ef", add_special_tokens=False)["input_ids"]
    return save_memory(made, kind, seed=5, **fields)


@pytest.mark.parametrize(("kind", "more"), [("inside", PAGED), ("asked", ())], ids=["paged", "one by one"])
def test_transformers_server_answers_with_the_memory(kind, more, made, tmp_path):
    save(made, kind)
    texts = tokenizer()
    prompt = texts(TEXT)["input_ids"]
    wanted, plain = (texts.decode(expected(made, name, prompt, COUNT).tokens) for name in (kind, BASE))
    wanted, plain = (text.partition(texts.eos_token)[0] for text in (wanted, plain))
    assert wanted != plain
    with server(made, kind, tmp_path / "log", *more) as address:
        body = {"model": kind, "prompt": TEXT, "max_tokens": COUNT, "temperature": 0}
        request = urllib.request.Request(
            f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            (choice,) = json.load(answer)["choices"]
    assert choice["text"] == wanted


def test_a_memory_that_waits_and_continuous_batching_are_refused_at_the_start(made):
    words = ["serve", "--without-vllm", "--adapter", f"asked={save(made, 'asked')}", "--continuous-batching"]
    done = subprocess.run([sys.executable, "-m", "prefixmemory", *words], capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and "packs parts of many texts" in done.stderr and done.stderr.count("\n") == 1
