"""Several processes: the losses of every step and the saved adapter are those of one process.

Two CPU processes over gloo for each engine, started as a user starts them; what they run is in distributed_worker.py.
"""

from __future__ import annotations

import copy
import json
import os
import socket
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from peft import PeftConfig
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

import tiny
from distributed_worker import SAVED_AT, STEPS, TENSOR_PARALLEL_CONFIGS, TENSOR_PARALLEL_FAMILIES
from prefixmemory import PrefixMemoryError
from processes import run_python

TESTS = Path(__file__).parent
CONFIGS = TESTS.parent / "examples" / "accelerate"
CLOSE = {"rtol": 0.0, "atol": 1e-5}


def launcher(engine: str, port: int) -> list[str]:
    """What stands between python and the script."""
    if engine == "single":
        return []
    if engine == "tensor_parallel":
        return ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    return [
        *("-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{engine}.yaml")),
        *("--num_processes", "2", "--mixed_precision", "no", "--main_process_port", str(port)),
    ]


def launch(engine: str, folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    device = {"DS_ACCELERATOR": "cpu"} if engine == "zero3" else {"ACCELERATE_USE_CPU": "true"}
    worker = (TESTS / "distributed_worker.py", engine, folder)
    try:
        run_python(*launcher(engine, port), *worker, timeout=400, **device)
    except AssertionError as failure:  # written down, so that the next test does not try it again
        (folder / engine).mkdir(exist_ok=True)
        (folder / engine / "results.json").write_text(json.dumps({"failed": str(failure)}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all launches; shared by the processes of pytest-xdist."""
    root = tmp_path_factory.getbasetemp()
    shared = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "distributed"
    with FileLock(f"{shared}.lock"):
        if not shared.exists():
            tiny.save_tiny(shared / "base")
            for family in TENSOR_PARALLEL_FAMILIES:
                tiny.build(family).save_pretrained(shared / family)
            for name, heads, kv_heads in (("uneven", 4, 1), ("three_heads", 3, 3)):
                config = copy.deepcopy(tiny.CONFIGS["llama"].to_dict())
                config |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 8}
                config["hidden_size"] = 8 * heads
                torch.manual_seed(0)
                AutoModelForCausalLM.from_config(LlamaConfig(**config)).save_pretrained(shared / name)
    return shared


@pytest.fixture(scope="module")
def results(folder: Path) -> Callable[[str], dict[str, Any]]:
    """What an engine's processes found; each is launched once."""

    def of(engine: str) -> dict[str, Any]:
        file = folder / engine / "results.json"
        with FileLock(folder / f"{engine}.lock"):
            if not file.exists():
                launch(engine, folder)
        found = json.loads(file.read_text())
        assert "failed" not in found, found["failed"]
        return found

    return of


@pytest.fixture(scope="module")
def adapter(folder: Path, results) -> Callable[..., dict[str, Tensor]]:
    def of(engine: str, run: str, which: str = "adapter") -> dict[str, Tensor]:
        results(engine)
        return load_file(folder / engine / run / which / "adapter_model.safetensors")

    return of


#: The run in one process that a run must equal, where their names differ.
SAME_AS = {
    "sharded_loop": "loop",  # both with FSDP's own activation checkpointing
    "sharded_trainer": "trainer",
    "checkpointing": "trainer",
    "heads_checkpointing": "heads",
    "fsdp_at_loading": "trainer",
}
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
RUNS = pytest.mark.parametrize(
    ("engine", "run"),
    [
        ("ddp", "loop"),
        ("ddp", "trainer"),
        ("fsdp2", "loop"),
        ("fsdp2", "sharded_loop"),
        ("fsdp2", "sharded_trainer"),
        ("fsdp2", "uneven"),
        ("fsdp2", "trainer"),
        ("fsdp2", "checkpointing"),
        ("tensor_parallel", "heads"),
        ("tensor_parallel", "heads_checkpointing"),
        ("tensor_parallel", "fsdp_at_loading"),
        pytest.param("zero3", "trainer", marks=needs_deepspeed),
        ("ddp", "default"),
        ("fsdp2", "default"),
        ("tensor_parallel", "default"),
        pytest.param("zero3", "default", marks=needs_deepspeed),
    ],
)


@RUNS
def test_two_processes_train_as_one(results, adapter, engine, run):
    alone = SAME_AS.get(run, run)
    reference, found = results("single")[alone], results(engine)[run]
    assert len(found["losses"]) == STEPS
    torch.testing.assert_close(torch.tensor(found["losses"]), torch.tensor(reference["losses"]), **CLOSE)
    weights, expected = adapter(engine, run), adapter("single", alone)
    assert weights.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(weights[name], expected[name], **CLOSE)
    if run == "default":
        means = [name for name in expected if name.endswith(".mean")]
        assert len(means) == 2 and found["means_apart"] < 1e-6
        for name in means:
            assert expected[name].any()
            torch.testing.assert_close(weights[name], expected[name], rtol=0.0, atol=1e-6)


@pytest.mark.parametrize(
    ("engine", "run"),
    [
        ("single", "loop"),
        ("single", "trainer"),
        ("ddp", "loop"),
        ("ddp", "trainer"),
        ("fsdp2", "loop"),
        ("fsdp2", "sharded_loop"),
        ("fsdp2", "sharded_trainer"),
        ("fsdp2", "trainer"),
        pytest.param("zero3", "trainer", marks=needs_deepspeed),
        pytest.param("zero3", "default", marks=needs_deepspeed),
    ],
)
def test_a_resumed_run_equals_one_that_was_not_stopped(results, adapter, engine, run):
    alone = SAME_AS.get(run, run)
    resumed = results(engine)[run]["resumed"]
    assert len(resumed) == STEPS - SAVED_AT
    torch.testing.assert_close(
        torch.tensor(resumed), torch.tensor(results("single")[alone]["losses"][SAVED_AT:]), **CLOSE
    )
    for name, tensor in adapter(engine, run, "resumed").items():
        torch.testing.assert_close(tensor, adapter("single", alone)[name], **CLOSE)


def test_processes_that_share_no_gradients_train_otherwise(results, adapter):
    """The control: with one batch more or less the comparison above would fail."""
    apart, together = adapter("ddp", "apart"), adapter("single", "loop")
    assert all((apart[name] - together[name]).abs().max() > 1e-3 for name in together)
    losses = torch.tensor([results(engine)[run]["losses"] for engine, run in (("ddp", "apart"), ("single", "loop"))])
    assert (losses[0] - losses[1]).abs().max() > 1e-5


@pytest.mark.parametrize("engine", ["fsdp2", pytest.param("zero3", marks=needs_deepspeed)])
def test_memories_are_spread_over_the_processes(results, engine):
    trained = results(engine)["trainer"]
    assert trained["all"] == results("single")["trainer"]["all"]
    assert trained["here"] == trained["all"] // 2
    if engine == "fsdp2":  # one memory a layer for two processes: the first holds it, the second an empty part
        assert results(engine)["uneven"]["here"] == results(engine)["uneven"]["all"]


def test_fsdp2_in_bfloat16(results, adapter):
    found, alone = results("fsdp2")["bf16"]["losses"], results("single")["bf16"]["losses"]
    assert torch.allclose(torch.tensor(found), torch.tensor(alone), rtol=0.01)  # FSDP2 gives the loss in bfloat16 too
    weights, start = adapter("fsdp2", "bf16"), adapter("single", "bf16")
    for name, tensor in weights.items():
        assert tensor.dtype == torch.float32  # masters
        if name.endswith(".B"):  # started at zero; Adam's first steps have the size of the learning rate
            every_head = tensor.flatten(1).abs().amax(dim=1)
            assert (every_head > 1e-3).all(), name
            direction = torch.cosine_similarity(tensor.flatten(), start[name].flatten(), dim=0)
            assert direction > 0.9, name


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "tensor_parallel", pytest.param("zero3", marks=needs_deepspeed)])
def test_the_adapter_knows_its_base_model(folder, results, engine):
    results("single"), results(engine)
    configs = [PeftConfig.from_pretrained(str(folder / e / "default" / "adapter")) for e in ("single", engine)]
    assert configs[0].base_model_fingerprint is not None
    assert configs[0].base_model_fingerprint == configs[1].base_model_fingerprint


def test_tensor_parallel_processes_read_their_heads(results):
    """Logits and gradients against the whole model, in families whose plans split heads and in one that does not."""
    compared = results("tensor_parallel")["compared"]
    assert len(compared) == len(TENSOR_PARALLEL_FAMILIES) * len(TENSOR_PARALLEL_CONFIGS)
    for case in compared:
        assert case["logits"] < 1e-5 < 0.02 < case["effect"], case  # limited answers move these models least
        assert case["gradients"] < 1e-5 < 1e-4 < case["smallest_gradient"], case
        assert case["generated"] and case["zero_is_base"] and case["fingerprint"] and case["same_start"], case
        assert case["means_apart"] < 1e-6, case
    assert sum(case["has_means"] for case in compared) == 2 * len(TENSOR_PARALLEL_FAMILIES)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("three_heads", ["3 heads", "2 tensor-parallel processes"]),
        ("feature_map", ["feature_map.weight", "one set for each of 4 memories"]),
        ("part", ["whole model"]),
        ("feed_forward", ["mlp.gate_proj", "tensor-parallel processes", "Leave feed_forward out"]),
    ],
)
def test_what_tensor_parallel_processes_cannot_share_is_refused(results, what, words):
    message = results("tensor_parallel")["refused"][what]
    assert all(word in message for word in words), message


@pytest.mark.parametrize("found", ["nothing", "empty parts"])
def test_an_adapter_that_would_be_saved_without_its_memories_is_refused(tmp_path, found):
    model = tiny.with_memory(tiny.build())
    weights = {name: p.new_empty(0) for name, p in tiny.memory_parameters(model).items()}  # as ZeRO-3 leaves them
    with pytest.raises(PrefixMemoryError, match="get_state_dict"):
        model.save_pretrained(tmp_path, state_dict=weights if found == "empty parts" else {})


def test_data_parallel_threads_are_refused():
    model = tiny.with_memory(tiny.build())
    attention = model.get_base_model().model.layers[0].self_attn
    with pytest.raises(PrefixMemoryError, match="torchrun"):
        attention._replicate_for_data_parallel()(torch.zeros(1, 2, 32), position_embeddings=None)


def test_the_script_of_the_guide_trains_in_two_processes(folder, results):
    trained = results("ddp")["guide"]
    assert len(trained) == 4 and all(name.endswith((".A", ".B")) for name in trained)  # one of each a layer
    saved = load_file(folder / "ddp" / "guide" / "tickets-memory" / "adapter_model.safetensors")
    assert len(saved) == 6 and all(bool(tensor.any()) for tensor in saved.values())
