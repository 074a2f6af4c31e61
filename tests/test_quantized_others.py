"""Packings that the tests' environment cannot compute: GPTQ and AWQ, and what needs a GPU.

GPTQ and AWQ run on a CPU where gptqmodel is installed. It is no dependency of the tests, because it asks for another
torch; without it their tests are skipped. The tests marked ``gpu`` have never run.
"""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from close import close_logits, same_parameters
from packed import KINDS, adapt, base_folder, bits, check_training, logits  # noqa: F401  # the fixture `folder`
from prefixmemory.models.loading import load_model
from tiny import memory_parameters, tokenizer

pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")

# --- GPTQ and AWQ: computed by gptqmodel, on a CPU too ----------------------------------------------------------

gptqmodel = pytest.mark.skipif(find_spec("gptqmodel") is None, reason="needs gptqmodel (and optimum for GPTQ)")


def save_gptq(folder: str, to: Path) -> None:
    from transformers import GPTQConfig

    config = GPTQConfig(
        bits=4, group_size=32, dataset=["a few words to calibrate with " * 5] * 4, tokenizer=tokenizer()
    )
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    model.save_pretrained(to)


def save_awq(folder: str, to: Path) -> None:
    from gptqmodel import GPTQModel, QuantizeConfig
    from gptqmodel.quantization import FORMAT, METHOD

    tokenizer().save_pretrained(folder)
    config = QuantizeConfig(bits=4, group_size=32, quant_method=METHOD.AWQ, format=FORMAT.GEMM)
    model = GPTQModel.load(folder, config, device="cpu")
    model.quantize(["a few words to calibrate with " * 10] * 64, batch_size=1)
    model.save(str(to))


@gptqmodel
@pytest.mark.filterwarnings("ignore")  # gptqmodel's own, of any kind: it is no dependency and not pinned
@pytest.mark.parametrize("save", [save_gptq, save_awq], ids=["gptq", "awq"])
def test_gptq_and_awq_checkpoints(folder, tmp_path, save, monkeypatch):
    monkeypatch.setenv("GPTQMODEL_CPU_WORKERS", "3")  # it refuses to start on two cores otherwise
    save(folder, tmp_path / "base")
    model = load_model(str(tmp_path / "base"), "float32")
    before, alone = bits(model), logits(model)
    assert any(name.endswith("q_proj.qweight") for name in before)
    adapted = adapt(model)
    assert torch.equal(logits(adapted), alone)
    check_training(adapted, before)
    adapted.save_pretrained(tmp_path / "adapter")
    answered = logits(adapted)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), alone)
    fresh = PeftModel.from_pretrained(load_model(str(tmp_path / "base"), "float32"), str(tmp_path / "adapter")).eval()
    same_parameters(get_peft_model_state_dict(fresh), get_peft_model_state_dict(adapted))
    close_logits(logits(fresh), answered)


# --- what needs a GPU: written, never run -----------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def check_on_gpu(base, load, tmp_path) -> None:
    """Attach, train, save and reload on the GPU; nothing was moved there by us after packing."""
    assert base.device.type == "cuda"
    before, alone = bits(base), logits(base)
    adapted = adapt(base)
    assert {p.device.type for p in memory_parameters(adapted).values()} == {"cuda"}
    assert torch.equal(logits(adapted), alone)
    check_training(adapted, before, steps=4, autocast=True)
    adapted.save_pretrained(tmp_path)
    fresh = PeftModel.from_pretrained(load(), str(tmp_path)).eval()
    same_parameters(get_peft_model_state_dict(fresh), get_peft_model_state_dict(adapted))
    close_logits(logits(fresh), logits(adapted))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_our_choices_on_a_gpu(folder, tmp_path, kind, dtype):
    def load():
        return load_model(folder, dtype, quantization=kind)

    check_on_gpu(load(), load, tmp_path)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("kind", ["bnb-4bit-float16", "torchao-int4", "torchao-float8", "hqq", "fp8"])
def test_other_packings_on_a_gpu(folder, tmp_path, kind):
    import transformers
    from torchao import quantization

    if kind == "hqq" and find_spec("hqq") is None:
        pytest.skip("needs hqq")
    config = {
        "bnb-4bit-float16": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float16),
        "torchao-int4": lambda: transformers.TorchAoConfig(quantization.Int4WeightOnlyConfig(group_size=32)),
        "torchao-float8": lambda: transformers.TorchAoConfig(quantization.Float8WeightOnlyConfig()),
        "hqq": lambda: transformers.HqqConfig(nbits=4, group_size=64),
        "fp8": lambda: transformers.FineGrainedFP8Config(weight_block_size=(32, 32)),
    }[kind]()

    def load():
        return AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=config, dtype=torch.bfloat16, device_map={"": 0}
        ).eval()

    check_on_gpu(load(), load, tmp_path)
