"""transformers' Trainer and TRL's trainers train a memory as they train any adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor

import tiny
from close import close_logits, same_parameters
from prefixmemory import PrefixMemoryConfig
from processes import run_python
from tiny_trainers import IDS, SAMPLING, STEPS, TRL, load, make_trainer

pytest.importorskip("trl")

# TRL 1.16 switches gradient checkpointing on and off under the names that transformers 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings(r"ignore:`gradient_checkpointing(_\w+)?` is deprecated:FutureWarning")

WEIGHTS = "adapter_model.safetensors"
HEAD = "base_model.model.score.modules_to_save.default.weight"


@dataclass
class Run:
    """Five steps with a trainer: ``before`` are the parameters at their start."""

    checkpoint: Path
    losses: list[float]
    before: dict[str, Tensor]
    model: PeftModel
    logits: Tensor

    def trained(self) -> dict[str, Tensor]:
        """What the checkpoint should hold but for the means: the memory of each layer, and a reward model's head."""
        parameters = dict(self.model.named_parameters())
        return tiny.memory_parameters(self.model) | ({HEAD: parameters[HEAD]} if HEAD in parameters else {})


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


ALL = ("trainer", *TRL)
KINDS = pytest.mark.parametrize("kind", ALL)


@pytest.mark.parametrize("kind", [kind for kind in ALL if kind not in SAMPLING])
def test_the_loss_falls(run, kind):
    """Where the model samples its own data, the loss says little; test_rl.py looks at the reward."""
    losses = run(kind).losses
    assert len(losses) == STEPS
    assert all(after < before for before, after in pairwise(losses))  # one batch again and again
    if kind == "dpo":
        assert abs(losses[0] - 0.6931) < 1e-3  # log 2: the untrained memory equals the reference, the base model
    if kind == "kto":
        assert abs(losses[0] - 0.5) < 1e-3  # likewise


@KINDS
def test_every_memory_moves_and_the_base_model_does_not(run, kind):
    made = run(kind)
    trained = made.trained()
    assert len(trained) == (5 if kind == "reward" else 4)  # two factors a layer
    assert made.before.keys() == dict(made.model.named_parameters()).keys()
    for name, parameter in made.model.named_parameters():
        if name in trained:
            every_head = (parameter != made.before[name]).flatten(1).any(dim=1)
            assert parameter.requires_grad and every_head.all(), name
        elif not name.endswith("default.mean"):  # taken from the first batch
            assert not parameter.requires_grad and torch.equal(parameter, made.before[name]), name


@KINDS
def test_the_base_model_is_the_one_on_disk_bit_for_bit(run, base, kind):
    state = {
        name.removeprefix("base_model.model.").replace("original_module.", ""): tensor
        for name, tensor in run(kind).model.state_dict().items()
    }
    for name, tensor in load(base, kind).state_dict().items():
        assert torch.equal(state[name], tensor), name


@KINDS
def test_the_checkpoint_holds_the_adapter_alone(run, kind):
    made = run(kind)
    files = {path.name for path in made.checkpoint.rglob("*") if path.is_file()}
    assert {WEIGHTS, "adapter_config.json"} <= files
    weights = {name for name in files if name.endswith((".safetensors", ".bin"))} - {"training_args.bin"}
    assert weights == {WEIGHTS}
    saved = load_file(made.checkpoint / WEIGHTS)
    means = {name: buffer for name, buffer in made.model.named_parameters() if name.endswith("default.mean")}
    assert len(means) == 2 and all(mean.any() for mean in means.values())
    trained = made.trained() | means
    assert len(saved) == len(trained)
    for name, tensor in saved.items():
        name = name.replace("prefix_memory_bank.", "prefix_memory_bank.default.")
        assert torch.equal(tensor, trained[name.replace("score.", "score.modules_to_save.default.")])


LOAD = """
import sys
import torch
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
import prefixmemory

def load(checkpoint):
    if "reward" in checkpoint:
        return AutoPeftModelForSequenceClassification.from_pretrained(checkpoint, num_labels=1)
    return AutoPeftModelForCausalLM.from_pretrained(checkpoint)

out, ids, *checkpoints = sys.argv[1:]
ids = torch.load(ids)
with torch.no_grad():
    torch.save([load(checkpoint).eval()(input_ids=ids).logits for checkpoint in checkpoints], out)
"""


def test_the_checkpoints_load_in_a_new_process(run, base, tmp_path):
    made = {kind: run(kind) for kind in ALL}
    torch.save(IDS, tmp_path / "ids.pt")
    files = [tmp_path / "logits.pt", tmp_path / "ids.pt", *(one.checkpoint for one in made.values())]
    run_python("-c", LOAD, *files)
    loaded = torch.load(tmp_path / "logits.pt")
    with torch.no_grad():
        for (kind, one), logits in zip(made.items(), loaded, strict=True):
            untrained = load(base, kind).eval()(input_ids=IDS).logits
            torch.testing.assert_close(logits, one.logits, rtol=0, atol=1e-6)
            # the memory is there; a reward of one sampled batch moves it less than a loss
            assert (logits - untrained).abs().max() > (1e-3 if kind in SAMPLING else 1e-2), kind


def test_the_head_of_a_reward_model_is_part_of_the_adapter(run, base):
    """PEFT adds the head to modules_to_save; without the trained head, the reward would be another."""
    made = run("reward")
    assert "score" in made.model.peft_config["default"].modules_to_save
    plain = load(base, "reward")
    with torch.no_grad():
        plain.score.weight.add_(1.0)  # as a new process would have another random one
    loaded = PeftModel.from_pretrained(plain, made.checkpoint).eval()
    with torch.no_grad():
        close_logits(loaded(input_ids=IDS).logits, made.logits)
        with loaded.disable_adapter():
            assert torch.equal(loaded(input_ids=IDS).logits, plain(input_ids=IDS).logits)
    same_parameters(get_peft_model_state_dict(loaded), get_peft_model_state_dict(made.model))


@pytest.mark.parametrize("kind", ["trainer", "sft", "dpo", "kto", "reward", "grpo"])
def test_resuming_from_a_checkpoint_ends_where_an_uninterrupted_run_ends(run, base, tmp_path, kind):
    """More about resuming in test_resume.py."""
    whole = run(kind).trained()
    first = make_trainer(kind, base, tmp_path)
    first.args.save_steps = first.state.save_steps = 2
    first.args.max_steps = 2
    first.train()
    second = make_trainer(kind, base, tmp_path)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert second.state.global_step == STEPS
    halfway, end = dict(first.model.named_parameters()), dict(second.model.named_parameters())
    for name, parameter in whole.items():
        torch.testing.assert_close(end[name], parameter, rtol=0, atol=1e-6)
        assert (end[name] - halfway[name]).abs().max() > 1e-3  # it did go on


@pytest.mark.parametrize("kind", ["trainer", "sft", "dpo"])
def test_low_rank_memories_and_trainable_maps_train_too(base, tmp_path, kind):
    config = PrefixMemoryConfig(task_type="CAUSAL_LM", rank=2, feature_map="mlp", share_heads=True, dropout=0.1)
    trainer = make_trainer(kind, base, tmp_path, peft_config=config)
    memory = tiny.memory_parameters(trainer.model)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    assert len(memory) == 8  # A, B, weight and bias of the map, in two layers
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        if name in tiny.means(trainer.model):
            continue  # taken from the first batch
        assert torch.equal(parameter, before[name]) != (name in memory), name
