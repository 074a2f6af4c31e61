"""Loading base models: what can be packed, what is saved packed, GGUF files, and one-line errors."""

from types import SimpleNamespace

import gguf
import pytest
import torch
from peft import PeftModel
from transformers.integrations.gguf import kernels as gguf_kernels
from transformers.integrations.gguf.utils import GgufLinear, replace_with_gguf_modules

from close import close_logits, same_parameters
from packed import (
    adapt,
    assert_untouched,
    base_folder,  # noqa: F401  # the fixture `folder`
    bits,
    build,
    check_training,
    logits,
)
from prefixmemory import PrefixMemoryError
from prefixmemory.models import loading as base_models
from prefixmemory.models import quantization
from prefixmemory.models.loading import load_model
from tiny import memory_parameters, randomize, tokens


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# --- choices and their errors -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("untyped")
def test_an_unknown_quantization_names_the_choices(folder):
    with pytest.raises(PrefixMemoryError, match="Did you mean 'bnb-4bit'") as error:
        load_model(folder, quantization="bnb4bit")
    assert "Choose one of: bnb-4bit, bnb-8bit, torchao-int8" in one_line(error)


@pytest.mark.parametrize(("kind", "package"), quantization.PACKAGES.items())
def test_a_missing_package_is_named_with_its_pip_command(folder, monkeypatch, kind, package):
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    with pytest.raises(PrefixMemoryError, match=f"quantization='{kind}' needs {package}, which is not inst") as error:
        load_model(folder, quantization=kind)
    assert "pip install 'prefixmemory[quantized]'" in one_line(error)


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path):
    model = build()
    state = {name: tensor for name, tensor in model.state_dict().items() if "layers.1.mlp.up_proj" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(PrefixMemoryError, match=r"lacks 1 of its weights \('model.layers.1.mlp.up_proj") as error:
        load_model(str(tmp_path))
    one_line(error)


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_four_bit_weights_are_multiplied_in_the_dtype_of_the_model(tmp_path, dtype):
    pytest.importorskip("bitsandbytes")
    build().to(torch.bfloat16).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), dtype, quantization="bnb-4bit")
    expected = torch.float32 if dtype == "float32" else torch.bfloat16
    assert model.dtype == expected == model.model.layers[0].self_attn.o_proj.compute_dtype


# --- checkpoints that are saved packed --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", quantization.PACKAGES)
def test_a_model_saved_packed_is_loaded_as_it_is_and_carries_a_memory(folder, tmp_path, kind):
    pytest.importorskip(quantization.PACKAGES[kind])
    model = load_model(folder, "float32", quantization=kind)
    saved = str(tmp_path / "packed")
    model.save_pretrained(saved)
    again = load_model(saved, "float32")
    assert_untouched(again, bits(model))
    close_logits(logits(again), logits(model))
    with pytest.raises(PrefixMemoryError, match=r"saved quantised .* Leave quantization out") as error:
        load_model(saved, quantization=kind)
    one_line(error)

    adapted = adapt(again)
    check_training(adapted, bits(again))


# --- GGUF files -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory) -> str:
    """A tiny Llama in a GGUF file, its matrices as Q8_0 blocks."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    model = build()
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if "q_proj" in name or "k_proj" in name:  # llama.cpp rotates neighbours, transformers halves
            tensor = tensor.unflatten(0, (-1, 2, config.head_dim // 2)).transpose(1, 2).reshape(tensor.shape)
        array, short = tensor.contiguous().numpy(), names.get_name(name, try_suffixes=(".weight",))
        if array.ndim == 1:
            writer.add_tensor(short, array)
        else:
            packed = gguf.quants.quantize(array, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(short, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    return str(path)


def test_a_gguf_file_is_unpacked_and_carries_a_memory(gguf_file, tmp_path):
    model = load_model(gguf_file)
    alone, before = logits(model), bits(model)
    saved = dict(build().named_parameters())
    for name, parameter in model.named_parameters():  # eight bits, with a scale for 32 weights
        step = saved[name].abs().max() / 127 if parameter.ndim == 2 else 1e-6
        assert (parameter - saved[name]).abs().max() < 0.51 * step
    adapted = adapt(model)
    assert torch.equal(logits(adapted), alone)
    check_training(adapted, before)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), alone)
    adapted.save_pretrained(tmp_path)
    fresh = PeftModel.from_pretrained(load_model(gguf_file), str(tmp_path)).eval()
    same_parameters(fresh, adapted)
    close_logits(logits(fresh), logits(adapted))
    ids = tokens(2, 5)
    assert torch.equal(*(m.generate(ids, max_new_tokens=4, do_sample=False) for m in (fresh, adapted)))


def test_gguf_blocks_that_stay_packed_carry_a_memory_that_was_trained_unpacked(gguf_file, tmp_path, monkeypatch):
    """transformers 5.23 keeps the blocks of three families where its Hub has a kernel; here a stand-in unpacks them."""
    trained = adapt(load_model(gguf_file))
    randomize(trained)
    trained.save_pretrained(tmp_path)

    def mul_mat_vec(weight, x, ggml_type, out_features):
        return x @ gguf_kernels.dequantize(weight, ggml_type, x.dtype).reshape(out_features, -1).T

    kernel = SimpleNamespace(supports=lambda ggml_type: True, mul_mat_vec=mul_mat_vec)
    monkeypatch.setattr(gguf_kernels, "_gguf_kernel", kernel)
    packed, kind = build(), gguf.GGMLQuantizationType.Q8_0
    weights = {name: p.detach().numpy() for name, p in packed.named_parameters() if "_proj" in name}
    for name, module in replace_with_gguf_modules(packed, dict.fromkeys(weights, int(kind)), kernel).items():
        assert isinstance(module, GgufLinear)
        module.weight.data.copy_(torch.from_numpy(gguf.quants.quantize(weights[name], kind)))
    packed.get_input_embeddings().load_state_dict(trained.get_input_embeddings().state_dict())
    packed.lm_head.load_state_dict(trained.get_base_model().lm_head.state_dict())

    alone, before = logits(packed, 3), bits(packed)
    loaded = PeftModel.from_pretrained(packed, str(tmp_path)).eval()
    assert {p.dtype for p in memory_parameters(loaded).values()} == {torch.float32}
    assert (logits(loaded, 3) - logits(trained, 3)).abs().max() < 1e-4
    assert (logits(loaded, 3) - alone).abs().max() > 0.05
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded, 3), alone)
    assert_untouched(packed, before)


def test_a_gguf_file_cannot_be_packed_anew(gguf_file):
    pytest.importorskip("bitsandbytes")
    with pytest.raises(PrefixMemoryError, match=r"does not go with the GGUF file .* save_pretrained") as error:
        load_model(gguf_file, quantization="bnb-4bit")
    one_line(error)


# --- on which device --------------------------------------------------------------------------------------------


class Loaded(torch.nn.Module):
    """Stands for a model that transformers has put somewhere; notes where it is moved to."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.moves = torch.device(device), []

    def to(self, device: str) -> "Loaded":
        self.moves.append(device)
        return self


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("gpu", "put_on", "moves"), [(True, "cpu", ["cuda:0"]), (True, "cuda", []), (False, "cpu", [])]
)
def test_only_a_model_that_is_not_yet_on_the_gpu_is_moved_there(folder, monkeypatch, gpu, put_on, moves):
    model = Loaded(put_on)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    loader = SimpleNamespace(from_pretrained=lambda *_, **__: (model, {"missing_keys": set()}))
    monkeypatch.setattr(base_models, "AutoModelForCausalLM", loader)
    assert load_model(folder) is model
    assert model.moves == moves
