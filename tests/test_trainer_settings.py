"""What people set on a Trainer: the best checkpoint, early stopping, accumulation, mixed precision, packing."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

import tiny
from prefixmemory import PrefixMemoryConfig, calibrate
from prefixmemory.tuner.layers import memory_layers

# TRL 1.16 switches gradient checkpointing on and off under the names that transformers 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings(r"ignore:`gradient_checkpointing(_\w+)?` is deprecated:FutureWarning")


def dataset(rows: int, seed: int, length: int = 12) -> Dataset:
    """Random rows of equal length; the first labels of each are left out, a different number in each row."""
    ids = tiny.tokens(rows, length, seed).tolist()
    return Dataset.from_list([{"input_ids": r, "labels": [-100] * (2 * i) + r[2 * i :]} for i, r in enumerate(ids)])


def arguments(folder: Path, **changed: Any) -> TrainingArguments:
    common: dict[str, Any] = dict(
        output_dir=str(folder), per_device_train_batch_size=4, max_steps=4, learning_rate=0.05, logging_steps=1,
        lr_scheduler_type="constant", save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    return TrainingArguments(**{**common, **changed})


def make_model(dtype: torch.dtype = torch.float32, **config: Any) -> PeftModel:
    return get_peft_model(tiny.build().to(dtype), PrefixMemoryConfig(task_type="CAUSAL_LM", **config))


def logged(trainer: Trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def values(model: PeftModel) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def saved(checkpoint: Path) -> dict[str, Tensor]:
    """Tensors of a checkpoint under the names that they have in the model."""
    tensors = load_file(checkpoint / "adapter_model.safetensors")
    return {name.replace("prefix_memory_bank.", "prefix_memory_bank.default."): t for name, t in tensors.items()}


# The best checkpoint


@pytest.fixture(scope="module")
def early_stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, dict[str, Tensor]]:
    """A run whose loss on other rows falls, then rises, and the parameters before it."""
    model = make_model(output_limit=None)
    model.get_base_model().lm_head.weight.data.mul_(30)  # a base model that is sure of itself can be overfitted
    before = values(model)
    trainer = Trainer(
        model=model,
        args=arguments(
            tmp_path_factory.mktemp("early"), max_steps=60, eval_strategy="steps", eval_steps=2, save_strategy="steps",
            save_steps=2, load_best_model_at_end=True, metric_for_best_model="eval_loss",
        ),
        train_dataset=dataset(4, seed=1),
        eval_dataset=dataset(2, seed=9),
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    )  # fmt: skip
    trainer.train()
    return trainer, before


def test_early_stopping_ends_two_evaluations_after_the_best(early_stopped):
    trainer, _ = early_stopped
    losses = logged(trainer, "eval_loss")
    best = losses.index(min(losses))
    assert 0 < best == len(losses) - 3
    assert trainer.state.global_step == 2 * len(losses) < trainer.args.max_steps
    assert Path(trainer.state.best_model_checkpoint).name == f"checkpoint-{2 * (best + 1)}"


def test_the_model_holds_the_best_memory_in_the_end(early_stopped):
    trainer, before = early_stopped
    best = saved(Path(trainer.state.best_model_checkpoint))
    last = saved(Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.global_step}")
    held = tiny.memory_parameters(trainer.model)
    means = {name: mean for name, mean in trainer.model.named_parameters() if name.endswith(".mean")}
    assert held.keys() | means.keys() == best.keys() == last.keys()
    assert len(means) == 2
    for name, mean in means.items():  # of the first batch, then left alone
        assert mean.any() and torch.equal(mean, best[name]) and torch.equal(mean, last[name]), name
    for name, parameter in held.items():
        assert torch.equal(parameter, best[name]), name
        assert not torch.equal(parameter, last[name]), name
    for name, parameter in trainer.model.named_parameters():
        assert name in held or name in means or torch.equal(parameter, before[name]), name
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, abs=1e-6)


def test_training_can_go_on_from_the_best_memory(early_stopped, tmp_path):
    trainer, _ = early_stopped
    model = copy.deepcopy(trainer.model)
    best = values(model)
    Trainer(model=model, args=arguments(tmp_path), train_dataset=trainer.train_dataset).train()
    memory = tiny.memory_parameters(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, best[name]) != (name in memory), name


# Gradient accumulation


class Gradients(TrainerCallback):
    """Keeps the gradients of the first optimizer step."""

    def __init__(self) -> None:
        self.first: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        if not self.first:
            self.first = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def accumulated(folder: Path, batch: int, steps: int, **config: Any) -> tuple[Trainer, dict[str, Tensor]]:
    torch.manual_seed(0)
    gradients = Gradients()
    trainer = Trainer(
        model=make_model(**config), callbacks=[gradients], train_dataset=dataset(4, seed=1),
        args=arguments(folder, per_device_train_batch_size=batch, gradient_accumulation_steps=steps, max_grad_norm=0),
    )  # fmt: skip
    trainer.train()
    return trainer, gradients.first


@pytest.mark.parametrize("config", [{}, {"rank": None}, {"feature_map": "mlp"}, {"rank": 2}], ids=str)
def test_accumulated_gradients_are_those_of_the_large_batch(tmp_path, config):
    """Rows have 12, 10, 8 and 6 labels: a mean of means would not do."""
    config = {"normalize": "none", **config}  # feature_mean takes its mean over the first, smaller batch
    whole, expected = accumulated(tmp_path / "whole", 4, 1, **config)
    for batch, steps in ((2, 2), (1, 4)):
        trainer, gradients = accumulated(tmp_path / f"{batch}", batch, steps, **config)
        assert gradients.keys() == expected.keys() == tiny.memory_parameters(trainer.model).keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-8)
        assert logged(trainer, "loss") == pytest.approx(logged(whole, "loss"), abs=1e-5)
    moved = [g.abs().max() for n, g in expected.items() if n.endswith((".M", ".B"))]
    assert len(moved) == 2 and min(moved) > 1e-4  # more than the tolerance


# Mixed precision


class Dtypes(TrainerCallback):
    """Keeps the dtypes of memories, gradients and optimizer states, and those that a memory computed in."""

    def __init__(self, model: PeftModel) -> None:
        self.kept: set[torch.dtype] = set()
        self.computed: set[torch.dtype] = set()
        for layer in memory_layers(model):
            layer.memory("default").register_forward_hook(lambda module, args, out: self.computed.add(out.dtype))

    def on_optimizer_step(self, args, state, control, model, optimizer, **kwargs):
        for parameter in tiny.memory_parameters(model).values():
            states = [s for s in optimizer.state[parameter].values() if s.ndim]
            assert len(states) == 2  # Adam's two
            self.kept |= {parameter.dtype, parameter.grad.dtype, *(s.dtype for s in states)}


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=["fp32 base", "bf16 base"])
@pytest.mark.parametrize("autocast", [False, True], ids=["no autocast", "bf16 autocast"])
def test_memories_stay_fp32_in_mixed_precision(tmp_path, base, autocast):
    model = make_model(base)
    before, dtypes = values(model), Dtypes(model)
    trainer = Trainer(model=model, args=arguments(tmp_path, bf16=autocast, save_strategy="steps", save_steps=4),
                      train_dataset=dataset(4, seed=1), callbacks=[dtypes])  # fmt: skip
    trainer.train()
    assert dtypes.kept == {torch.float32}
    assert dtypes.computed == {torch.bfloat16 if autocast else torch.float32}
    memory = tiny.memory_parameters(model)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if "prefix_memory" in name else base)
        if name not in tiny.means(model):  # taken from the first batch
            assert torch.equal(parameter, before[name]) != (name in memory), name
    assert {tensor.dtype for tensor in saved(tmp_path / "checkpoint-4").values()} == {torch.float32}

    exact = Trainer(model=make_model(), args=arguments(tmp_path / "exact"), train_dataset=dataset(4, seed=1))
    exact.train()
    assert logged(trainer, "loss") == pytest.approx(logged(exact, "loss"), rel=0.01)


# Noise on embeddings


def test_noise_reaches_the_gradients_and_not_the_mean(tmp_path):
    model, clean = make_model(), make_model()
    embeddings, gradients = model.get_input_embeddings(), Gradients()
    batch: dict[str, Tensor] = {}
    seen: list[Tensor] = []

    def look(module: PeftModel, args: tuple[()], inputs: dict[str, Tensor]) -> None:
        batch.update(inputs)
        embeddings.register_forward_hook(lambda *call: seen.append(call[-1].detach()))  # behind the trainer's own

    model.register_forward_pre_hook(look, with_kwargs=True)
    Trainer(
        model=model, callbacks=[gradients], train_dataset=dataset(4, seed=1),
        args=arguments(tmp_path, max_steps=1, neftune_noise_alpha=5.0, max_grad_norm=0),
    ).train()  # fmt: skip
    without, with_noise = seen  # the mean is taken in a pass of its own
    assert torch.equal(without, embeddings.weight[batch["input_ids"]])
    assert 0.01 < (with_noise - without).abs().max() <= 5 / (12 * 32) ** 0.5
    calibrate(clean, input_ids=batch["input_ids"])
    for name, mean in tiny.means(clean).items():
        torch.testing.assert_close(tiny.means(model)[name], mean, rtol=0, atol=1e-6)
    clean(inputs_embeds=with_noise, labels=batch["labels"]).loss.backward()
    learnt = {name: p.grad for name, p in tiny.memory_parameters(clean).items()}
    assert gradients.first.keys() == learnt.keys() and any(gradient.any() for gradient in learnt.values())
    for name, gradient in learnt.items():
        torch.testing.assert_close(gradients.first[name], gradient, rtol=1e-4, atol=1e-8)
    assert torch.equal(embeddings.train()(batch["input_ids"]), without)  # the noise is gone


# Packing: several rows of text in one row of the batch


TEXTS = [{"text": f"line {i} is dead" + "!" * i} for i in range(6)]


def packing_trainer(folder: Path, attention: str, query: str, how: dict[str, Any]) -> Trainer:
    trl = pytest.importorskip("trl")
    args = trl.SFTConfig(
        output_dir=str(folder), per_device_train_batch_size=4, max_steps=2, save_strategy="no", report_to="none",
        use_cpu=True, bf16=False, disable_tqdm=True, dataloader_pin_memory=False, **how,
    )  # fmt: skip
    return trl.SFTTrainer(
        model=tiny.build(attention=attention), args=args, train_dataset=Dataset.from_list(TEXTS),
        processing_class=tiny.tokenizer(), peft_config=PrefixMemoryConfig(task_type="CAUSAL_LM", query=query),
    )  # fmt: skip


@pytest.mark.parametrize("query", ["content", "rotary"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("how", [{"packing": True, "max_length": 64}, {"padding_free": True, "max_length": None}],
                         ids=["packing", "padding_free"])  # fmt: skip
def test_packed_rows_do_not_see_each_other(tmp_path, attention, query, how):
    trainer = packing_trainer(tmp_path, attention, query, how)
    tiny.randomize(trainer.model)
    model = trainer.model.eval()
    batch = next(iter(trainer.get_train_dataloader()))
    labels = batch.pop("labels")
    positions = batch["position_ids"][0]
    starts = [*(positions == 0).nonzero().flatten().tolist(), len(positions)]
    assert batch["input_ids"].shape[0] == 1 and len(starts) - 1 == (6 if "packing" in how else 4)
    with torch.no_grad():
        packed = model(**batch).logits
        for start, end in pairwise(starts):
            row = batch["input_ids"][:, start:end]
            assert row.tolist()[0] in [trainer.processing_class(t["text"] + "<eos>")["input_ids"] for t in TEXTS]
            torch.testing.assert_close(model(input_ids=row).logits, packed[:, start:end], rtol=0, atol=1e-5)
            assert labels[0, start] == -100  # no row is asked for the first token of the next
        leaking = model(input_ids=batch["input_ids"]).logits
    assert (leaking - packed).abs().max() > 1e-2

    before = values(model)
    trainer.train()
    memory = tiny.memory_parameters(trainer.model)
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]) != (name in memory), name
