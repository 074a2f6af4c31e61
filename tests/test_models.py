"""The model matrix: a sample of types in process, its checks can fail, and docs/models.md says what the records say."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import peft
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # experiments is no installed package

from experiments.models import __main__ as command
from experiments.models import checks, records, report
from experiments.models.base import ask_base
from experiments.models.kinds import CAUSAL_LM, KINDS, LONG, build_case, by_name
from experiments.models.running import Failed, logits

from prefixmemory import PrefixMemoryConfig
from prefixmemory.kernels.read import read
from prefixmemory.tuner import plan
from prefixmemory.tuner.activation import activation

#: One of each way to write attention: separate and fused projections, grouped keys, ALiBi, gates, sinks, latent
#: attention, sliding and chunked windows, shared keys and values, experts, hybrids, decoders of encoder-decoders.
SAMPLE = (
    *("llama", "gpt2", "gpt_neox", "gptj", "opt", "bloom", "falcon", "mpt", "gpt_bigcode", "bert", "bart", "whisper"),
    *("phi3", "gemma2", "gemma3n_text", "gemma4_text", "gpt_oss", "mixtral", "deepseek_v3", "deepseek_v4"),
    *("qwen3_next", "jamba", "minimax", "llama4_text", "modernbert-decoder"),
)
OTHER_KINDS = {
    "encoders": "deberta-v2",
    "encoder-decoders": "t5",
    "speech-to-text": "whisper",
    "vision": "swin",
    "vision-language": "qwen2_5_vl",
    "speech": "wav2vec2",
}


def test_the_sample_has_25_types_and_every_kind() -> None:
    assert len(set(SAMPLE)) == 25 and set(SAMPLE) <= set(CAUSAL_LM.types)
    assert {CAUSAL_LM.name, *OTHER_KINDS} == {kind.name for kind in KINDS}


@pytest.mark.parametrize(
    ("kind", "model_type"), [(CAUSAL_LM.name, t) for t in SAMPLE] + list(OTHER_KINDS.items()), ids=str
)
@pytest.mark.parametrize("method", ["memory", checks.BLOCKS])
def test_memory_passes(kind: str, model_type: str, method: str) -> None:
    facts = ask_base(by_name(kind), model_type)
    assert facts.attends
    outcome = checks.ask_method(by_name(kind), model_type, method, facts)
    assert outcome["failed"] == {}
    asked = {"attach", *checks.CHECKS} - outcome["not_applicable"].keys()
    assert set(outcome["passed"]) == asked
    assert {"attach", "zero start", "every layer", "acts", "gradients", "reload", "disable", "step"} <= asked
    assert "silent front" in asked or "refused" not in outcome["not_applicable"]["silent front"]


@pytest.mark.parametrize(("kind", "model_type"), [(CAUSAL_LM.name, "llama"), ("encoder-decoders", "t5")], ids=str)
def test_a_prefix_inside_passes(kind: str, model_type: str) -> None:
    outcome = checks.ask_method(by_name(kind), model_type, checks.INSIDE, ask_base(by_name(kind), model_type))
    assert outcome["failed"] == {}
    assert {"attach", "every layer", "acts", "gradients", "generate", "padding", "reload"} <= set(outcome["passed"])


def test_a_type_that_refuses_a_prefix_inside_has_not_failed() -> None:
    outcome = checks.ask_method(CAUSAL_LM, "diffllama", checks.INSIDE, ask_base(CAUSAL_LM, "diffllama"))
    assert outcome["failed"] == {} and "value heads" in outcome["not_applicable"]["attach"]


def test_attention_is_seen_where_it_is_computed_and_nowhere_else() -> None:
    assert ask_base(CAUSAL_LM, "mixtral").attends == [f"model.layers.{i}.self_attn" for i in range(2)]  # no router
    assert ask_base(CAUSAL_LM, "jamba").attends == ["model.layers.1.self_attn"]  # not the Mamba layer
    assert ask_base(CAUSAL_LM, "mamba").attends == []


def subject(model_type: str = "llama", fill: bool = True, **config: object) -> checks.Subject:
    """A memory on a type, as the checks get it."""
    base = build_case(CAUSAL_LM, model_type)
    batch = CAUSAL_LM.inputs(base.config, 2, LONG)
    modules = {name for name, _ in base.named_modules() if name}
    with torch.no_grad():
        base_logits = logits(base, batch, model_type)
    full = PrefixMemoryConfig(task_type="CAUSAL_LM", **{"rank": None, **config})  # one parameter a layer
    model = peft.get_peft_model(base, full).eval()
    if fill:
        checks.fill(model)
    facts = ask_base(CAUSAL_LM, model_type)
    return checks.Subject(CAUSAL_LM, model_type, "memory", facts, base, base_logits, batch, model, modules)


def fails(check: str, on: checks.Subject) -> str:
    """What the check says; an error if it passes."""
    with pytest.raises(Failed) as error, torch.no_grad():
        checks.CHECKS[check](on)
    return str(error.value)


def test_a_layer_without_a_memory_fails() -> None:
    assert "no memory in 1 of 2" in fails("every layer", subject(layers_to_transform=[0]))


def test_a_block_without_a_memory_fails() -> None:
    asked = subject(feed_forward=2, exclude_modules=r".*layers\.1\.mlp\.\w+")
    asked.method = checks.BLOCKS
    assert "in a feed-forward block beside model.layers.1.self_attn" in fails("every layer", asked)


def test_a_memory_that_speaks_too_early_or_never_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong, said in ((-1, "in front of the token"), (99, "stays silent")):
        with monkeypatch.context() as patch:
            patch.setattr(checks, "activation", lambda places, by=wrong: activation([place + by for place in places]))
            assert said in fails("silent front", subject())


def test_a_memory_that_does_nothing_fails() -> None:
    assert "leaves the logits" in fails("acts", subject(fill=False))


def test_a_memory_that_changes_the_base_model_fails() -> None:
    assert "changes the logits" in fails("zero start", subject(fill=True))


def test_the_rotated_query_fails_padding() -> None:
    assert "padded row" in fails("padding", subject(query="rotary"))


def test_a_memory_that_cached_steps_skip_fails_generate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "read", lambda query, own, *rest: read(query, own, *rest) if query.shape[1] > 1 else own)
    assert "logits of new token 2 with cache differ" in fails("generate", subject())


def test_a_memory_without_gradient_fails() -> None:
    asked = subject()
    output_projection = asked.base.model.layers[1].self_attn.o_proj
    output_projection.register_forward_pre_hook(lambda module, args: (args[0].detach(),))
    assert "1 of 2 parameters, model.layers.1.self_attn.prefix_memory" in fails("gradients", asked)


def test_a_parameter_that_stays_and_a_base_that_moves_fail_step() -> None:
    asked = subject()
    asked.base.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda module, args: (args[0].detach(),))
    assert "1 parameters did not move" in fails("step", asked)
    asked = subject()
    weight = asked.base.model.norm.weight
    asked.model.register_forward_pre_hook(lambda *_: weight.data.add_(0.1).sum().item() and None)
    assert "model.norm.weight of the base model moved" in fails("step", asked)


def test_another_adapter_on_disk_fails_reload(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = subject()
    save = asked.model.save_pretrained

    def save_another(folder: str) -> None:
        with torch.no_grad():
            for parameter in checks.adapter(asked.model).values():
                parameter.add_(0.1)
        save(folder)

    monkeypatch.setattr(asked.model, "save_pretrained", save_another)
    assert "other parameters" in fails("reload", asked)


def test_another_base_under_the_adapter_fails_reload(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = subject()

    def another(kind: object, model_type: str) -> torch.nn.Module:
        base = build_case(CAUSAL_LM, model_type)
        with torch.no_grad():  # the fingerprint, which would refuse it, is of the input embeddings
            base.model.layers[0].mlp.down_proj.weight.view(-1)[0] += 0.1
        return base

    monkeypatch.setattr(checks, "build_case", another)
    assert "other logits" in fails("reload", asked)


def record(**failed: str) -> dict[str, object]:
    outcome = {"passed": ["attach"], "failed": {}, "not_applicable": {}}
    return {
        "type": "somemodel",
        "date": "2026-01-02",
        "commit": "abc",
        "versions": {"torch": "1"},
        "base": {"class": "SomeModel", "attends": ["a", "b"], "cannot": {"generate": "the base model: it cannot"}},
        "methods": {
            "memory": {**outcome, "failed": failed},
            checks.BLOCKS: outcome,
            "LoRA": outcome,
            "PREFIX_TUNING": {**outcome, "failed": {"acts": "a|b", "step": "no"}},
        },
    }


def test_a_failing_record_gives_a_row_with_the_check_and_the_reason() -> None:
    row = report.row(record(padding="logits of a padded row differ by 3"))
    assert row == (
        "| somemodel | 2 | **no**: padding: logits of a padded row differ by 3 | works | works | "
        "**no**: acts: a\\|b (and 1 more) | generate: it cannot |"
    )


def test_what_was_not_checked_does_not_work() -> None:
    assert report.cell(None) == "not measured"
    assert "no" in report.cell({"passed": [], "failed": {}, "not_applicable": {"gradients": "the base model: no"}})


def test_types_without_attention_or_not_run_count_for_none() -> None:
    blind = record() | {"type": "blind"}
    blind["base"] = {"class": "Blind", "attends": [], "cannot": {}}
    absent = {k: v for k, v in record().items() if k != "base"} | {"type": "absent", "not_run": "it has no weights"}
    text = report.text({CAUSAL_LM.name: {"a": record(), "b": blind, "c": absent}})
    assert "Of the 3 causal-LM types, 1 have softmax attention" in text
    assert "- blind: not refused" in text
    assert "- absent: it has no weights" in text
    assert "| blind |" not in text and "| absent |" not in text


def test_a_process_that_dies_or_hangs_is_recorded_and_the_walk_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(kind: str, model_type: str, method: str) -> dict[str, object]:
        if model_type == "dies":
            os._exit(3)
        if model_type == "hangs":
            time.sleep(600)
        return {"outcome": {"passed": ["attach"], "failed": {}, "not_applicable": {}}}

    monkeypatch.setattr(command, "measure", measure)
    tasks = [("causal-lm", name, "memory") for name in ("dies", "hangs", "lives")]
    results = {task[1]: result for task, result in command.walk(tasks, jobs=2, limit=2)}
    assert results["dies"]["outcome"]["failed"] == {"attach": "the process died with exit code 3"}
    assert results["hangs"]["outcome"]["failed"] == {"attach": "no answer within 2 s"}
    assert results["lives"]["outcome"]["passed"] == ["attach"]


def test_a_rerun_replaces_its_record_and_leaves_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(records, "FOLDER", tmp_path)
    base = {"class": "C", "attends": ["a"], "cannot": {}}
    for model_type, method, passed in (("b", "memory", "x"), ("a", "memory", "y"), ("a", "LoRA", "z")):
        outcome = {"passed": [passed], "failed": {}, "not_applicable": {}}
        records.put("causal-lm", model_type, method, {"base": base, "outcome": outcome})
    other = records.read("causal-lm")["b"]
    assert records.has("causal-lm", "a", "LoRA") and not records.has("causal-lm", "b", "LoRA")
    records.put("causal-lm", "a", "memory", {"outcome": {"passed": [], "failed": {"attach": "it died"}}})
    changed = records.read("causal-lm")
    assert changed["b"] == other and list(changed) == ["a", "b"]
    assert changed["a"]["methods"]["memory"]["failed"] == {"attach": "it died"}
    assert changed["a"]["methods"]["LoRA"]["passed"] == ["z"] and changed["a"]["base"] == base


def test_docs_agree_with_the_records() -> None:
    assert report.FILE.read_text(encoding="utf-8") == report.current()


def test_a_memory_that_waits_is_refused_by_types_that_compute_other_tokens_than_they_are_given() -> None:
    found = records.read(CAUSAL_LM.name)
    assert {name for name, r in found.items() if report.counted(r) and report._refused(r)} == {
        "blt", "jetmoe", "musicgen", "musicgen_melody", "prophetnet",
    }  # fmt: skip
    asked = [r["methods"][checks.BLOCKS] for r in found.values() if report.counted(r)]
    assert sum("silent front" in outcome["passed"] for outcome in asked) >= 170


def test_memories_reach_the_target() -> None:
    kept = [r for r in records.read(CAUSAL_LM.name).values() if report.counted(r)]
    right = {method: sum(report.works(r["methods"][method]) for r in kept) for method in report.METHODS}
    assert len(kept) >= 175
    assert min(right["memory"], right[checks.BLOCKS]) >= 0.95 * len(kept)
    assert right["memory"] >= right["LoRA"]
