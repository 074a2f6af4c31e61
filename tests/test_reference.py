"""What DPO, KTO and GRPO compare a memory with: the base model, or the memory that training started from."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

import tiny
from prefixmemory import PrefixMemoryConfig
from prefixmemory.tuner.registration import accept_adapter_names
from tiny_trainers import STEPS, load, make_trainer

pytest.importorskip("trl")

pytestmark = [
    # TRL 1.16 switches gradient checkpointing on and off under the names that transformers 5.23 deprecates.
    pytest.mark.filterwarnings(r"ignore:`gradient_checkpointing(_\w+)?` is deprecated:FutureWarning"),
    # Silenced for users when prefixmemory is imported; pytest brings it back. The last test is about it.
    pytest.mark.filterwarnings("ignore:Adapter name 'ref' should not be contained in the prefix:UserWarning"),
]

KINDS = pytest.mark.parametrize("kind", ["dpo", "kto", "grpo"])
BETA = 0.1


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_tiny(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained adapter, whose feature map has parameters too, and its features a mean."""
    folder = tmp_path_factory.mktemp("adapter")
    tiny.with_memory(load(base), feature_map="mlp", normalize="feature_mean").save_pretrained(folder)
    return folder


def continued(base: Path, adapter: Path) -> PeftModel:
    return PeftModel.from_pretrained(load(base), adapter, is_trainable=True)


def trainer_for(kind: str, base: Path, output: Path, **changed: Any) -> Any:
    return make_trainer(kind, base, output, **({"beta": BETA} | changed))


