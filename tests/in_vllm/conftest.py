"""vLLM on a CPU, in this process: one thread, no network. Run by ``make test-vllm``; elsewhere skipped."""

import os
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is installed in an environment of its own: make test-vllm")

for name, value in {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}.items():
    os.environ.setdefault(name, value)


@pytest.fixture(autouse=True)
def _leaves_no_process_group() -> None:
    """An engine in this process keeps its own, from test to test."""


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base model and adapters."""
    from served_models import save_all

    return save_all(tmp_path_factory.mktemp("models"))
