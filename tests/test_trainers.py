"""transformers' Trainer and TRL's trainers train a memory as they train any adapter."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import tiny
from prefixmemory import PrefixMemoryConfig

trl = pytest.importorskip("trl")

# TRL 1.16 switches gradient checkpointing on and off under the names that transformers 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings(r"ignore:`gradient_checkpointing(_\w+)?` is deprecated:FutureWarning")

WEIGHTS = "adapter_model.safetensors"
STEPS = 5
IDS = tiny.tokens(rows=4, length=12)
#: One batch of four rows, met in every step.
ROWS = {
    "trainer": Dataset.from_list([{"input_ids": row, "labels": row} for row in IDS.tolist()]),
    "sft": Dataset.from_list([{"prompt": f"line {i} is dead", "completion": " no connection"} for i in range(4)]),
    "dpo": Dataset.from_list(
        [{"prompt": f"line {i} is dead", "chosen": " no connection", "rejected": " a refund"} for i in range(4)]
    ),
}
COMMON = dict(
    per_device_train_batch_size=4, max_steps=STEPS, learning_rate=0.05, lr_scheduler_type="constant", logging_steps=1,
    save_steps=STEPS, report_to="none", use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
)  # fmt: skip


@dataclass
class Run:
    checkpoint: Path
    losses: list[float]
    base: dict[str, Tensor]
    model: PeftModel
    logits: Tensor


def config() -> PrefixMemoryConfig:
    return PrefixMemoryConfig(task_type="CAUSAL_LM")


def make_trainer(kind: str, base: Path, output: Path) -> Trainer:
    model = AutoModelForCausalLM.from_pretrained(base)
    common = {**COMMON, "output_dir": str(output)}
    if kind == "trainer":
        return Trainer(
            model=get_peft_model(model, config()), args=TrainingArguments(**common), train_dataset=ROWS[kind]
        )
    # bf16 is the default of TRL's configs where the machine has it
    args, trainer = {"sft": (trl.SFTConfig, trl.SFTTrainer), "dpo": (trl.DPOConfig, trl.DPOTrainer)}[kind]
    return trainer(
        model=model, args=args(**common, bf16=False), train_dataset=ROWS[kind], peft_config=config(),
        processing_class=AutoTokenizer.from_pretrained(base),
    )  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_tiny(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """Five steps with one of the trainers, made once."""
    runs: dict[str, Run] = {}

    def made(kind: str) -> Run:
        if kind not in runs:
            output = tmp_path_factory.mktemp(kind)
            trainer = make_trainer(kind, base, output)
            before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
            trainer.train()
            model = trainer.model.eval()
            with torch.no_grad():
                logits = model(input_ids=IDS).logits
            losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
            runs[kind] = Run(output / f"checkpoint-{STEPS}", losses, before, model, logits)
        return runs[kind]

    return made


KINDS = pytest.mark.parametrize("kind", ["trainer", "sft", "dpo"])


@KINDS
def test_the_loss_falls(run, kind):
    losses = run(kind).losses
    assert len(losses) == STEPS
    assert all(after < before for before, after in pairwise(losses))  # one batch again and again
    if kind == "dpo":
        assert abs(losses[0] - 0.6931) < 1e-3  # log 2: the untrained memory equals the reference, the base model


@KINDS
def test_every_memory_moves_and_the_base_model_does_not(run, kind):
    made = run(kind)
    memory = tiny.memory_parameters(made.model)
    assert len(memory) == 2  # one a layer
    for name, parameter in made.model.named_parameters():
        if name in memory:
            every_head = (parameter != made.base[name]).flatten(1).any(dim=1)
            assert parameter.requires_grad and every_head.all(), name
        else:
            assert not parameter.requires_grad and torch.equal(parameter, made.base[name]), name


@KINDS
def test_the_checkpoint_holds_the_adapter_alone(run, kind):
    made = run(kind)
    files = {path.name for path in made.checkpoint.rglob("*") if path.is_file()}
    assert {WEIGHTS, "adapter_config.json"} <= files
    weights = {name for name in files if name.endswith((".safetensors", ".bin"))} - {"training_args.bin"}
    assert weights == {WEIGHTS}
    saved = load_file(made.checkpoint / WEIGHTS)
    trained = tiny.memory_parameters(made.model)
    assert len(saved) == len(trained)
    for name, tensor in saved.items():
        assert torch.equal(tensor, trained[name.replace("prefix_memory_bank.", "prefix_memory_bank.default.")])


LOAD = """
import sys
import torch
from peft import AutoPeftModelForCausalLM
import prefixmemory
out, ids, *checkpoints = sys.argv[1:]
ids = torch.load(ids)
with torch.no_grad():
    torch.save([AutoPeftModelForCausalLM.from_pretrained(c).eval()(input_ids=ids).logits for c in checkpoints], out)
"""


def test_the_checkpoints_load_in_a_new_process(run, base, tmp_path):
    made = [run(kind) for kind in ("trainer", "sft", "dpo")]
    torch.save(IDS, tmp_path / "ids.pt")
    files = [tmp_path / "logits.pt", tmp_path / "ids.pt", *(one.checkpoint for one in made)]
    subprocess.run(
        [sys.executable, "-c", LOAD, *map(str, files)], check=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    with torch.no_grad():
        untrained = AutoModelForCausalLM.from_pretrained(base).eval()(input_ids=IDS).logits
    for one, logits in zip(made, torch.load(tmp_path / "logits.pt"), strict=True):
        torch.testing.assert_close(logits, one.logits, rtol=0, atol=1e-6)
        assert (logits - untrained).abs().max() > 1e-2  # the memory is there


@pytest.mark.parametrize("kind", ["trainer", "sft"])
def test_resuming_from_a_checkpoint_ends_where_an_uninterrupted_run_ends(run, base, tmp_path, kind):
    whole = tiny.memory_parameters(run(kind).model)
    first = make_trainer(kind, base, tmp_path)
    first.args.save_steps = first.state.save_steps = 2
    first.args.max_steps = 2
    first.train()
    second = make_trainer(kind, base, tmp_path)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert second.state.global_step == STEPS
    halfway = tiny.memory_parameters(first.model)
    for name, parameter in tiny.memory_parameters(second.model).items():
        torch.testing.assert_close(parameter, whole[name], rtol=0, atol=1e-6)
        assert (parameter - halfway[name]).abs().max() > 1e-3  # it did go on
