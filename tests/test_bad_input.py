"""Bad input: one line that names the value and the fix, exit code 1, and nothing on disk is touched."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import MambaConfig, MambaForCausalLM, TrainerCallback
from transformers.utils import logging

import tiny
from close import close_training
from command_line import Answer
from prefixmemory import PrefixMemoryConfig, PrefixMemoryError
from prefixmemory.rows.rendering import Example
from prefixmemory.training.loop import train
from prefixmemory.training.settings import TrainingSettings
from prefixmemory_cli import main

ROWS = [{"text": f"line {i} is dead", "label": "ab"[i % 2]} for i in range(8)]
SETTINGS = ("--batch-size", "4", "--epochs", "2", "--save-steps", "2", "--dtype", "float32")
SETTINGS = (*SETTINGS, "--set", "method.feed_forward=null", "--set", "method.active_from=start")  # heads alone
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"

Refuse = Callable[..., str]
Change = Callable[[Path], None]


def jsonl(*rows: object) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file below ``folder`` with its bytes and the time it was written; empty folders too."""
    return {
        str(path.relative_to(folder)): (path.read_bytes() if path.is_file() else b"", path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
    }


def call_main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> Answer:
    monkeypatch.setattr(sys, "argv", ["prefixmemory", *map(str, words)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main()
    captured = capsys.readouterr()
    return Answer(int(exit_.value.code or 0), captured.out, captured.err)


class FailAt(TrainerCallback):
    """Training dies in its second step, as it would for want of memory."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise RuntimeError("out of memory")


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, data, a finished run ``done`` and an interrupted one, ``stopped.partial``."""
    folder = tmp_path_factory.mktemp("made")
    tiny.save_tiny(folder / "base")
    (folder / "good.jsonl").write_bytes(jsonl(*ROWS))
    words = ["prefixmemory", "train", "--model", str(folder / "base"), "--data", str(folder / "good.jsonl"), *SETTINGS]
    verbosity = logging.get_verbosity()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*words, "--output", str(folder / "done")])
        with pytest.raises(SystemExit, match="0"):
            main()
        patch.setattr("prefixmemory.training.run.show_progress", lambda console: FailAt())
        patch.setattr(sys, "argv", [*words, "--output", str(folder / "stopped"), "--save-steps", "1"])
        with pytest.raises(RuntimeError, match="out of memory"):
            main()
    logging.set_verbosity(verbosity)
    assert (folder / "done" / WEIGHTS).is_file()
    assert (folder / "stopped.partial" / "checkpoints" / "checkpoint-1").is_dir()
    return folder


@pytest.fixture
def place(made_once: Path, tmp_path: Path) -> Path:
    """A copy of these for one test; the base model stays where it is, as no command writes to it."""
    for name in ("done", "stopped.partial"):
        shutil.copytree(made_once / name, tmp_path / name)
    shutil.copy2(made_once / "good.jsonl", tmp_path / "good.jsonl")
    return tmp_path


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Answer]]:
    verbosity = logging.get_verbosity()
    yield lambda *words: call_main(monkeypatch, capsys, *words)
    logging.set_verbosity(verbosity)  # the command line silences libraries for its process


@pytest.fixture
def refuse(cli: Callable[..., Answer], place: Path) -> Refuse:
    """Run a command that must fail; checks everything but the words, and returns the message."""

    def run(*words: object) -> str:
        before = contents(place)
        answer = cli(*words)
        assert answer.code == 1
        assert answer.out == ""
        assert answer.remarks.startswith("error: ")
        assert answer.remarks.count("\n") == 1 and answer.remarks.endswith("\n")
        assert contents(place) == before
        return answer.remarks

    return run


@pytest.fixture
def refuse_train(refuse: Refuse, made_once: Path, place: Path) -> Refuse:
    """``prefixmemory train`` with good values for all that is not given."""

    def run(*words: object, model: object = None, data: object = None, output: object = None) -> str:
        return refuse(
            "train", "--model", model or made_once / "base", "--data", data or place / "good.jsonl",
            "--output", output or place / "new", *SETTINGS, *words,
        )  # fmt: skip

    return run


