"""What the processes of test_distributed.py run: the same short trainings, whatever the engine.

``python tests/distributed_worker.py ENGINE FOLDER``, by itself or under a launcher. ``FOLDER/base`` holds the base
model, ``FOLDER/uneven`` one with a single key/value head; adapters and ``results.json`` go to ``FOLDER/ENGINE``.
"""

from __future__ import annotations

import json
import os
import re
import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import AcceleratorState, DistributedType, PartialState
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForCausalLM, PrinterCallback, Trainer, TrainingArguments
from transformers.distributed import DistributedConfig

import tiny
from prefixmemory import PrefixMemoryConfig, PrefixMemoryError, register_feature_map

STEPS, SAVED_AT, GLOBAL_BATCH = 6, 3, 4
IDS = tiny.tokens(rows=STEPS * GLOBAL_BATCH, length=12)
LOW_RANK = {"rank": 3, "feature_map": "mlp", "normalize": "none"}
#: Every kind of parameter that a memory can have.
EVERY_KIND = {**LOW_RANK, "feed_forward": 2}
TENSOR_PARALLEL_FAMILIES = ("llama_gqa", "qwen3", "gemma2", "gpt_neox", "phi3")
TENSOR_PARALLEL_CONFIGS = (
    {},
    {"rank": None, "output_limit": None, "normalize": "none"},
    LOW_RANK,
    {"share_heads": True, **LOW_RANK, "normalize": "feature_mean"},
    {"query": "rotary", "normalize": "query_rms"},
)


def adapted(base: Path, seed: int = 0, load: dict[str, Any] | None = None, **config: Any) -> PeftModel:
    model = AutoModelForCausalLM.from_pretrained(base, **(load or {}))
    torch.manual_seed(seed)
    return get_peft_model(model, PrefixMemoryConfig(task_type="CAUSAL_LM", **config))


def held_here(model: nn.Module) -> dict[str, int]:
    """How many numbers of all memories of attention heads this process holds."""
    memory = [p for n, p in model.named_parameters() if ".self_attn.prefix_memory.prefix_memory_bank." in n]
    here = [getattr(p, "ds_tensor", getattr(p.data, "_local_tensor", p)) for p in memory]
    return {"here": sum(p.numel() for p in here), "all": sum(getattr(p, "ds_numel", p.numel()) for p in memory)}


def whole(parameters: list[nn.Parameter]) -> AbstractContextManager[Any]:
    """Parameters that ZeRO-3 has spread over the processes, put together meanwhile."""
    if not all(hasattr(parameter, "ds_id") for parameter in parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)


def means_apart(model: nn.Module) -> float:
    """Largest difference between the means that two processes subtract."""
    named = (*model.named_parameters(), *model.named_buffers())  # under ZeRO-3, what does not learn is a buffer
    kept = [mean for name, mean in named if name.endswith(".mean")]
    if not kept or not dist.is_initialized():
        return 0.0
    with whole(kept):
        found = [mean.detach() for mean in kept]
        means = [(mean.full_tensor() if hasattr(mean, "full_tensor") else mean).flatten() for mean in found]
        least, most = torch.cat(means), torch.cat(means)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return float((most - least).max())


# An ordinary accelerate loop


def loop(model: PeftModel, folder: Path, resume: bool = False, apart: bool = False, **accelerate: Any) -> Any:
    """Train, with a checkpoint on the way; or go on from that checkpoint. ``apart`` leaves gradients unsynchronised."""
    AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=True, **accelerate)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    loader = DataLoader(TensorDataset(IDS), batch_size=GLOBAL_BATCH // accelerator.num_processes)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    if resume:
        accelerator.load_state(folder / "state")
    losses = []
    for step, (ids,) in enumerate(loader, start=1):
        if resume and step <= SAVED_AT:
            continue
        with accelerator.no_sync(model) if apart else nullcontext():
            loss = model(input_ids=ids, labels=ids).loss
            accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(accelerator.reduce(loss.detach(), "mean")))
        if step == SAVED_AT and not resume:
            accelerator.save_state(folder / "state")
    weights = accelerator.get_state_dict(model)
    accelerator.unwrap_model(model).save_pretrained(
        folder / ("resumed" if resume else "adapter"), is_main_process=accelerator.is_main_process, state_dict=weights
    )
    accelerator.wait_for_everyone()
    return {"losses": losses, **held_here(model)}


# transformers' Trainer


