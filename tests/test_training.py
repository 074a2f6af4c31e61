"""The recipe and its parts: rows to text, text to tensors, the loss, answers, records."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.nn import functional
from transformers import TrainingArguments

import tiny
from close import close_training
from prefixmemory import PrefixMemoryConfig, PrefixMemoryError
from prefixmemory.files.records import RECORD, provenance, write_json
from prefixmemory.models.logits import contiguous_logits_input
from prefixmemory.rows.collator import LeftPaddingCollator
from prefixmemory.rows.data import read_rows
from prefixmemory.rows.encoding import IGNORED, tokenize
from prefixmemory.rows.rendering import Example, classification_prompt, render
from prefixmemory.rows.rows import labels_of
from prefixmemory.scoring.generation import accuracy, answers, first_line
from prefixmemory.training.job import TrainingJob
from prefixmemory.training.loop import train
from prefixmemory.training.methods import attach, method_config
from prefixmemory.training.output import Output
from prefixmemory.training.run import run_training
from prefixmemory.training.settings import TrainingSettings

TOKENIZER = tiny.tokenizer()
BARE = tiny.tokenizer(chat=False)
#: Prompts and completions of unlike lengths, so that every batch is padded.
EXAMPLES = [
    Example("Text: " + "ab" * (1 + 3 * i % 7) + "\nLabel:", f" {'xyz'[i % 3] * (1 + i % 4)}<eos>") for i in range(8)
]


def adapted(fill: bool = False, **config: Any) -> nn.Module:
    if fill:
        return tiny.with_memory(tiny.build(), **config)
    return get_peft_model(tiny.build(), PrefixMemoryConfig(task_type="CAUSAL_LM", **config))


def completion_loss(model: nn.Module, examples: list[Example]) -> float:
    """Mean negative log-likelihood of the completions' tokens, one example at a time, without padding."""
    total, count = 0.0, 0
    for example in examples:
        prompt = TOKENIZER(example.prompt)["input_ids"]
        completion = TOKENIZER(example.completion)["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + completion])).logits[0]
        predicted = logits[len(prompt) - 1 : -1]
        total += float(functional.cross_entropy(predicted, torch.tensor(completion), reduction="sum"))
        count += len(completion)
    return total / count


# Rows to text

QUESTION = {"role": "user", "content": "why?"}
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}, QUESTION]


@pytest.mark.parametrize("tokenizer", [TOKENIZER, BARE], ids=["chat", "bare"])
def test_a_label_row_is_rendered_the_same_with_and_without_chat_template(tokenizer):
    assert render([{"text": "my line is dead", "label": "no connection"}], tokenizer) == [
        Example("Text: my line is dead\nLabel:", " no connection<eos>")
    ]


def test_prompt_and_completion_are_rendered_by_the_chat_template_where_there_is_one():
    rows = [{"prompt": "why?", "completion": "so."}]
    assert render(rows, TOKENIZER) == [Example("<|user|>why?<eos><|assistant|>", "so.<eos>")]
    assert render(rows, BARE) == [Example("why?", "so.<eos>")]


def test_messages_are_rendered_by_the_chat_template_and_only_the_last_answer_is_the_completion():
    rows = [{"messages": [*CHAT, {"role": "assistant", "content": "so."}]}]
    assert render(rows, TOKENIZER) == [
        Example("<|user|>hi<eos><|assistant|>hello<eos><|user|>why?<eos><|assistant|>", "so.<eos>")
    ]


def test_messages_without_a_chat_template_are_refused():
    rows = [{"prompt": "a", "completion": "b"}, {"messages": [QUESTION, {"role": "assistant", "content": "so."}]}]
    with pytest.raises(PrefixMemoryError, match=r"Row 2 holds messages.*no chat template\. Use rows with"):
        render(rows, BARE)


def test_a_chat_template_that_asks_differently_from_how_it_answers_is_refused():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}", "{% if add_generation_prompt %}{{ 'answer:' }}"
    )
    with pytest.raises(PrefixMemoryError, match="cannot be told apart"):
        render([{"prompt": "a", "completion": "b"}], tokenizer)


def test_the_classification_prompt_lists_labels_only_when_asked_to():
    assert classification_prompt("x") == "Text: x\nLabel:"
    assert classification_prompt("x", ["a", "b"]) == "Choose one of these labels: a, b.\n\nText: x\nLabel:"
    assert labels_of([{"label": "b"}, {"label": "a"}, {"label": "b"}]) == ["a", "b"]


