"""Memories on packed base models: exact at zero, right gradients, trained, saved and reloaded, base bits untouched.

On a CPU, or on the GPU of a machine that has one. Packings that need more than the tests' environment:
test_quantized_others.py.
"""

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    prepare_model_for_kbit_training,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

from close import close_logits, same_parameters
from packed import (
    KINDS,
    adapt,
    assert_moved,
    assert_untouched,
    base_folder,  # noqa: F401  # the fixture `folder`
    bits,
    build,
    check_training,
    copies,
    logits,
    storages,
    train,
    unpacked,
)
from prefixmemory import PrefixMemoryConfig, PrefixMemoryError
from prefixmemory.models.loading import load_model
from prefixmemory.models.quantization import REPACKS, is_repacked, set_repacking
from prefixmemory.tuner import model as tuner
from prefixmemory.tuner.layers import memory_layers
from processes import run_python
from tiny import memory_parameters, randomize, tokenizer, tokens

pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")

pytestmark = [
    # PEFT 0.21's prepare_model_for_kbit_training and TRL 1.16 call transformers 5.23 by the old names.
    pytest.mark.filterwarnings(r"ignore:`gradient_checkpointing(_\w+)?` is deprecated:FutureWarning"),
    # PEFT says so whenever a second adapter is injected; here that is the point.
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute in the model:UserWarning"),
]

#: In the heads alone, and beside the packed projections of the feed-forward blocks too.
PLACES = pytest.mark.parametrize("fields", [{}, {"feed_forward": 4}], ids=["heads", "blocks"])

# --- the measuring stick itself ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_negative_control_one_flipped_bit_in_any_storage_is_seen(folder, kind):
    model = load_model(folder, quantization=kind)
    logits(model)
    before, stored = bits(model), storages(model)
    assert any(t.dtype in (torch.int8, torch.uint8) and "q_proj" in name for name, t in stored.items())
    assert any("q_proj" in name and t.is_floating_point() for name, t in stored.items())  # its scales
    for name, tensor in stored.items():
        byte = tensor.view(-1).view(torch.uint8)[-1:]
        byte ^= 1
        after = bits(model)
        # storages that share their memory (SCB of an 8-bit weight and of its state) change together
        assert name in [n for n in after if after[n] != before[n]]
        byte ^= 1
    assert_untouched(model, before)


# --- exactness and gradients ------------------------------------------------------------------------------------


@PLACES
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_zero_disabled_and_unloaded_memories_leave_the_quantised_base_exactly(folder, kind, dtype, mode, fields):
    model = load_model(folder, dtype, quantization=kind).train(mode == "train")
    before = bits(model)
    alone = logits(model)
    adapted = adapt(model, **fields).train(mode == "train")
    assert {p.dtype for p in memory_parameters(adapted).values()} == {torch.float32}
    assert torch.equal(logits(adapted), alone)
    randomize(adapted)
    assert (logits(adapted) - alone).abs().max() > 0.05
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), alone)
    assert torch.equal(logits(adapted.unload()), alone)
    assert_untouched(model, before)


@pytest.mark.parametrize("kind", KINDS)
def test_without_peft_upcasting_a_memory_takes_a_floating_dtype(folder, kind):
    model = load_model(folder, "bfloat16", quantization=kind)
    adapted = get_peft_model(model, PrefixMemoryConfig(task_type="CAUSAL_LM"), autocast_adapter_dtype=False)
    # 8-bit layers of bitsandbytes do not say in which dtype they compute: there it stays float32
    expected = torch.float32 if kind == "bnb-8bit" else torch.bfloat16
    assert {p.dtype for p in memory_parameters(adapted).values()} == {expected}
    train(adapted, 1)
    assert all(p.abs().max() > 0 for p in memory_parameters(adapted).values())


@PLACES
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_on_the_unpacked_weights(folder, kind, fields):
    packed = load_model(folder, "float32", quantization=kind)
    plain = build()
    for name, module in packed.named_modules():
        if name.endswith("_proj"):
            plain.get_submodule(name).weight.data.copy_(unpacked(module))

    def gradients(model):
        adapted = adapt(model, **fields).train()
        randomize(adapted)
        ids = tokens(4, 12).to(model.device)
        adapted(ids, labels=ids).loss.backward()
        return {name: p.grad for name, p in memory_parameters(adapted).items()}

    plain.to(packed.device)
    ours, theirs, unquantised = gradients(packed), gradients(plain), gradients(build().to(packed.device))
    for name, gradient in ours.items():
        size = theirs[name].abs().max()
        assert size > 1e-3
        assert (gradient - theirs[name]).abs().max() < 1e-4 * size
        assert (gradient - unquantised[name]).abs().max() > 1e-3 * size  # the comparison can fail


