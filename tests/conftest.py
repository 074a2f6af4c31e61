"""Shape annotations run in the tests: jaxtyping + beartype check every call into the package.

``PREFIXMEMORY_SHAPES=0`` switches them off; the torch.compile tests do so in a process of their own, because the
checks are Python that a compiled graph cannot hold.
"""

import os
from collections.abc import Iterator

# Tests must not reach for a network; transformers and PEFT then answer from files at once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# What the command line did not foresee is not put into one line here.
os.environ.setdefault("PREFIXMEMORY_TRACEBACK", "1")
# One thread a process: pytest-xdist has one process a core. accelerate warns where this is left open.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# Triton asks once: without a GPU its kernels are interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Before the hook below: what is imported while it compiles a module of ours would be compiled by it too.
import peft  # noqa: F401

if os.environ.get("PREFIXMEMORY_SHAPES", "1") == "1":
    from jaxtyping import install_import_hook

    install_import_hook("prefixmemory", "beartype.beartype")

import jaxtyping
import pytest

torch.set_num_threads(int(os.environ.get("PREFIXMEMORY_TEST_THREADS", "1")))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _leaves_no_process_group() -> Iterator[None]:
    """The tests that follow in this process would believe that they are one of several processes."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        raise AssertionError("the test left its process group behind")


@pytest.fixture(autouse=True)
def _compiled_anew(request: pytest.FixtureRequest) -> None:
    """On a CPU, torch 2.13 cannot compile flex attention for a second kind of mask in one process (docs/LOG.md), and
    not at all without vector instructions: the C++ that it writes does not compile."""
    if "flex" in request.node.name:
        on_cpu = request.node.get_closest_marker("gpu") is None
        if on_cpu and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
            pytest.skip("torch compiles flex attention for CPUs that have AVX2 only")
        torch.compiler.reset()


@pytest.fixture
def feature_map_names() -> Iterator[None]:
    """Forget the feature maps that a test registers."""
    from prefixmemory.memories.feature_maps import FEATURE_MAPS

    before = set(FEATURE_MAPS)
    yield
    for name in set(FEATURE_MAPS) - before:
        del FEATURE_MAPS[name]


@pytest.fixture
def untyped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Switch the tests' own type checks off: users do not have them, and they would speak before the validation."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