@pytest.mark.parametrize(
    "row",
    [
        {"text": "Grüße, “my” line", "label": "ü"},
        {"prompt": "a\nb", "completion": "c", "source": "further fields do not matter"},
        {"messages": [QUESTION, {"role": "assistant", "content": "so."}]},
    ],
)
def test_rows_are_read_as_they_were_written(tmp_path, row):
    file = tmp_path / "rows.jsonl"
    file.write_text(f"{json.dumps(row, ensure_ascii=False)}\n\n{json.dumps(row)}", encoding="utf-8")
    assert read_rows(file) == [row, row]


# Text to tensors


def test_only_completions_have_labels():
    for example, tokens in zip(EXAMPLES, tokenize(EXAMPLES, TOKENIZER, 100), strict=True):
        feature = tokens.feature
        kept = [token for token in feature["labels"] if token != IGNORED]
        assert TOKENIZER.decode(kept) == example.completion
        assert feature["labels"][-len(kept) :] == kept
        assert feature["input_ids"][-len(kept) :] == kept
        assert TOKENIZER.decode(feature["input_ids"]) == example.prompt + example.completion


def test_a_prompt_that_is_too_long_loses_its_beginning():
    example = Example("0123456789", "ab<eos>")
    for max_length, prompt in ((13, "0123456789"), (12, "123456789"), (5, "89"), (4, "9")):
        (tokens,) = tokenize([example], TOKENIZER, max_length)
        assert TOKENIZER.decode(tokens.feature["input_ids"]) == prompt + "ab<eos>"
        assert tokens.feature["labels"] == [IGNORED] * len(prompt) + TOKENIZER("ab<eos>")["input_ids"]
        assert tokens.cut == (prompt != example.prompt)


@pytest.mark.parametrize("max_length", [2, 3])
def test_a_completion_that_leaves_no_room_for_a_prompt_is_refused(max_length):
    examples = [Example("a", "b"), Example("0123456789", "ab<eos>")]
    with pytest.raises(
        PrefixMemoryError, match=rf"Row 2: the completion has 3 tokens, max_length is {max_length}\. Raise"
    ):
        tokenize(examples, TOKENIZER, max_length)


def test_the_collator_pads_on_the_left_and_counts_positions_from_the_first_token():
    features = [{"input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    batch = LeftPaddingCollator(0, crop_logits=False)(features)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [0, 0, 8]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2], [0, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [IGNORED, IGNORED, 8]]
    assert "logits_to_keep" not in batch


def test_cropped_logits_begin_where_the_longest_completion_is_predicted():
    features = [{"input_ids": [3, 4, 5, 6], "labels": [IGNORED, IGNORED, 5, 6]}, {"input_ids": [8], "labels": [8]}]
    batch = LeftPaddingCollator(0, crop_logits=True)(features)
    assert batch["logits_to_keep"] == 3
    assert batch["labels"].tolist() == [[IGNORED, 5, 6], [IGNORED, IGNORED, 8]]


# The loss


@pytest.mark.parametrize("crop_logits", [False, True])
def test_the_loss_is_that_of_the_completions_alone(crop_logits):
    model = adapted(fill=True)
    batch = LeftPaddingCollator(0, crop_logits)([one.feature for one in tokenize(EXAMPLES, TOKENIZER, 100)])
    with torch.no_grad():
        output = model(**batch)
    width = 1 + max(len(TOKENIZER(e.completion)["input_ids"]) for e in EXAMPLES) if crop_logits else None
    assert output.logits.shape[1] == (width or batch["input_ids"].shape[1])
    expected = completion_loss(model, EXAMPLES)
    assert abs(float(output.loss) - expected) < 1e-6 * max(1.0, expected)
    # The negative control: counting the prompts too gives another loss.
    everything = tokenize([Example("", e.prompt + e.completion) for e in EXAMPLES], TOKENIZER, 100)
    with torch.no_grad():
        other = model(**LeftPaddingCollator(0, crop_logits)([one.feature for one in everything])).loss
    assert abs(float(other) - expected) > 1e-2


def test_training_lowers_the_loss_of_the_completions(tmp_path):
    model = adapted(output_limit=None)
    base = {name: p.detach().clone() for name, p in model.named_parameters() if "prefix_memory" not in name}
    before = completion_loss(model.eval(), EXAMPLES)
    settings = TrainingSettings(learning_rate=0.3, epochs=15.0, batch_size=4)
    metrics = train(model, TOKENIZER, EXAMPLES, settings, tmp_path / "checkpoints")
    after = completion_loss(model.eval(), EXAMPLES)
    assert after < before - 0.2  # a random model of this size gives a memory little to work with
    assert after < metrics["train_loss"] < before  # the mean over the run
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters() if name in base)


def test_training_leaves_the_rows_as_they_are_and_repeats_itself(tmp_path):
    settings = TrainingSettings(epochs=2.0, batch_size=4, seed=3)
    weights = []
    for name in ("one", "two"):
        torch.manual_seed(0 if name == "one" else 1)  # the seed of the settings is the one that counts
        model = get_peft_model(tiny.build(), PrefixMemoryConfig(task_type="CAUSAL_LM"))
        train(model, TOKENIZER, list(EXAMPLES), settings, tmp_path / name)
        weights.append(tiny.memory_parameters(model))
    assert all(parameter.abs().max() > 0 for parameter in weights[0].values())
    close_training(weights[0], weights[1])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", 0.0),
        ("learning_rate", -1e-3),
        ("learning_rate", float("nan")),
        ("epochs", 0.0),
        ("epochs", -1.0),
        ("epochs", float("inf")),
        ("batch_size", 0),
        ("max_grad_norm", 0.0),
        ("max_length", 0),
        ("save_steps", -5),
        ("warmup", -0.1),
        ("warmup", 1.0),
        ("warmup", float("nan")),
        ("weight_decay", -0.1),
        ("weight_decay", float("nan")),
        ("seed", -1),
        ("seed", 2**32),
    ],
)
def test_training_settings_refuse_nonsense(name, value):
    with pytest.raises(PrefixMemoryError, match=f"{name}={value} is out of range: give a"):
        TrainingSettings(**{name: value})