# --- train, save, reload: acceptance 3 of issue 3 ----------------------------------------------------------------

RELOAD = """
import json, sys
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
sys.path.insert(0, sys.argv[2])
import prefixmemory, tiny
from prefixmemory.models.loading import load_model
for run in json.load(open(sys.argv[1])):
    model = PeftModel.from_pretrained(load_model(run["base"], "float32", quantization=run["kind"]), run["adapter"])
    model.eval()
    ids = tiny.tokens(2, 9).to(model.device)
    found = {"logits": model(ids).logits.detach(), "tokens": model.generate(ids, max_new_tokens=6, do_sample=False)}
    found |= get_peft_model_state_dict(model)
    save_file({name: t.cpu() for name, t in found.items()}, run["adapter"] + "/reloaded.safetensors")
"""

CONFIGS = {"default": {}, "every parameter": {"feature_map": "mlp", "rank": 4, "query": "rotary"}}


@pytest.fixture(scope="module")
def runs(folder, tmp_path_factory) -> dict[tuple[str, str], dict]:
    """Train a memory of each kind, save it, and load them all in a process of their own."""
    found, out = {}, tmp_path_factory.mktemp("runs")
    for kind in KINDS:
        for name, config in CONFIGS.items():
            model = load_model(folder, "float32", quantization=kind)
            if name != "default":  # as QLoRA does it: frozen, gradient checkpointing
                model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": True})
            base_bits, base_logits = bits(model), logits(model)
            adapted = adapt(model, **config)
            start = copies(adapted)
            losses = train(adapted, 3)
            between = logits(adapted)  # as an evaluation in the middle of training
            losses += train(adapted, 3)
            path = out / f"{kind}-{name.replace(' ', '-')}"
            adapted.save_pretrained(path)
            run = {"kind": kind, "base": folder, "adapter": str(path)}
            with adapted.disable_adapter():
                disabled = logits(adapted)
            found[kind, name] = {
                **run, "model": adapted, "start": start, "losses": losses, "bits": base_bits, "between": between,
                "base_logits": base_logits, "disabled": disabled, "logits": logits(adapted),
                "tokens": adapted.generate(tokens(2, 9).to(model.device), max_new_tokens=6, do_sample=False),
            }  # fmt: skip
    jobs = [{key: run[key] for key in ("kind", "base", "adapter")} for run in found.values()]
    (out / "runs.json").write_text(json.dumps(jobs))
    run_python("-c", RELOAD, out / "runs.json", Path(__file__).parent)
    return found


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
def test_train_save_and_reload_in_a_new_process(runs, kind, config):
    run = runs[kind, config]
    assert_moved(run["model"], run["start"])
    assert all(later < earlier for earlier, later in pairwise(run["losses"]))
    assert_untouched(run["model"], run["bits"])
    assert torch.equal(run["disabled"], run["base_logits"])
    reloaded = load_file(f"{run['adapter']}/reloaded.safetensors")
    close_logits(reloaded.pop("logits"), run["logits"].cpu())
    assert torch.equal(reloaded.pop("tokens"), run["tokens"].cpu())
    same_parameters(reloaded, {name: p.cpu() for name, p in get_peft_model_state_dict(run["model"]).items()})
    assert (run["logits"] - run["base_logits"]).abs().max() > 0.05  # there was something to save
    assert (run["logits"] - run["between"]).abs().max() > 0.01  # and training went on after the evaluation


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_float32_memory_trains_on_a_bfloat16_base(folder, kind, autocast):
    model = load_model(folder, "bfloat16", quantization=kind)
    before = bits(model)
    check_training(adapt(model), before, autocast=autocast)