def examples(even: bool) -> Dataset:
    """Rows of different lengths with prompts of different lengths, so that processes count different numbers.

    ``even``: of one length. A mean over a batch counts its padding, of which processes may have different amounts.
    """
    rows = []
    for index, row in enumerate(IDS.tolist()):
        ids, prompt = row[: 12 if even else 7 + index % 6], index % 5
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return Dataset.from_list(rows)


def collate(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    def padded(field: str, value: int) -> Tensor:
        length = max(len(row[field]) for row in rows)
        return torch.tensor([row[field] + [value] * (length - len(row[field])) for row in rows])

    ids = padded("input_ids", 0)
    return {"input_ids": ids, "labels": padded("labels", -100), "attention_mask": (ids != 0).long()}


def trainer(
    make: Callable[[], PeftModel],
    folder: Path,
    resume: bool = False,
    alike: bool = False,
    even: bool = False,
    change: Callable[[TrainingArguments], None] = lambda args: None,
    **arguments: Any,
) -> Any:
    """As :func:`loop`, by the Trainer. ``alike``: all processes see the same rows."""
    AcceleratorState._reset_state()
    arguments = {"use_cpu": True, "save_strategy": "steps", "save_steps": SAVED_AT, **arguments}
    args = TrainingArguments(
        output_dir=str(folder / "checkpoints"), max_steps=STEPS, logging_steps=1, learning_rate=0.01, seed=0,
        report_to="none", disable_tqdm=True, dataloader_pin_memory=False, **arguments,
    )  # fmt: skip
    args.per_device_train_batch_size = GLOBAL_BATCH // (1 if alike else args.world_size)
    change(args)
    model = make()  # after the arguments: DeepSpeed's say how from_pretrained loads
    made = Trainer(model=model, args=args, train_dataset=examples(even), data_collator=collate)
    made.remove_callback(PrinterCallback)
    made.train(resume_from_checkpoint=str(folder / "checkpoints" / f"checkpoint-{SAVED_AT}") if resume else None)
    end = folder / ("resumed" if resume else "adapter")
    made.save_model(str(end))
    if made.is_fsdp_enabled and os.environ["FSDP_STATE_DICT_TYPE"] == "SHARDED_STATE_DICT":  # then it saves nothing
        weights = made.accelerator.get_state_dict(made.model)
        made.model.save_pretrained(end, state_dict=weights, is_main_process=args.should_save)
    made.accelerator.wait_for_everyone()
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    losses = losses[SAVED_AT:] if resume else losses
    return {"losses": losses, "means_apart": means_apart(made.model), **held_here(made.model)}


def twice(run: Callable[..., Any], folder: Path) -> Any:
    """Run, and run again from the checkpoint on the way."""
    return {**run(folder, False), "resumed": run(folder, True)["losses"]}


# Engines


def single(where: Path, out: Path) -> dict[str, Any]:
    return {
        "loop": twice(lambda f, r: loop(adapted(where / "base", **EVERY_KIND), f, r), out / "loop"),
        "uneven": loop(adapted(where / "uneven", share_heads=True, **EVERY_KIND), out / "uneven"),
        "bf16": loop(adapted(where / "base", **EVERY_KIND), out / "bf16", mixed_precision="bf16"),
        "trainer": twice(lambda f, r: trainer(lambda: adapted(where / "base", **EVERY_KIND), f, r), out / "trainer"),
        "heads": trainer(lambda: adapted(where / "base", **LOW_RANK), out / "heads"),
        "default": trainer(lambda: adapted(where / "base"), out / "default", even=True),
    }


def ddp(where: Path, out: Path) -> dict[str, Any]:
    seed = int(os.environ["RANK"])  # the start values of the first process hold
    return {
        "loop": twice(lambda f, r: loop(adapted(where / "base", seed, **EVERY_KIND), f, r), out / "loop"),
        "apart": loop(adapted(where / "base", **EVERY_KIND), out / "apart", apart=True),
        "trainer": twice(lambda f, r: trainer(lambda: adapted(where / "base", **EVERY_KIND), f, r), out / "trainer"),
        "default": trainer(lambda: adapted(where / "base", seed), out / "default", even=True),
        "guide": _guide(where, out / "guide"),
    }


def _guide(where: Path, out: Path) -> list[str]:
    """The script of docs/guides/distributed.md, with data; returns the names of what it trained."""
    guide = (Path(__file__).parents[1] / "docs" / "guides" / "distributed.md").read_text(encoding="utf-8")
    script = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)[0]
    out.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": f"line {i} is dead", "completion": " no connection"} for i in range(8)]
    mine = out / os.environ["RANK"]  # data sets are prepared by each process on its own
    mine.mkdir()
    (mine / "tickets.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    script = script.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(where / "base"))
    script = script.replace('"tickets.jsonl"', repr(str(mine / "tickets.jsonl")))
    script = script.replace('"tickets-memory"', repr(str(out / "tickets-memory")))
    AcceleratorState._reset_state()
    names: dict[str, Any] = {"__name__": "guide"}
    exec(compile(script, "distributed.md", "exec"), names)
    return sorted(n for n, p in names["model"].named_parameters() if p.requires_grad and bool(p.any()))


def fsdp2(where: Path, out: Path) -> dict[str, Any]:
    """The engine's settings come from examples/accelerate/fsdp2.yaml, through the launcher."""
    _let_fsdp_run_on_cpu()
    seed = int(os.environ["RANK"])
    base = where / "base"
    results = {
        "loop": twice(lambda f, r: loop(adapted(base, seed, **EVERY_KIND), f, r), out / "loop"),
        "uneven": loop(adapted(where / "uneven", share_heads=True, **EVERY_KIND), out / "uneven"),
        "bf16": loop(adapted(base, **EVERY_KIND), out / "bf16", mixed_precision="bf16"),
        "trainer": twice(lambda f, r: trainer(lambda: adapted(base, **EVERY_KIND), f, r), out / "trainer"),
        "checkpointing": trainer(
            lambda: adapted(base, **EVERY_KIND), out / "checkpointing", gradient_checkpointing=True
        ),
        "default": trainer(lambda: adapted(base), out / "default", even=True),
    }
    os.environ["FSDP_STATE_DICT_TYPE"] = "SHARDED_STATE_DICT"
    os.environ["FSDP_ACTIVATION_CHECKPOINTING"] = "true"
    results["sharded_loop"] = twice(lambda f, r: loop(adapted(base, **EVERY_KIND), f, r), out / "sharded_loop")
    results["sharded_trainer"] = twice(
        lambda f, r: trainer(lambda: adapted(base, **EVERY_KIND), f, r), out / "sharded_trainer"
    )
    return results


def zero3(where: Path, out: Path) -> dict[str, Any]:
    """The engine's settings come from examples/accelerate/zero3.yaml, through the launcher."""
    # accelerate starts DeepSpeed for GPUs only
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_CPU)

    def split_small_parameters_too(args: TrainingArguments) -> None:
        args.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0

    options: dict[str, Any] = {"use_cpu": False, "change": split_small_parameters_too}

    def run(folder: Path, resume: bool) -> Any:
        return trainer(lambda: adapted(where / "base", **EVERY_KIND), folder, resume, **options)

    def default(folder: Path, resume: bool) -> Any:
        return trainer(lambda: adapted(where / "base"), folder, resume, even=True, **options)

    return {"trainer": twice(run, out / "trainer"), "default": twice(default, out / "default")}