def test_the_limits_of_training_settings_are_allowed():
    TrainingSettings(
        learning_rate=1e-9, epochs=0.01, batch_size=1, warmup=0.0, max_length=1, save_steps=1, seed=2**32 - 1
    )


# Answers


@pytest.fixture(scope="module")
def talker() -> nn.Module:
    """A tiny model that writes different texts for different prompts (random ones soon repeat one character)."""
    torch.manual_seed(0)
    model = tiny.build()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
        model.lm_head.weight[tiny.VOCABULARY - 26 :] = 0  # no ids beyond the tokenizer's
    return tiny.with_memory(model)


#: Of unlike lengths and in no order.
PROMPTS = ["what is this about?", "a", "the quick brown fox jumps over it", "hi there", "Z", "(1 + 2) * 3 =", "no."]


def test_the_tiny_model_answers_every_prompt_differently(talker):
    # Else the comparisons of answers below would show little.
    found = answers(talker, TOKENIZER, PROMPTS, 8)
    assert len(set(found)) == len(PROMPTS) and all(found)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_answers_do_not_depend_on_the_batch_size(talker, batch_size):
    assert answers(talker, TOKENIZER, PROMPTS, 8, batch_size=batch_size) == answers(talker, TOKENIZER, PROMPTS, 8)


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_a_shared_context_answers_as_if_it_were_written_into_each_prompt(talker, batch_size):
    context = "Text: dead\nLabel: a\n\n"
    shared = answers(talker, TOKENIZER, PROMPTS, 8, batch_size=batch_size, context=context)
    assert shared == answers(talker, TOKENIZER, [context + prompt for prompt in PROMPTS], 8)
    assert shared != answers(talker, TOKENIZER, PROMPTS, 8)  # the context does matter


def test_a_shared_context_works_where_the_base_model_says_not_to_cache(talker, monkeypatch):
    # As models do that were saved by a Trainer, which switches the cache off.
    context = "Text: dead\nLabel: a\n\n"
    expected = answers(talker, TOKENIZER, PROMPTS, 8, context=context)
    monkeypatch.setattr(talker.generation_config, "use_cache", False)
    assert answers(talker, TOKENIZER, PROMPTS, 8, context=context) == expected


def test_answers_keep_the_models_mode_and_report_progress(talker):
    done: list[int] = []
    talker.train()
    try:
        answers(talker, TOKENIZER, PROMPTS, 1, batch_size=3, progress=done.append)
        assert talker.training
    finally:
        talker.eval()
    assert done == [3, 3, 1]
    answers(talker, TOKENIZER, PROMPTS[:1], 1)
    assert not talker.training


def test_an_answer_is_the_first_line_that_is_not_empty():
    assert first_line("\n  \n no connection \nText: more") == "no connection"
    assert first_line(" \n") == ""


def test_accuracy_counts_exact_matches():
    assert accuracy(["a", "b", "C", "d "], ["a", "b", "c", "d"]) == 50.0
    with pytest.raises(ValueError, match="zip"):
        accuracy(["a"], ["a", "b"])