@PLACES
@pytest.mark.parametrize("prepared", [False, True], ids=["as loaded", "prepared"])
@pytest.mark.parametrize("kind", KINDS)
def test_trainer_with_evaluations_and_gradient_checkpointing(folder, tmp_path, kind, prepared, fields):
    reentrant = {"use_reentrant": prepared}  # both ways that torch has; the first needs the inputs' gradient
    model = load_model(folder, "bfloat16" if prepared else "float32", quantization=kind)
    if prepared:
        model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs=reentrant)
    before = bits(model)
    adapted = adapt(model, **fields)
    start, rows = copies(adapted), [{"input_ids": r, "labels": r} for r in tokens(8, 12).tolist()]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[],
        eval_strategy="steps", eval_steps=1, save_strategy="no", bf16=prepared, disable_tqdm=True,
        activation_checkpointing=True, activation_checkpointing_kwargs=reentrant, use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )  # fmt: skip
    trainer = Trainer(adapted, arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(losses) == 4 and all(b < a for a, b in pairwise(losses))
    assert_moved(adapted, start)
    assert_untouched(model, before)


@pytest.mark.parametrize("kind", KINDS)
def test_trl_sft_with_evaluations(folder, tmp_path, kind):
    trl = pytest.importorskip("trl")
    model = load_model(folder, "float32", quantization=kind)
    before, rows = bits(model), Dataset.from_list([{"text": "my line is dead"}] * 8)
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[],
        eval_strategy="steps", eval_steps=1, save_strategy="no", bf16=False, disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(), dataloader_pin_memory=torch.cuda.is_available(),
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model, arguments, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer(),
        peft_config=PrefixMemoryConfig(task_type="CAUSAL_LM"),
    )  # fmt: skip
    trainer.train()
    memories = memory_parameters(trainer.model).values()
    assert {p.dtype for p in memories} == {torch.float32 if kind == "torchao-int8" else torch.bfloat16}  # TRL's doing
    assert all(m.any(dim=-1).any(dim=-1).all() for m in memories)
    assert_untouched(model, before)


# --- between plain and packed bases -----------------------------------------------------------------------------


@PLACES
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_moves_between_the_plain_and_the_packed_base(folder, tmp_path, kind, fields):
    for source, target in ((None, kind), (kind, None)):
        trained = adapt(load_model(folder, "float32", quantization=source), **fields)
        randomize(trained, std=0.2)  # entries of A·B of about 0.1
        adapter = tmp_path / f"from-{source}"
        trained.save_pretrained(adapter)
        base = load_model(folder, "float32", quantization=target)
        alone = logits(base)
        loaded = PeftModel.from_pretrained(base, str(adapter)).eval()
        for name, parameter in memory_parameters(loaded).items():
            assert torch.equal(parameter, memory_parameters(trained)[name])
        answered = logits(trained)
        # packing is a change of the base (NF4 of random weights: a third of what the memory says)
        assert (logits(loaded) - answered).abs().mean() < 0.5 * (answered - alone).abs().mean()


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_another_model_is_refused_on_a_packed_base(folder, tmp_path, kind):
    build(seed=1).save_pretrained(tmp_path / "other")
    adapt(load_model(str(tmp_path / "other"))).save_pretrained(tmp_path / "adapter")
    with pytest.raises(PrefixMemoryError, match="another base model"):
        PeftModel.from_pretrained(load_model(folder, quantization=kind), str(tmp_path / "adapter"))


# --- LoRA beside a memory ---------------------------------------------------------------------------------------

LORA = LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False)


@pytest.mark.parametrize("kind", KINDS)
def test_lora_before_a_memory_trains_with_it_on_a_packed_base(folder, kind):
    model = load_model(folder, "float32", quantization=kind)
    before = bits(model)
    inject_adapter_in_model(LORA, model, adapter_name="default")
    alone = logits(model)
    inject_adapter_in_model(PrefixMemoryConfig(), model, adapter_name="default")
    assert torch.equal(logits(model), alone)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert sum(".prefix_memory." in name for name in start) == 4 and sum("lora_" in name for name in start) == 8
    train(model, 2)
    for name, parameter in model.named_parameters():
        assert name not in start or not torch.equal(parameter, start[name]), name
    after = {name.replace(".base_layer", ""): value for name, value in bits(model).items() if "lora_" not in name}
    assert after == before


@pytest.mark.parametrize("kind", KINDS)
def test_lora_after_a_memory_is_refused_on_a_packed_base(folder, kind):
    model = adapt(load_model(folder, quantization=kind))
    inject_adapter_in_model(LORA, model.base_model.model, adapter_name="lora")
    with pytest.raises(PrefixMemoryError, match="inject LoRA first"):
        logits(model)


# --- bitsandbytes repacks 4-bit weights for inference -----------------------------------------------------------