def test_the_commands_that_the_tests_spoil_work_unspoilt(cli, made_once, place):
    # Without this, every refusal below could have another reason.
    words = ("--model", made_once / "base", "--data", place / "good.jsonl", "--output", place / "new", *SETTINGS)
    answer = cli("train", *words)
    assert answer.code == 0 and answer.remarks == ""
    assert str(place / "new") in answer.out and "8 rows" in answer.out
    answer = cli("generate", "--adapter", place / "done", "--prompt", "Text: x\\nLabel:", "--max-new-tokens", "2")
    assert answer.code == 0 and answer.remarks == ""
    assert [line.partition(":")[0] for line in answer.out.splitlines()] == ["base model", "with memory"]


# The model


def test_a_model_without_softmax_attention_is_refused(refuse_train, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mamba")
    config = MambaConfig(vocab_size=tiny.VOCABULARY, hidden_size=16, num_hidden_layers=1, state_size=4, pad_token_id=0)
    MambaForCausalLM(config).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    message = refuse_train(model=folder)
    assert "MambaForCausalLM has no softmax self-attention" in message
    assert "Use a transformer with softmax attention" in message


def test_a_target_pattern_that_matches_nothing_is_refused():
    model = tiny.build()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(PrefixMemoryError, match=r"target_modules=\['self_atn'\] matches no attention module") as raised:
        get_peft_model(model, PrefixMemoryConfig(task_type="CAUSAL_LM", target_modules=["self_atn"]))
    assert "Did you mean 'self_attn'?" in str(raised.value)
    assert [name for name, _ in model.named_modules()] == names


def test_a_model_with_nothing_to_train_is_refused(tmp_path):
    model = tiny.with_memory(tiny.build())
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(PrefixMemoryError, match=r"no trainable parameters.*is_trainable=True"):
        train(model, tiny.tokenizer(), [Example("a", "b")], TrainingSettings(), tmp_path / "checkpoints")
    assert not list(tmp_path.iterdir())


def test_a_model_that_does_not_exist_is_refused(refuse_train, place):
    message = refuse_train(model=place / "nowhere")
    assert repr(str(place / "nowhere")) in message
    assert "cannot be loaded" in message and "Give a folder that holds a transformers model" in message


def test_a_folder_without_a_model_is_refused(refuse_train, tmp_path_factory):
    folder = tmp_path_factory.mktemp("empty")
    message = refuse_train(model=folder)
    assert repr(str(folder)) in message and "cannot be loaded" in message


@pytest.mark.parametrize("keep", [0.5, 0.0])
def test_a_truncated_base_model_is_refused(refuse_train, made_once, tmp_path_factory, keep):
    folder = tmp_path_factory.mktemp("cut") / "base"
    shutil.copytree(made_once / "base", folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: int(keep * file.stat().st_size)])
    message = refuse_train(model=folder)
    assert repr(str(folder)) in message and "cannot be loaded" in message


# Options