def log_probabilities(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Log-probability of each token of the completions, 0 elsewhere; ``[rows, tokens - 1]``."""
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    each = logits[:, :-1].log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    return each * batch["completion_mask"][:, 1:]


def reference_log_probabilities(kind: str, trainer: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """What the trainer takes for the reference's log-probabilities of completions, and the batch."""
    trainer.model.eval()
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    if kind == "grpo":
        tokens = ("input_ids", "attention_mask", "completion_mask")
        mask, prompt = batch["completion_mask"], torch.zeros_like(batch["prompt_mask"])
        whole = (
            torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
            torch.cat([batch["prompt_mask"], mask], dim=1),
            torch.cat([prompt, mask], dim=1),
        )
        return (batch["ref_per_token_logps"] * mask).sum(1), dict(zip(tokens, whole, strict=True))
    found = trainer.compute_ref_log_probs(trainer.model, batch)
    return (torch.cat(found) if kind == "dpo" else found[0]), batch


@KINDS
def test_a_new_memory_is_compared_with_the_base_model(base, tmp_path, kind):
    trainer = trainer_for(kind, base, tmp_path)
    tiny.randomize(trainer.model)  # as if it had trained for a while
    found, batch = reference_log_probabilities(kind, trainer)
    torch.testing.assert_close(found, log_probabilities(load(base), batch).sum(1), rtol=0, atol=1e-5)
    policy = log_probabilities(trainer.model, batch).sum(1)
    assert (found - policy).abs().min() > 1e-3
    assert trainer.model.active_adapters == ["default"]


@KINDS
def test_a_continued_memory_is_compared_with_itself_as_it_was(base, adapter, tmp_path, kind):
    trainer = trainer_for(kind, base, tmp_path, model=continued(base, adapter))
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    means = {name: b.clone() for name, b in trainer.model.named_parameters() if name.endswith(".mean")}
    assert len(means) == 4 and all(mean.any() for mean in means.values())
    assert all(torch.equal(means[name], means[name.replace(".ref.", ".default.")]) for name in means)
    trainer.train()
    assert all(torch.equal(trainer.model.get_parameter(name), mean) for name, mean in means.items())
    memory, reference = tiny.memory_parameters(trainer.model), tiny.memory_parameters(trainer.model, "ref")
    assert len(memory) == len(reference) == 6
    for name, parameter in trainer.model.named_parameters():
        assert parameter.requires_grad == (name in memory), name
        assert torch.equal(parameter, start[name]) != (name in memory), name
        if name in reference:
            assert torch.equal(parameter, start[name.replace(".ref.", ".default.")]), name
    assert trainer.model.active_adapters == ["default"]

    found, batch = reference_log_probabilities(kind, trainer)
    before = continued(base, adapter).eval()
    torch.testing.assert_close(found, log_probabilities(before, batch).sum(1), rtol=0, atol=1e-5)
    for other in (load(base), trainer.model):
        assert (found - log_probabilities(other, batch).sum(1)).abs().max() > 1e-3
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if kind != "grpo":
        assert losses[0] == pytest.approx({"dpo": 0.6931, "kto": 0.5}[kind], abs=1e-3) and losses[-1] < losses[0]


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_a_continued_memory_can_be_compared_with_the_base_model(base, adapter, tmp_path, kind):
    trainer = trainer_for(kind, base, tmp_path, model=continued(base, adapter), ref_model=load(base))
    assert list(trainer.model.peft_config) == ["default"]
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    found = trainer.compute_ref_log_probs(trainer.ref_model, batch)
    found = torch.cat(found) if kind == "dpo" else found[0]
    torch.testing.assert_close(found, log_probabilities(load(base), batch).sum(1), rtol=0, atol=1e-5)
    at_start = trainer.compute_loss(trainer.model.eval(), batch).item()
    assert abs(at_start - {"dpo": 0.6931, "kto": 0.5}[kind]) > 1e-3  # as it would be if compared with itself


def dpo_loss(policy: nn.Module, reference: nn.Module, batch: dict[str, Tensor]) -> float:
    """-log σ(β((log π(chosen) - log π_ref(chosen)) - (the same of rejected))), mean over rows."""
    chosen, rejected = (log_probabilities(policy, batch) - log_probabilities(reference, batch)).sum(1).chunk(2)
    return -nn.functional.logsigmoid(BETA * (chosen - rejected)).mean().item()


@pytest.mark.parametrize("setting", ["new", "continued", "continued, base as reference", "precomputed"])
def test_the_loss_of_dpo_is_that_of_policy_and_reference(base, adapter, tmp_path, setting):
    plain, before = load(base), continued(base, adapter).eval()
    reference = before if setting == "continued" else plain
    changed: dict[str, Any] = {"precompute_ref_log_probs": True} if setting == "precomputed" else {}
    model = continued(base, adapter) if setting.startswith("continued") else None
    if setting.endswith("reference"):
        changed["ref_model"] = load(base)
    trainer = trainer_for("dpo", base, tmp_path, model=model, **changed)
    tiny.randomize(trainer.model, seed=11)  # somewhere on the way
    trainer.model.eval()
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    loss = trainer.compute_loss(trainer.model, batch).item()
    assert loss == pytest.approx(dpo_loss(trainer.model, reference, batch), abs=1e-5)
    other = plain if reference is before else before
    assert loss != pytest.approx(dpo_loss(trainer.model, other, batch), abs=1e-4)


@pytest.mark.parametrize("kind", ["dpo", "grpo"])
def test_a_continued_memory_resumes_with_its_reference(base, adapter, tmp_path, kind):
    whole = trainer_for(kind, base, tmp_path / "whole", model=continued(base, adapter), save_steps=2)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    at_start = load_file(adapter / "adapter_model.safetensors")
    in_checkpoint = load_file(checkpoint / "ref" / "adapter_model.safetensors")
    assert at_start.keys() == in_checkpoint.keys()
    assert all(torch.equal(at_start[name], in_checkpoint[name]) for name in at_start)

    shutil.copytree(checkpoint, tmp_path / "resumed" / "checkpoint-2")
    second = trainer_for(kind, base, tmp_path / "resumed", model=continued(base, adapter))
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == STEPS
    expected = dict(whole.model.named_parameters())
    for name, parameter in second.model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["ref", "memory", "default_bank"])
def test_an_adapter_may_be_called_by_a_part_of_our_key_names(base, tmp_path, name):
    """PEFT warns that weights may be lost on loading. They are not, so the warning is silenced."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        accept_adapter_names()  # as importing prefixmemory does
        model = PeftModel.from_pretrained(load(base), saved_as("default", base, tmp_path / "a"))
        model.load_adapter(saved_as("default", base, tmp_path / "b", seed=5), adapter_name=name)
        model.load_adapter(saved_as(name, base, tmp_path / "c", seed=6), adapter_name="other")
    for adapter, seed in (("default", 2), (name, 5), ("other", 6)):
        alone = tiny.with_memory(load(base), fill=False, **tiny.DEFAULT)
        tiny.randomize(alone, seed=seed)
        expected = tiny.memory_parameters(alone)
        found = tiny.memory_parameters(model, adapter)
        assert len(found) == len(expected) == 4
        for key, parameter in found.items():
            assert torch.equal(parameter, expected[key.replace(f"bank.{adapter}.", "bank.default.")]), key


def saved_as(name: str, base: Path, folder: Path, seed: int = 2) -> Path:
    """A folder with an adapter that was called ``name`` when it was saved."""
    model = get_peft_model(load(base), PrefixMemoryConfig(task_type="CAUSAL_LM"), adapter_name=name)
    tiny.randomize(model, name, seed)
    model.save_pretrained(folder)
    return folder if name == "default" else folder / name
