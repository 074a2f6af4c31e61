"""What Prefix-Tuning can do here and in PEFT: every row is run with both, and written to docs/inside.md.

    python experiments/inside_table.py

A row is a function that adapts tiny random models and asserts; what it raises is the reason in the table.
``tests/test_inside.py`` runs our column. The record is results/inside/table.json.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import torch
import transformers
from peft import PeftConfig, PeftModel, PrefixTuningConfig, get_peft_model, get_peft_model_state_dict
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, PreTrainedModel

from prefixmemory import PrefixMemoryConfig
from prefixmemory.files.records import write_json
from prefixmemory.models.loading import load_model
from prefixmemory.models.quantization import Quantization

ROOT = Path(__file__).parent.parent
RECORD, PAGE = ROOT / "results" / "inside" / "table.json", ROOT / "docs" / "inside.md"
COMMON = dict(
    vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    initializer_range=0.15,
)  # fmt: skip
LLAMA = LlamaConfig(**COMMON)
GEMMA = Gemma3TextConfig(
    **COMMON, head_dim=24, query_pre_attn_scalar=24, sliding_window=6, tie_word_embeddings=False,
    layer_types=["sliding_attention", "full_attention"],
)  # fmt: skip


class Ours:
    """Prefix vectors inside the softmax."""

    name = "prefixmemory, placement='inside'"
    parameters = "prefix_memory_"

    @staticmethod
    def config(length: int = 4) -> PeftConfig:
        return PrefixMemoryConfig(task_type="CAUSAL_LM", placement="inside", prefix_length=length)


class Theirs:
    """PEFT's own method."""

    name = "PEFT, PREFIX_TUNING"
    parameters = "prompt_encoder"

    @staticmethod
    def config(length: int = 4) -> PeftConfig:
        return PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=length)


Method = type[Ours] | type[Theirs]


def base(config: transformers.PretrainedConfig = LLAMA) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").float().eval()


def fill(model: PeftModel, method: Method) -> PeftModel:
    """Contents as after training; the same for the same shapes."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if method.parameters in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.eval()


def adapted(method: Method, config: transformers.PretrainedConfig = LLAMA) -> PeftModel:
    return fill(get_peft_model(base(config), method.config()), method)


def tokens(rows: int = 2, length: int = 9, seed: int = 2) -> Tensor:
    return torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(seed))


def gradients(model: PeftModel, method: Method) -> dict[str, Tensor]:
    model.zero_grad()
    (100 * model(input_ids=tokens(), labels=tokens(), use_cache=False).loss).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if method.parameters in n and p.grad is not None}


def checkpointing(method: Method, use_reentrant: bool) -> None:
    model = adapted(method).train()
    expected = gradients(model, method)
    assert expected and all(g.abs().max() > 1e-3 for g in expected.values())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    actual = gradients(model.train(), method)
    assert actual.keys() == expected.keys(), "no gradient reaches the prefix"
    worst = max(float((actual[n] - expected[n]).abs().max()) for n in expected)
    assert worst < 1e-5, f"gradients differ from those without checkpointing by up to {worst:.2g}"


def checkpointing_reentrant(method: Method) -> None:
    checkpointing(method, use_reentrant=True)


def checkpointing_not_reentrant(method: Method) -> None:
    checkpointing(method, use_reentrant=False)


def quantised(method: Method, quantization: Quantization) -> None:
    with tempfile.TemporaryDirectory() as folder:
        base().save_pretrained(folder)
        model = get_peft_model(load_model(folder, "float32", quantization=quantization), method.config())
    before = {n: p.detach().clone() for n, p in model.named_parameters() if method.parameters in n}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    model.train()
    for _ in range(8):
        loss = model(input_ids=tokens(4), labels=tokens(4)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0], f"the loss does not fall: {losses[0]:.3f} to {losses[-1]:.3f}"
    assert all((p != before[n]).any() for n, p in model.named_parameters() if n in before)


def four_bit(method: Method) -> None:
    quantised(method, "bnb-4bit")


def int8(method: Method) -> None:
    quantised(method, "torchao-int8")


def checkpointed_four_bit(method: Method) -> None:
    """QLoRA's way of training."""
    with tempfile.TemporaryDirectory() as folder:
        base().save_pretrained(folder)
        packed = load_model(folder, "float32", quantization="bnb-4bit")
    packed = peft.prepare_model_for_kbit_training(packed, gradient_checkpointing_kwargs={"use_reentrant": False})
    model = get_peft_model(packed, method.config())
    found = gradients(fill(model, method).train(), method)
    assert found and all(g.abs().max() > 0 for g in found.values()), "no gradient reaches the prefix"


def padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    width = max(len(row) for row in rows)
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.long)
    for n, row in enumerate(rows):
        ids[n, width - len(row) :], mask[n, width - len(row) :] = row, 1
    return ids, mask


def left_padding(method: Method) -> None:
    model = adapted(method)
    rows = [tokens(1, 9)[0], tokens(1, 5, seed=3)[0]]
    ids, mask = padded(rows)
    with torch.no_grad():
        together = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
        for n, row in enumerate(rows):
            alone = model(input_ids=row[None], attention_mask=torch.ones_like(row)[None]).logits[0]
            worst = float((together[n, mask[n].bool()] - alone).abs().max())
            assert worst < 1e-4, f"a padded row answers otherwise than alone, by up to {worst:.2g}"
    together_tokens = generate(model, ids, mask)
    for n, row in enumerate(rows):
        alone_tokens = generate(model, row[None], torch.ones_like(row)[None])
        assert torch.equal(together_tokens[n], alone_tokens[0]), "a padded row generates otherwise than alone"


def generate(model: PeftModel, ids: Tensor, mask: Tensor, **options: object) -> Tensor:
    out = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, do_sample=False, **options
    )
    return out[:, ids.shape[1] :]


@torch.no_grad()
def greedy(model: PeftModel, ids: Tensor) -> Tensor:
    """Eight tokens, each from one pass over all that stands before it."""
    length = ids.shape[1]
    for _ in range(8):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, -1]
        logits[:, 2] = -torch.inf  # generate() puts off the end
        ids = torch.cat([ids, logits.argmax(dim=-1, keepdim=True)], dim=1)
    return ids[:, length:]


def generation(method: Method, config: transformers.PretrainedConfig = LLAMA, **options: object) -> None:
    model, ids = adapted(method, config), tokens()
    expected = greedy(model, ids)
    with torch.no_grad():
        assert not torch.equal(expected, generate(base(config), ids, torch.ones_like(ids))), "no effect on the tokens"
    found = generate(model, ids, torch.ones_like(ids), **options)
    assert torch.equal(found, expected), "other tokens than without a cache"


def dynamic_cache(method: Method) -> None:
    generation(method)


def static_cache(method: Method) -> None:
    generation(method, cache_implementation="static", disable_compile=True)


def no_cache(method: Method) -> None:
    generation(method, use_cache=False)


def beams(method: Method) -> None:
    model, rows = adapted(method), [tokens(1, 9)[0], tokens(1, 5, seed=3)[0]]
    together = generate(model, *padded(rows), num_beams=3)
    for n, row in enumerate(rows):
        alone = generate(model, row[None], torch.ones_like(row)[None], num_beams=3)
        assert torch.equal(together[n], alone[0]), "a padded row generates otherwise than alone"


def gemma(method: Method) -> None:
    generation(method, GEMMA)
    model = adapted(method, GEMMA).train()
    found = gradients(model, method)
    assert found and all(g.abs().max() > 0 for g in found.values()), "no gradient reaches the prefix"


def in_window(method: Method) -> None:
    """The prefix moves the answer after a text longer than the window, also where every layer has one."""
    sliding = Gemma3TextConfig(**{**GEMMA.to_dict(), "layer_types": ["sliding_attention"] * 2})
    ids = tokens(1, 30)
    with torch.no_grad():
        moved = adapted(method, sliding)(input_ids=ids).logits - base(sliding)(input_ids=ids).logits
    assert moved[0, -1].abs().max() > 1e-3, "the prefix has left the window"


def second(method: Method, length: int = 4) -> PeftModel:
    model = adapted(method)
    model.add_adapter("second", method.config(length))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if method.parameters in name and ".second." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.eval()


@torch.no_grad()
def several_in_a_batch(method: Method) -> None:
    model, ids = second(method, length=7), tokens(3)
    mask = torch.ones_like(ids)
    rows = [model(input_ids=ids[:1], attention_mask=mask[:1]).logits]
    model.set_adapter("second")
    rows.append(model(input_ids=ids[1:2], attention_mask=mask[:1]).logits)
    with model.disable_adapter():
        rows.append(model(input_ids=ids[2:], attention_mask=mask[:1]).logits)
    names = ["default", "second", "__base__"]
    mixed = model(input_ids=ids, attention_mask=mask, adapter_names=names).logits
    worst = float((mixed - torch.cat(rows)).abs().max())
    assert worst < 1e-4, f"a row answers otherwise than alone, by up to {worst:.2g}"