@pytest.mark.parametrize(
    ("option", "value", "phrases"),
    [
        ("--feature-map", "elo", ["feature_map='elo' is not known", "Did you mean 'elu'?", "softmax"]),
        ("--normalize", "feature_12", ["normalize='feature_12'", "Did you mean 'feature_l2'?", "query_rms"]),
        ("--query", "contend", ["query='contend'", "Did you mean 'content'?", "rotary"]),
        ("--dtype", "float31", ["dtype='float31'", "Did you mean 'float32'?", "bfloat16"]),
        ("--rank", "0", ["rank=0", "positive integer"]),
        ("--epochs", "0", ["epochs=0", "above 0"]),
        ("--epochs", "inf", ["epochs=inf"]),
        ("--learning-rate", "-0.1", ["learning_rate=-0.1", "above 0"]),
        ("--learning-rate", "nan", ["learning_rate=nan", "above 0"]),
        ("--batch-size", "0", ["batch_size=0", "above 0"]),
        ("--save-steps", "-1", ["save_steps=-1", "above 0"]),
        ("--seed", "-1", ["seed=-1"]),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_a_wrong_value_of_an_option_is_refused(refuse_train, option, value, phrases):
    message = refuse_train(option, value)
    for phrase in phrases:
        assert phrase in message


def test_a_completion_that_does_not_fit_is_refused(refuse_train):
    message = refuse_train("--max-length", "2")
    assert (
        "line 1: the completion has 3 tokens, max_length is 2" in message
        and "Raise max_length or shorten the row" in message
    )


def test_a_row_that_does_not_fit_leaves_an_interrupted_run_alone(refuse_train, place):
    # --overwrite may drop the interrupted run, but not before the new one can start.
    message = refuse_train("--overwrite", "--max-length", "2", output=place / "stopped")
    assert "max_length is 2" in message


# The data file

GOOD = jsonl(*ROWS[:2])
EXPECTED = 'with "text" and "label"'
CUT = '{"text": "my line is dead", "label": "Störung"}'.encode()
BAD_DATA = {
    "empty": (b"", ["is empty", EXPECTED]),
    "whitespace_only": (b"\n  \n\t\n", ["is empty", EXPECTED]),
    "half_a_line": (GOOD + b'{"text": "my line is d', ["line 3", "not complete JSON", "cut off"]),
    "half_a_character": (GOOD + CUT[: CUT.index("ö".encode()) + 1], ["line 3", "not complete JSON", "cut off"]),
    "typo_in_the_first_field": (
        GOOD + b"\n" + jsonl({"txt": "a", "label": "b"}),  # a blank line counts as a line
        ["line 4", "['label', 'txt']", "Did you mean 'text'?", EXPECTED],
    ),
    "typo_in_the_second_field": (
        jsonl({"text": "a", "lable": "b"}),
        ["line 1", "['lable', 'text']", "Did you mean 'label'?"],
    ),
    "lacks_a_field": (GOOD + jsonl({"prompt": "a"}), ["line 3", "['prompt']", '"completion"']),
    "a_list": (GOOD + jsonl([1, 2]), ["line 3", "holds list, not an object"]),
    "a_number": (GOOD + jsonl(7), ["line 3", "holds int, not an object"]),
    "empty_label": (GOOD + jsonl({"text": "a", "label": " "}), ["line 3", "'label' is ' '", "not empty"]),
    "a_label_that_is_no_text": (GOOD + jsonl({"text": "a", "label": None}), ["line 3", "'label' is None", "a text"]),
    "mixed_formats": (
        GOOD + jsonl({"prompt": "a", "completion": "b"}),
        ["line 3", "('prompt', 'completion')", "('text', 'label')", "Use one format a file"],
    ),
    "messages_no_list": (jsonl({"messages": "hello"}), ["line 1", '"messages" must be a list']),
    "messages_too_few": (jsonl({"messages": [{"role": "assistant", "content": "a"}]}), ["line 1", "must be a list"]),
    "messages_without_content": (
        jsonl({"messages": [{"role": "user"}, {"role": "assistant", "content": "a"}]}),
        ["line 1", '"role" and "content"'],
    ),
    "messages_without_an_answer": (
        jsonl({"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}),
        ["line 1", "ends with the answer", '"assistant"'],
    ),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_a_bad_data_file_is_refused(refuse_train, tmp_path_factory, case):
    content, phrases = BAD_DATA[case]
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    file.write_bytes(content)
    message = refuse_train(data=file)
    assert str(file) in message
    for phrase in phrases:
        assert phrase in message


def test_a_wrong_suggestion_is_not_made(refuse_train, tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    file.write_bytes(jsonl({"text": "a", "zzz": "b"}))
    assert "Did you mean" not in refuse_train(data=file)  # "text" is no typo, and nothing is near "zzz"


@pytest.mark.parametrize("name", ["nowhere.jsonl", "done"])
def test_a_data_file_that_is_no_file_is_refused(refuse_train, place, name):
    message = refuse_train(data=place / name)
    assert str(place / name) in message and "Give the path of a JSONL file" in message


# The output folder


def test_a_finished_run_is_not_overwritten_unasked(refuse_train, place):
    message = refuse_train(output=place / "done")
    assert f"{place / 'done'} already holds a finished run" in message
    assert "Give another folder" in message and "--overwrite" in message


@pytest.mark.parametrize("words", [(), ("--overwrite",), ("--resume",)])
def test_a_folder_with_foreign_files_is_never_touched(refuse_train, place, words):
    (place / "photos").mkdir()
    (place / "photos" / "me.jpg").write_bytes(b"me")
    message = refuse_train(*words, output=place / "photos")
    assert f"{place / 'photos'} holds files that are no run of prefixmemory" in message
    assert "Give a folder that does not exist yet" in message


def test_foreign_files_in_the_partial_folder_are_not_deleted(refuse_train, place):
    (place / "photos.partial").mkdir()
    (place / "photos.partial" / "me.jpg").write_bytes(b"me")
    assert str(place / "photos.partial") in refuse_train("--overwrite", output=place / "photos")


def test_an_output_that_is_a_file_is_refused(refuse_train, place):
    message = refuse_train(output=place / "good.jsonl")
    assert f"{place / 'good.jsonl'} is a file" in message and "Give a folder that does not exist yet" in message


def test_an_output_below_a_file_is_refused(refuse_train, place):
    assert str(place / "good.jsonl") in refuse_train(output=place / "good.jsonl" / "new")


def test_the_current_folder_is_refused_as_output(refuse_train, place, monkeypatch):
    (place / "here").mkdir()
    monkeypatch.chdir(place / "here")
    assert "folder" in refuse_train(output=".")


def test_an_interrupted_run_is_not_overwritten_unasked(refuse_train, place):
    message = refuse_train(output=place / "stopped")
    assert f"{place / 'stopped.partial'} holds an interrupted run" in message
    assert "--resume" in message and "--overwrite" in message


def test_resume_without_an_interrupted_run_is_refused(refuse_train, place):
    message = refuse_train("--resume")
    assert f"There is no interrupted run at {place / 'new.partial'}" in message
    assert "Leave --resume out" in message


def test_resume_and_overwrite_together_are_refused(refuse_train, place):
    assert "exclude each other" in refuse_train("--resume", "--overwrite", output=place / "stopped")


def test_resume_of_a_run_without_a_checkpoint_says_how_to_go_on(refuse_train, place):
    shutil.rmtree(place / "stopped.partial" / "checkpoints")
    message = refuse_train("--resume", "--save-steps", "1", output=place / "stopped")
    assert "no checkpoint to resume from" in message
    assert "--overwrite" in message  # starting again without it would be refused


@pytest.mark.parametrize(
    ("option", "value", "phrase"),
    [
        ("--seed", "7", "seed"),
        ("--epochs", "3", "epochs"),
        ("--rank", "2", "rank"),
        ("--feature-map", "relu", "feature_map"),
        ("--dtype", "bfloat16", "dtype"),
    ],
)
def test_resume_with_other_settings_is_refused(refuse_train, place, option, value, phrase):
    message = refuse_train("--resume", "--save-steps", "1", option, value, output=place / "stopped")
    assert str(place / "stopped.partial") in message
    assert phrase in message and value in message
    assert "Resume with the same values, or start afresh with --overwrite" in message


@pytest.mark.parametrize("rows", [[*ROWS, *ROWS], [{"text": "else", "label": "c"}] * len(ROWS)])
def test_resume_with_other_data_is_refused(refuse_train, place, rows):
    (place / "good.jsonl").write_bytes(jsonl(*rows))
    message = refuse_train("--resume", "--save-steps", "1", output=place / "stopped")
    assert "rows" in message and "--overwrite" in message


def test_resume_with_another_model_is_refused(refuse_train, place, tmp_path_factory):
    other = tiny.save_tiny(tmp_path_factory.mktemp("other") / "base", seed=5)
    message = refuse_train("--resume", "--save-steps", "1", model=other, output=place / "stopped")
    assert "base_model=" in message and str(other) in message


def test_the_interrupted_run_of_these_tests_can_be_resumed(cli, made_once, place):
    # The negative control of the refusals above.
    answer = cli(
        "train", "--model", made_once / "base", "--data", place / "good.jsonl", "--output", place / "stopped",
        *SETTINGS, "--save-steps", "1", "--resume",
    )  # fmt: skip
    assert answer.code == 0 and (place / "stopped" / WEIGHTS).is_file()
    assert not (place / "stopped.partial").exists()


@pytest.fixture
def overwrite(made_once: Path, place: Path) -> tuple[object, ...]:
    base, data = made_once / "base", place / "good.jsonl"
    return ("train", "--model", base, "--data", data, "--output", place / "done", *SETTINGS, "--overwrite")


def test_overwrite_keeps_the_old_run_when_training_fails(monkeypatch, cli, overwrite, place):
    before = contents(place / "done")
    with monkeypatch.context() as patch:
        patch.setattr("prefixmemory.training.run.show_progress", lambda console: FailAt())
        with pytest.raises(RuntimeError, match="out of memory"):
            cli(*overwrite, "--seed", "3")
    assert contents(place / "done") == before
    # Tried again without the failure, the new run takes its place.
    assert cli(*overwrite, "--seed", "3").code == 0
    after = contents(place / "done")
    assert after.keys() == before.keys() and after[WEIGHTS][0] != before[WEIGHTS][0]
    assert json.loads((place / "done" / "run.json").read_text())["settings"]["seed"] == 3
    assert sorted(path.name for path in place.iterdir()) == ["done", "good.jsonl", "stopped.partial"]


def test_overwrite_keeps_the_old_run_when_saving_fails(monkeypatch, cli, overwrite, place):
    def disk_full(*args: object, **kwargs: object) -> None:
        raise OSError("no space left on device")

    before = contents(place / "done")
    monkeypatch.setattr("prefixmemory.training.run.provenance", disk_full)
    answer = cli(*overwrite)
    assert answer.code == 1 and "no space left on device" in answer.err and "Traceback" not in answer.err
    assert contents(place / "done") == before


def test_a_run_that_cannot_be_put_in_its_place_keeps_the_old_one_and_can_be_resumed(monkeypatch, cli, overwrite, place):
    real, before = Path.replace, contents(place / "done")

    def fail(self: Path, target: Path) -> Path:
        if self.name == "done.partial":
            raise OSError("device or resource busy")
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        answer = cli(*overwrite, "--seed", "3")
    assert answer.code == 1 and "device or resource busy" in answer.err
    assert contents(place / "done") == before
    assert cli(*overwrite[:-1], "--seed", "3", "--resume").code == 0
    assert cli(*overwrite, "--seed", "3", "--output", place / "again").code == 0
    close_training(load_file(place / "done" / WEIGHTS), load_file(place / "again" / WEIGHTS))
    assert contents(place / "done")[WEIGHTS][0] != before[WEIGHTS][0]


def test_overwrite_works_beside_the_leftover_of_a_crashed_replacement(cli, overwrite, place):
    shutil.copytree(place / "done", place / "done.replaced")
    before = contents(place / "done")
    assert cli(*overwrite, "--seed", "3").code == 0
    assert contents(place / "done")[WEIGHTS][0] != before[WEIGHTS][0]


# The adapter folder


@pytest.fixture
def refuse_generate(refuse: Refuse, place: Path) -> Refuse:
    """``prefixmemory generate`` with the adapter ``done``, after ``change`` was done to it."""

    def run(change: Change | None = None, adapter: Path | None = None, *words: str) -> str:
        if change is not None:
            change(place / "done")
        return refuse("generate", "--adapter", adapter or place / "done", "--prompt", "Text: x", *words)

    return run


def edit_config(folder: Path, **changes: object) -> None:
    """Change fields of the config; ``None`` takes one out."""
    config = json.loads((folder / CONFIG).read_text())
    assert changes.keys() <= config.keys() | {"feature_mapp", "frobnicate"}
    config = {name: value for name, value in {**config, **changes}.items() if value is not None or name not in changes}
    (folder / CONFIG).write_text(json.dumps(config))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change tensors, and drop the checksum, so that it is not what refuses them."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    edit_config(folder, weights_sha256=None)


def cut_file(file: Path, share: float) -> None:
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])


def tamper(folder: Path) -> None:
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-1] ^= 1  # one bit of one weight
    (folder / WEIGHTS).write_bytes(content)


def drop_a_tensor(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.__delitem__(min(tensors)))


def add_a_tensor(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.update({"base_model.model.frobnicate.weight": torch.ones(2)}))


def cut_a_tensor(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.update({min(tensors): tensors[min(tensors)][:, :-1].contiguous()}))


FIRST_KEY = "model.layers.0.self_attn.prefix_memory"
BAD_ADAPTERS: dict[str, tuple[Change, list[str]]] = {
    "weights_missing": (lambda folder: (folder / WEIGHTS).unlink(), [WEIGHTS, "is missing", "Copy it"]),
    "weights_truncated": (lambda folder: cut_file(folder / WEIGHTS, 0.7), [WEIGHTS, "truncated or damaged", "Copy it"]),
    "weights_empty": (lambda folder: cut_file(folder / WEIGHTS, 0.0), [WEIGHTS, "truncated or damaged", "Copy it"]),
    "weights_tampered": (tamper, [WEIGHTS, "is not the file that was saved", "weights_sha256"]),
    "config_missing": (lambda folder: (folder / CONFIG).unlink(), [CONFIG]),
    "config_half_written": (lambda folder: cut_file(folder / CONFIG, 0.5), [CONFIG]),
    "config_empty": (lambda folder: cut_file(folder / CONFIG, 0.0), [CONFIG]),
    "config_no_object": (lambda folder: (folder / CONFIG).write_text("[1]"), [CONFIG]),
    "config_unknown_field": (
        lambda folder: edit_config(folder, frobnicate=1),
        ["no field 'frobnicate'", "pip install -U prefixmemory"],
    ),
    "config_misspelt_field": (
        lambda folder: edit_config(folder, feature_mapp="elu"),
        ["no field 'feature_mapp'", "Did you mean 'feature_map'?"],
    ),
    "config_unknown_value": (
        lambda folder: edit_config(folder, feature_map="elo"),
        ["feature_map='elo'", "Did you mean 'elu'?"],
    ),
    "config_of_another_method": (
        lambda folder: LoraConfig(
            base_model_name_or_path=json.loads((folder / CONFIG).read_text())["base_model_name_or_path"],
            target_modules=["q_proj"],
        ).save_pretrained(folder),
        ["LORA config", "tensors are missing"],
    ),
    "config_without_a_method": (lambda folder: edit_config(folder, peft_type=None), [CONFIG]),
    "config_without_a_base_model": (
        lambda folder: edit_config(folder, base_model_name_or_path=None),
        ["base_model_name_or_path"],
    ),
    "tensor_missing": (drop_a_tensor, ["lacks 1 of its 6 memory tensors", FIRST_KEY, "Load it onto the model"]),
    "tensor_unknown": (add_a_tensor, ["has unknown 1", "frobnicate.weight", "Load it onto the model"]),
    "tensor_misshapen": (cut_a_tensor, [FIRST_KEY, "has shape [4, 7, 8]", "needs [4, 8, 8]"]),
    "config_of_another_shape": (lambda folder: edit_config(folder, rank=2), ["The checkpoint", FIRST_KEY]),
}


@pytest.mark.parametrize("case", BAD_ADAPTERS)
def test_a_bad_adapter_folder_is_refused(refuse_generate, case):
    change, phrases = BAD_ADAPTERS[case]
    message = refuse_generate(change)
    for phrase in phrases:
        assert phrase in message


def test_an_adapter_whose_checksum_was_deleted_on_purpose_loads(cli, place):
    # The control of the tests with changed tensors: deleting the checksum alone spoils nothing.
    edit_weights(place / "done", lambda tensors: tensors.update({key: 2 * tensors[key] for key in tensors}))
    assert cli("generate", "--adapter", place / "done", "--prompt", "x", "--max-new-tokens", "1").code == 0


def test_an_adapter_folder_that_does_not_exist_is_refused(refuse_generate, place):
    message = refuse_generate(adapter=place / "nowhere")
    assert f"{place / 'nowhere'} does not exist" in message and "prefixmemory train" in message


@pytest.mark.parametrize("family", ["llama_gqa", "qwen3"])
def test_a_base_model_that_was_replaced_by_another_is_refused(refuse_generate, place, tmp_path_factory, family):
    other = tiny.save_tiny(tmp_path_factory.mktemp("other") / "base", family, seed=5)
    message = refuse_generate(lambda folder: edit_config(folder, base_model_name_or_path=str(other)))
    assert "made for another base model" in message and str(other) in message


def test_a_base_model_that_is_gone_is_refused(refuse_generate, place):
    gone = str(place / "gone")
    message = refuse_generate(lambda folder: edit_config(folder, base_model_name_or_path=gone))
    assert repr(gone) in message and "cannot be loaded" in message


def test_an_empty_prompt_is_refused(refuse, place):
    assert "prompt" in refuse("generate", "--adapter", place / "done", "--prompt", "")


def test_an_answer_of_no_tokens_is_refused(refuse_generate):
    assert "max_new_tokens=0" in refuse_generate(None, None, "--max-new-tokens", "0")