def tensor_parallel(where: Path, out: Path) -> dict[str, Any]:
    ParallelismConfig._validate_accelerator = lambda *args: None  # accelerate knows it for GPUs only
    split = {"tp_plan": "auto"}
    seed = int(os.environ["RANK"])  # the start values of the first process hold

    def load(config: dict[str, Any], **load: Any) -> Callable[[], PeftModel]:
        return lambda: adapted(where / "base", seed, load, **config)

    arguments = {"alike": True, "save_strategy": "no"}  # the Trainer keeps no checkpoints of models split at loading
    sharded = {"distributed_config": DistributedConfig(fsdp_size=2)}
    return {
        "compared": [
            _compared(where / family, config, split)
            for family in TENSOR_PARALLEL_FAMILIES
            for config in TENSOR_PARALLEL_CONFIGS
        ],
        "heads": trainer(load(LOW_RANK, **split), out / "heads", **arguments),
        "heads_checkpointing": trainer(
            load(LOW_RANK, **split), out / "heads_checkpointing", gradient_checkpointing=True, **arguments
        ),
        "default": trainer(load({}, **split), out / "default", even=True, **arguments),
        "fsdp_at_loading": trainer(load(EVERY_KIND, **sharded), out / "fsdp_at_loading", save_strategy="no"),
        "refused": _refused(where, split),
    }