@torch.no_grad()
def several_at_once(method: Method) -> None:
    model, ids = second(method), tokens()
    one = model(input_ids=ids).logits
    holder = model.base_model if method is Ours else model  # PEFT's tuners take a list there, its prompts have no tuner
    holder.set_adapter(["default", "second"])
    both = model(input_ids=ids).logits
    assert (both - one).abs().max() > 1e-3, "the second prefix has no effect"


@torch.no_grad()
def disabled(method: Method) -> None:
    ids, unadapted = tokens(), base()
    expected = unadapted(input_ids=ids).logits
    model = fill(get_peft_model(unadapted, method.config()), method)
    assert (model(input_ids=ids).logits - expected).abs().max() > 1e-3
    with model.disable_adapter():
        assert torch.equal(model(input_ids=ids).logits, expected), "not the base model's logits"


@torch.no_grad()
def saved(method: Method) -> None:
    model, ids = adapted(method), tokens()
    for low in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            loaded = PeftModel.from_pretrained(base(), folder, low_cpu_mem_usage=low).eval()
        ours, theirs = (get_peft_model_state_dict(m) for m in (loaded, model))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours), "other parameters"
        found, expected = (m(input_ids=ids).logits for m in (loaded, model))
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max(), "other logits after loading"


#: Row of the table and its check.
ROWS: dict[str, Callable[[Method], None]] = {
    "gradient checkpointing, reentrant: the same gradients": checkpointing_reentrant,
    "gradient checkpointing, not reentrant: the same gradients": checkpointing_not_reentrant,
    "training on a 4-bit base (bitsandbytes, NF4)": four_bit,
    "training on an int8 base (torchao)": int8,
    "4-bit base with gradient checkpointing (`prepare_model_for_kbit_training`)": checkpointed_four_bit,
    "left padding: a row answers as alone": left_padding,
    "generation with a dynamic cache: tokens of full passes": dynamic_cache,
    "generation with a static cache: tokens of full passes": static_cache,
    "generation without a cache": no_cache,
    "beam search in a padded batch: a row answers as alone": beams,
    "Gemma 3 (head_dim is not hidden_size / heads, sliding window): trains, generates": gemma,
    "the prefix stays in sight beyond a sliding window": in_window,
    "a different adapter for each row (`adapter_names`), prefixes of different length": several_in_a_batch,
    "two adapters at once": several_at_once,
    "`disable_adapter()`: the base model's logits, bit for bit": disabled,
    "saved and loaded: the same parameters, bit for bit, and logits to 1e-5 of the largest": saved,
}


def outcome(check: Callable[[Method], None], method: Method) -> str:
    """``works``, or the reason why not."""
    try:
        check(method)
    except Exception as error:  # whatever it is, it is the finding
        lines = [line for line in str(error).splitlines() if line.strip()]
        text = (lines or [""])[0].strip()
        return text if type(error) is AssertionError and text else f"{type(error).__name__}: {text}"
    return "works"


def measure() -> dict[str, object]:
    found = {row: {m.name: outcome(check, m) for m in (Ours, Theirs)} for row, check in ROWS.items()}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
    return {"versions": versions, "rows": found}


def page(record: dict) -> str:
    """The table in Markdown."""
    names = [Ours.name, Theirs.name]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines = [
        "# Prefix-Tuning inside the softmax: what works",
        "",
        "Written by `python experiments/inside_table.py`, which runs every row with both on tiny random models in fp32",
        f"on a CPU ({versions}). A cell that does not say works holds what the run raised, or in",
        "what its result was wrong. The record is [results/inside/table.json](../results/inside/table.json).",
        "",
        f"| | {' | '.join(names)} |",
        "|---|---|---|",
    ]
    for row, cells in record["rows"].items():
        shown = (cells[name].replace("|", "\\|") for name in names)
        lines.append(f"| {row} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    record = measure()
    write_json(RECORD, record)
    PAGE.write_text(page(record))
    print(page(record))


if __name__ == "__main__":
    main()
