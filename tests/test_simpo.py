"""SimPO: its loss is the paper's formula, and a run from the command line learns which answers are preferred."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, PrefixTuningConfig
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM, Trainer

import tiny
from close import close_logits
from command_line import call, files_of, jsonl, save_talker, weights, work_in_copy
from prefixmemory import PrefixMemoryConfig
from prefixmemory.errors import PrefixMemoryError
from prefixmemory.rows.rows import check_objective
from prefixmemory.training.job import TrainingJob
from prefixmemory.training.loop import training_arguments
from prefixmemory.training.methods import method_config
from prefixmemory.training.preferences import preference_trainer
from prefixmemory.training.settings import TrainingSettings

pytest.importorskip("trl")

# TRL 1.16 switches gradient checkpointing on and off under the names that transformers 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings(r"ignore:`gradient_checkpointing(_\w+)?` is deprecated:FutureWarning")

TOKENIZER = tiny.tokenizer()
#: Answers of unlike lengths, so that batches are padded and the length of an answer matters.
PAIRS = [
    {"prompt": f"how is {i}?", "chosen": "well" + "!" * (5 * (i % 3)), "rejected": "bad" + "?" * (i % 2)}
    for i in range(12)
]


def asked(prompt: str) -> str:
    return f"<|user|>{prompt}<eos><|assistant|>"


def likelihood(model: torch.nn.Module, prompt: str, answer: str) -> tuple[float, int]:
    """Log-likelihood of ``answer`` and its end, one row alone, without padding; and the number of its tokens."""
    ids, count = TOKENIZER(f"{prompt}{answer}<eos>")["input_ids"], len(TOKENIZER(f"{answer}<eos>")["input_ids"])
    with torch.no_grad():
        scores = log_softmax(model(input_ids=torch.tensor([ids])).logits[0], -1)
    return sum(float(scores[i - 1, ids[i]]) for i in range(len(ids) - count, len(ids))), count


def formula(model: torch.nn.Module, rows: list[dict[str, str]], beta: float, gamma: float, mean: bool = True) -> float:
    """Equation 6 of SimPO (arXiv 2405.14734): -log sigmoid(beta/|y_w| log p(y_w) - beta/|y_l| log p(y_l) - gamma)."""
    total = 0.0
    for row in rows:
        (chosen, n_chosen), (rejected, n_rejected) = (
            likelihood(model, asked(row["prompt"]), row[name]) for name in ("chosen", "rejected")
        )
        if not mean:
            n_chosen = n_rejected = 1
        margin = beta * chosen / n_chosen - beta * rejected / n_rejected - gamma
        total += math.log1p(math.exp(-margin))
    return total / len(rows)


def make(
    tmp_path: Path, settings: TrainingSettings, config: PeftConfig | None = None, rows: list[dict[str, str]] = PAIRS
) -> Trainer:
    config = config or PrefixMemoryConfig(task_type="CAUSAL_LM")
    arguments = training_arguments(settings, tmp_path, evaluates=True) | {"logging_steps": 1}
    job = TrainingJob("base", TOKENIZER, rows, config, settings, rows[-2:])
    return preference_trainer(tiny.build(), job, arguments)


CONFIGS = {
    "memory": PrefixMemoryConfig(task_type="CAUSAL_LM"),
    "lora": LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=2),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("given", [{}, {"beta": 3.0}, {"beta": 1.0, "simpo_gamma": 0.1}, {"simpo_gamma": 0.0}])
def test_the_loss_of_the_first_step_is_the_formula(tmp_path, name, given):
    beta = given.get("beta", 2.0)
    gamma = given.get("simpo_gamma", beta / 2)
    settings = TrainingSettings(objective="simpo", batch_size=12, epochs=1, **given)
    assert (settings.reward_scale, settings.reward_margin) == (beta, gamma)
    trainer = make(tmp_path, settings, CONFIGS[name])
    trainer.train()
    found = trainer.state.log_history[0]["loss"]
    base = tiny.build()  # what an untrained adapter answers like
    assert found == pytest.approx(formula(base, PAIRS, beta, gamma), abs=1e-4)
    # the check sees margin, scale and length
    assert abs(found - formula(base, PAIRS, beta, gamma + 0.1)) > 0.01
    assert abs(found - formula(base, PAIRS, beta + 0.5, gamma)) > 0.003
    assert abs(found - formula(base, PAIRS, beta, gamma, mean=False)) > 0.1


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_of_the_adapter_moves_and_nothing_else(tmp_path, name):
    settings = TrainingSettings(objective="simpo", batch_size=4, epochs=8, learning_rate=0.02)
    trainer = make(tmp_path, settings, CONFIGS[name])
    before = {key: value.detach().clone() for key, value in trainer.model.named_parameters()}
    ids = tiny.tokens()
    with torch.no_grad(), trainer.model.eval().disable_adapter():
        base = trainer.model(input_ids=ids).logits
    close_logits(base, tiny.build()(input_ids=ids).logits.detach())
    trainer.train()
    trained = {key for key, value in trainer.model.named_parameters() if value.requires_grad}
    assert trained
    for key, value in trainer.model.named_parameters():
        if not key.endswith(".mean"):  # taken from the first batch
            assert torch.equal(value, before[key]) != (key in trained), key
    model = trainer.model.eval()
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(input_ids=ids).logits, base)
    after = formula(model, PAIRS, 2.0, 1.0)
    assert after < formula(tiny.build(), PAIRS, 2.0, 1.0) - 0.2
    assert trainer.evaluate()["eval_loss"] == pytest.approx(formula(model, PAIRS[-2:], 2.0, 1.0), abs=1e-4)


def test_long_prompts_lose_their_beginning_and_no_row_is_dropped(tmp_path):
    rows = [{**row, "prompt": "x" * (3 * i) + f"end {i}?"} for i, row in enumerate(PAIRS)]
    trainer = make(tmp_path, TrainingSettings(objective="simpo", max_length=28, batch_size=4), rows=rows)
    for dataset, expected in ((trainer.train_dataset, rows), (trainer.eval_dataset, rows[-2:])):
        assert len(dataset) == len(expected)
        for feature, row in zip(dataset, expected, strict=True):
            whole = {name: TOKENIZER(f"{row[name]}<eos>")["input_ids"] for name in ("chosen", "rejected")}
            kept = min(28 - max(map(len, whole.values())), len(TOKENIZER(asked(row["prompt"]))["input_ids"]))
            prompt = TOKENIZER(asked(row["prompt"]))["input_ids"][-kept:]
            for name, answer in whole.items():  # the same prompt for both
                assert feature[f"{name}_input_ids"] == prompt + answer
                assert feature[f"{name}_labels"] == [-100] * len(prompt) + answer
                assert feature[f"{name}_attention_mask"] == [1] * len(prompt + answer)
    assert {len(feature["chosen_input_ids"]) < 28 for feature in trainer.train_dataset} == {True, False}


# From the command line


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    save_talker(folder / "base")
    jsonl(folder / "pairs.jsonl", PAIRS)
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return work_in_copy(made, tmp_path, monkeypatch)


def words(*more: object) -> list[str]:
    common = ["train", "--model", "base", "--data", "pairs.jsonl", "--output", "adapter", "--dtype", "float32"]
    return [*common, "--objective", "simpo", *map(str, more)]


@pytest.mark.parametrize("method", ["prefix_memory", "lora", "prefix_tuning"])
def test_preferences_are_learned_from_the_command_line(place, method):
    more = ["--set", "method.num_virtual_tokens=4"] if method == "prefix_tuning" else []
    before = files_of(place / "base")
    call(*words("--method", method, "--learning-rate", 0.02, "--epochs", 4, "--batch-size", 4, *more)).success  # noqa: B018
    assert files_of(place / "base") == before and not list(place.glob("*.partial"))
    left = json.loads(Path("adapter", "run.json").read_text())
    assert left["settings"]["objective"] == "simpo" and left["row_format"] == "preference"
    assert all(tensor.abs().max() > 0 for tensor in weights(Path("adapter")).values())
    base = AutoModelForCausalLM.from_pretrained("base")
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "adapter").eval()
    assert formula(adapted, PAIRS, 2.0, 1.0) < formula(base, PAIRS, 2.0, 1.0) - 0.05


def test_the_settings_can_be_given(place):
    set_ = ("--set", "training.beta=2.5", "--set", "training.simpo_gamma=0.75", "--epochs", 1)
    call(*words(*set_)).success  # noqa: B018
    left = json.loads(Path("adapter", "run.json").read_text())["settings"]
    assert (left["beta"], left["simpo_gamma"]) == (2.5, 0.75)


@pytest.mark.parametrize(
    ("more", "phrases"),
    [
        (("--set", "training.simpo_gamma=-1"), ["training.simpo_gamma=-1", "from 0 on"]),
        (("--set", "training.beta=0"), ["training.beta=0", "above 0"]),
        (("--set", "training.simpo_gama=1"), ["simpo_gama", "'simpo_gamma'?"]),
        (("--objective", "dpo", "--set", "training.simpo_gamma=1"), ["simpo_gamma=1", "needs objective='simpo'"]),
        (("--objective", "smpo"), ["training.objective='smpo'", "'simpo'?"]),
        (
            ("--method", "prompt_tuning", "--learning-rate", 1e-3, "--set", "method.num_virtual_tokens=4"),
            ["method.name='prompt_tuning'", "objective='dpo'"],
        ),
    ],
)
def test_what_is_wrong_is_one_line(place, more, phrases):
    message = call(*words(*more)).refusal
    for phrase in phrases:
        assert phrase in message, message


def test_the_defaults_are_those_of_the_objective():
    for objective in ("sft", "dpo", "kto"):
        assert TrainingSettings(objective=objective).reward_scale == 0.1
    settings = TrainingSettings(objective="simpo")
    assert (settings.reward_scale, settings.reward_margin) == (2.0, 1.0)
    given = TrainingSettings(objective="simpo", beta=0.1, simpo_gamma=0.0)
    assert (given.reward_scale, given.reward_margin) == (0.1, 0.0)


def test_rows_without_pairs_are_refused():
    with pytest.raises(PrefixMemoryError, match=r"objective='simpo' needs rows with \['prompt', 'chosen'"):
        check_objective("simpo", [{"prompt": "a", "completion": "b", "label": True}])
    check_objective("simpo", PAIRS)


def test_a_method_with_virtual_tokens_of_its_own_layers_is_not_refused(tmp_path):
    config = method_config({"name": "prefix_tuning", "num_virtual_tokens": 4})
    assert isinstance(config, PrefixTuningConfig)
    trainer = make(tmp_path, TrainingSettings(objective="simpo", batch_size=12, epochs=1), config)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] > 0