def test_making_the_logits_input_contiguous_changes_no_result_and_ends_with_its_context():
    model = adapted(fill=True)
    head = model.get_output_embeddings()
    ids = tiny.tokens(rows=3, length=9)
    seen: list[bool] = []
    watch = head.register_forward_pre_hook(lambda module, args: seen.append(args[0].is_contiguous()))

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=ids, logits_to_keep=4).logits

    before = logits()
    watch.remove()  # hooks run in the order of their making: watch again, after the one under test
    with contiguous_logits_input(model):
        watch = head.register_forward_pre_hook(lambda module, args: seen.append(args[0].is_contiguous()))
        torch.testing.assert_close(logits(), before, rtol=0, atol=1e-6)
    after = logits()
    assert seen == [False, True, False]  # the slice is not contiguous by itself, so there was something to do
    watch.remove()
    assert not head._forward_pre_hooks
    assert torch.equal(after, before)
    with pytest.raises(RuntimeError, match="boom"), contiguous_logits_input(model):
        raise RuntimeError("boom")
    assert not head._forward_pre_hooks


# Records and the run's folder


def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "run.json"
    write_json(file, {"a": 1})
    old = file.read_bytes()
    assert json.loads(old) == {"a": 1}
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(file, {"a": object()})
    assert file.read_bytes() == old

    real = Path.write_text

    def disk_full(self: Path, text: str, **kwargs: object) -> int:
        real(self, text[: len(text) // 2])
        raise OSError("no space left on device")

    def killed(self: Path, target: Path) -> None:
        raise OSError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", disk_full)
        with pytest.raises(OSError, match="no space left"):
            write_json(file, {"a": 2})
    assert file.read_bytes() == old

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(OSError, match="killed"):
            write_json(file, {"a": 2})
    assert file.read_bytes() == old
    write_json(file, {"a": "ü"})
    assert json.loads(file.read_text(encoding="utf-8")) == {"a": "ü"}


def test_provenance_names_commit_versions_and_hardware():
    found = provenance()
    assert found.keys() == {"commit", "python", "versions", "hardware", "threads"}
    assert found["commit"] is None or len(found["commit"].removesuffix("-dirty")) == 40
    assert found["versions"].keys() == {"prefixmemory", "torch", "transformers", "peft", "accelerate", "datasets"}
    assert found["versions"]["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["hardware"]
    json.dumps(found)


def test_a_run_leaves_adapter_and_record_and_gives_the_base_model_back(tmp_path):
    model = tiny.build()
    model.config.use_cache = True  # the Trainer switches it off
    modules = [name for name, _ in model.named_modules()]
    rows = [{"text": "ab" * (1 + i), "label": "xy"[i % 2]} for i in range(6)]
    settings = TrainingSettings(epochs=1.0, batch_size=4, save_steps=1)
    config = PrefixMemoryConfig(task_type="CAUSAL_LM", rank=2, target_modules=["self_attn"])
    output = Output(tmp_path / "memory")
    record = run_training(model, TrainingJob("some/model", TOKENIZER, rows, config, settings), output)
    # No checkpoints, nothing beside the folder.
    assert [path.name for path in tmp_path.iterdir()] == ["memory"]
    assert {path.name for path in output.folder.iterdir()} == {
        "adapter_model.safetensors", "adapter_config.json", "README.md", RECORD,
    }  # fmt: skip
    assert json.loads((output.folder / RECORD).read_text()) == record
    assert record["base_model"] == "some/model"
    assert record["config"]["rank"] == 2 and record["config"]["target_modules"] == ["self_attn"]
    assert record["settings"] == {**vars(settings)} and record["rows"] == 6
    assert record["trainable_parameters"] == 2 * 4 * (8 * 2 + 2 * 8)  # layers · heads · (A + B)
    assert record["memory_read"] == ("triton" if torch.cuda.is_available() else "torch (on cpu)")
    assert record["train_loss"] > 0 and record["train_seconds"] >= 0
    assert provenance().items() <= record.items()
    saved = json.loads((output.folder / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == "some/model"
    assert model.config.use_cache
    assert [name for name, _ in model.named_modules()] == modules


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_a_process_that_sees_several_gpus_trains_with_the_batches_of_its_settings(tmp_path, monkeypatch, objective):
    """The Trainer would run nn.DataParallel, and take a batch for each of them."""
    if objective == "dpo":
        pytest.importorskip("trl")
    start, seen = TrainingArguments.__post_init__, []

    def with_two(args):
        start(args)
        args._n_gpu = 2

    def look(trainer, *rest):
        seen.append((trainer.args.n_gpu, trainer.args.train_batch_size))
        raise RuntimeError("seen")

    monkeypatch.setattr(TrainingArguments, "__post_init__", with_two)
    monkeypatch.setattr("prefixmemory.training.run.fit", look)
    row = {"text": "ab", "label": "x"} if objective == "sft" else {"prompt": "a", "chosen": "b", "rejected": "c"}
    settings = TrainingSettings(objective=objective, batch_size=3)
    job = TrainingJob("some/model", TOKENIZER, [row], PrefixMemoryConfig(task_type="CAUSAL_LM"), settings)
    assert TrainingArguments(output_dir=str(tmp_path), per_device_train_batch_size=3).train_batch_size == 6
    with pytest.raises(RuntimeError, match="seen"):
        run_training(tiny.build(), job, Output(tmp_path / "memory"))
    assert seen == [(1, 3)]


HALFWAY = {"name": "lora", "r": 4, "target_modules": ["q_proj", "input_layernorm"]}  # PEFT refuses the second


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_a_method_that_is_refused_halfway_leaves_nothing_in_the_base_model(tmp_path, objective):
    """PEFT would take the next adapter for a second one, beside which it freezes nothing."""
    if objective == "dpo":
        pytest.importorskip("trl")
    row = {"text": "ab", "label": "x"} if objective == "sft" else {"prompt": "a", "chosen": "b", "rejected": "c"}
    model, settings = tiny.build(), TrainingSettings(objective=objective)
    modules = [name for name, _ in model.named_modules()]
    job = TrainingJob("some/model", TOKENIZER, [row], method_config(HALFWAY), settings)
    with pytest.raises(PrefixMemoryError, match=r"not supported"):
        run_training(model, job, Output(tmp_path / "lora"))
    assert [name for name, _ in model.named_modules()] == modules and not hasattr(model, "peft_config")
    adapted = attach(model, method_config({"feed_forward": 2}))
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained and all(".prefix_memory." in name for name in trained)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def group_of_one(tmp_path) -> Iterator[None]:
    """What a launcher of one process makes, and TRL for vLLM in the same process."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("ending", ["whole", "broken", "in a group"])
def test_a_run_gives_the_base_model_back_as_it_was(tmp_path, monkeypatch, request, ending):
    """Its weights, its mode, and without gradient checkpointing."""
    if ending == "in a group":
        request.getfixturevalue("group_of_one")
    model = tiny.build("gpt2").eval()
    modules, weights = list(model.modules()), {name: p.clone() for name, p in model.named_parameters()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules]
    method = {"name": "lora", "r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True, "modules_to_save": ["ln_f"]}
    settings = TrainingSettings(gradient_checkpointing=True, learning_rate=0.1)
    job = TrainingJob("some/model", TOKENIZER, [{"text": "ab", "label": "x"}] * 4, method_config(method), settings)
    if ending == "broken":
        monkeypatch.setattr("prefixmemory.training.run._save", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_training(model, job, Output(tmp_path / "lora"))
    else:
        run_training(model, job, Output(tmp_path / "lora"))
    assert list(model.modules()) == modules and not any(module.training for module in model.modules())
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert not model.is_gradient_checkpointing
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules] == hooks


def test_a_preference_run_gives_the_base_model_its_dropout_back(tmp_path):
    """TRL switches it off."""
    pytest.importorskip("trl")
    model, seen = tiny.build("gpt2"), []
    dropouts = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    for module in dropouts:
        module.p = 0.1
        module.register_forward_hook(lambda module, *_: seen.append(module.p))
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 4
    config = PrefixMemoryConfig(task_type="CAUSAL_LM")
    run_training(
        model,
        TrainingJob("some/model", TOKENIZER, rows, config, TrainingSettings(objective="dpo")),
        Output(tmp_path / "m"),
    )
    assert dropouts and {module.p for module in dropouts} == {0.1}
    assert set(seen) == {0.0}  # the control


def test_biases_of_the_base_model_are_not_trained():
    with pytest.raises(PrefixMemoryError, match=r"method\.bias='all' trains the base model's own biases"):
        method_config({"name": "lora", "bias": "all"})


def test_a_failed_run_gives_the_base_model_back(tmp_path):
    model = tiny.build()
    modules = [name for name, _ in model.named_modules()]
    rows = [{"text": "ab", "label": "x" * 50}]
    config = PrefixMemoryConfig(task_type="CAUSAL_LM")
    job = TrainingJob("some/model", TOKENIZER, rows, config, TrainingSettings(max_length=20))
    with pytest.raises(PrefixMemoryError, match="max_length"):
        run_training(model, job, Output(tmp_path / "memory"))
    assert [name for name, _ in model.named_modules()] == modules
    assert not list(tmp_path.iterdir())