def packed_by_the_user(folder: str, **options) -> torch.nn.Module:
    """Loaded past our load_model, as most people load a model; ``options`` as in BitsAndBytesConfig."""
    config = BitsAndBytesConfig(load_in_4bit=True, **options)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32).eval()


def repacks_here() -> bool:
    from bitsandbytes.functional import has_avx512bf16

    return not torch.cuda.is_available() and has_avx512bf16()


needs_repacking = pytest.mark.skipif(not repacks_here(), reason="bitsandbytes repacks on CPUs with AVX512-BF16 only")


@pytest.mark.parametrize("options", [{}, {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}])
def test_a_base_that_the_user_loaded_is_exact_and_trains_on_after_evaluations(folder, options):
    model = packed_by_the_user(folder, **options)
    before, adapted = bits(model), adapt(model)
    zero = logits(adapted)
    check_training(adapted, before)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), zero)
    assert_untouched(model, before)


@needs_repacking
def test_training_on_a_repacked_base_is_refused_and_answering_is_not(folder, tmp_path):
    trained = adapt(load_model(folder, "float32", quantization="bnb-4bit"))
    randomize(trained, std=0.1)
    trained.save_pretrained(tmp_path)

    model = packed_by_the_user(folder)
    alone = logits(model)
    assert is_repacked(model.model.layers[0].self_attn.q_proj)
    with pytest.raises(PrefixMemoryError, match=r"No gradient passes through 14 4-bit projections \('model\.layers\.0"):
        adapt(model)
    assert not memory_layers(model)
    loaded = PeftModel.from_pretrained(model, str(tmp_path)).eval()
    assert (logits(loaded) - alone).abs().max() > 0.05
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), alone)
    with pytest.raises(PrefixMemoryError, match="No gradient passes"):
        loaded.load_adapter(str(tmp_path), adapter_name="more", is_trainable=True)


@needs_repacking
@pytest.mark.filterwarnings("ignore:bitsandbytes..gemv_4bit. an autograd kernel was not registered:UserWarning")
def test_negative_control_without_the_refusal_nothing_would_be_learnt(folder, monkeypatch):
    monkeypatch.setattr(tuner, "keep_trainable", lambda *_, **__: None)
    model = packed_by_the_user(folder)
    logits(model)
    adapted = adapt(model, rank=None)  # all of it starts at zero
    train(adapted, 2)
    assert all(p.abs().max() == 0 for p in memory_parameters(adapted).values())


def test_repacking_can_be_allowed_for_a_model_that_only_answers(folder):
    model = load_model(folder, "bfloat16", quantization="bnb-4bit")
    projection = model.model.layers[0].self_attn.q_proj
    plain = logits(model)
    assert not getattr(projection, REPACKS) and not is_repacked(projection)
    set_repacking(model, allowed=True)
    assert getattr(projection, REPACKS) == is_repacked_after(model, projection)
    assert (logits(model) - plain).abs().max() < 0.1


def is_repacked_after(model, projection) -> bool:
    logits(model)
    return is_repacked(projection)


# --- the guide --------------------------------------------------------------------------------------------------

GUIDE = Path(__file__).parent.parent / "docs" / "guides" / "quantized.md"


def test_the_guide_runs_and_its_numbers_are_those_it_computes(folder, tmp_path, monkeypatch):
    tokenizer().save_pretrained(folder)
    guide = GUIDE.read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    code = "".join(blocks).replace("meta-llama/Llama-2-7b-chat-hf", folder)
    assert len(blocks) == 3 and folder in code
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(code, "quantized.md", "exec"), names)

    for packing, sizes in names["sizes"].items():
        row = re.search(rf"^\| .*`{packing}`.* \| (\S+) \| (\S+) \| (\S+) \|$", guide, re.MULTILINE)
        assert row and [float(cell) for cell in row.groups()] == [round(size, 2) for size in sizes]
    for kind in KINDS:  # and the formula is right: against what a tiny model really stores
        stored = storages(load_model(folder, "bfloat16", quantization=kind)).items()
        left_out = ("code", "inv_freq", "zero_point", "SCB", ".scale")  # constants, and scales per output feature
        real = sum(tensor.nbytes for name, tensor in stored if not name.endswith(left_out))
        assert names["gibibytes"](adapt(build()), kind)[0] * 2**30 == pytest.approx(real, rel=0.01)