def _compared(base: Path, config: dict[str, Any], split: dict[str, Any]) -> dict[str, Any]:
    """Logits, gradients and generated tokens of a split model against those of the whole one in this process."""
    whole, parts = adapted(base, **config), adapted(base, int(os.environ["RANK"]), split, **config)
    starts = [torch.cat([p.detach().flatten() for p in tiny.memory_parameters(m).values()]) for m in (whole, parts)]
    for model in (whole, parts):
        model.train()(input_ids=IDS[:4])  # takes the mean, if the config asks for it
    means = [[mean for n, mean in m.named_parameters() if n.endswith(".mean")] for m in (whole, parts)]
    apart = max((float((a - b).abs().max()) for a, b in zip(*means, strict=True)), default=0.0)
    means_found = torch.tensor([apart, -float(all(bool(mean.any()) for mean in means[1]))])
    dist.all_reduce(means_found, dist.ReduceOp.MAX)
    same_start = torch.tensor(float(torch.equal(*starts)))
    dist.all_reduce(same_start, dist.ReduceOp.MIN)
    with torch.no_grad():
        zero = parts(input_ids=IDS[:4]).logits
        with parts.disable_adapter():
            plain = parts(input_ids=IDS[:4]).logits
    logits, generated = [], []
    for model in (whole, parts):
        tiny.randomize(model)
        generated.append(model.eval().generate(input_ids=IDS[:2], max_new_tokens=6, do_sample=False))
        output = model.train()(input_ids=IDS[:4], labels=IDS[:4])
        output.loss.backward()
        logits.append(output.logits.detach())
    gradients = [[p.grad for p in tiny.memory_parameters(model).values()] for model in (whole, parts)]
    return {
        "case": f"{base.name} {config}",
        "same_start": bool(same_start),  # on every process
        "means_apart": float(means_found[0]),  # from those of the whole model, on any process
        "has_means": bool(means[1]) and float(means_found[1]) == -1,
        "logits": float((logits[0] - logits[1]).abs().max()),
        "effect": float((logits[0] - plain).abs().max()),
        "gradients": max(float((a - b).abs().max()) for a, b in zip(*gradients, strict=True)),
        "smallest_gradient": min(float(g.flatten(1).norm(dim=1).min()) for g in gradients[0]),  # of any head
        "generated": torch.equal(*generated),
        "zero_is_base": torch.equal(zero, plain),
        "fingerprint": whole.peft_config["default"].base_model_fingerprint
        == parts.peft_config["default"].base_model_fingerprint,
    }


def _refused(where: Path, split: dict[str, Any]) -> dict[str, str]:
    @register_feature_map("one_for_all")
    class OneForAll(nn.Module):
        def __init__(self, groups: int, head_dim: int, feature_dim: int | None) -> None:
            super().__init__()
            self.feature_dim = head_dim
            self.weight = nn.Parameter(torch.eye(head_dim))

        def forward(self, q: Tensor) -> Tensor:
            return q @ self.weight

    def message(make: Callable[[], object]) -> str:
        try:
            make()
        except PrefixMemoryError as error:
            return str(error)
        return "not refused"

    def part_of_a_model() -> object:
        model = AutoModelForCausalLM.from_pretrained(where / "base", **split)
        return get_peft_model(model.model, PrefixMemoryConfig())

    return {
        "three_heads": message(lambda: adapted(where / "three_heads", load=split)),
        "feature_map": message(lambda: adapted(where / "base", load=split, feature_map="one_for_all")),
        "part": message(part_of_a_model),
        "feed_forward": message(lambda: adapted(where / "base", load=split, feed_forward=2)),
    }


def _let_fsdp_run_on_cpu() -> None:
    """accelerate turns FSDP on for GPUs only. This is what it does there, for processes on a CPU."""
    original = AcceleratorState.__init__

    def init(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            PartialState._shared_state.update(distributed_type=DistributedType.FSDP, device=torch.device("cpu"))
            vars(self).update(PartialState._shared_state)
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = init


ENGINES = {"single": single, "ddp": ddp, "fsdp2": fsdp2, "zero3": zero3, "tensor_parallel": tensor_parallel}

if __name__ == "__main__":
    engine, folder = sys.argv[1], Path(sys.argv[2])
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = ENGINES[engine](folder, folder / engine)
    if int(os.environ.get("RANK", "0")) == 0:
        (folder / engine / "results.json").write_text(json.dumps(found))
    if dist.is_initialized():
        dist.destroy_process_group()
    # DeepSpeed still holds the group: a thread of gloo that then drops a tensor while Python shuts down aborts the
    # process (pytorch/pytorch#190489). Everything is written, so Python does not shut down.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
