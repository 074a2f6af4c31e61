"""The family of context methods: every step of the paper's path equals its equation, in whole models.

As in test_fidelity.py, whose tools are used here: the oracle is the base model without an adapter, run with an
attention function of our own that computes the stated equation from copies of the adapter's parameters.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

import test_fidelity as fidelity
from prefixmemory import PrefixMemoryConfig, reference
from prefixmemory.memories.prefix import PrefixVectors
from prefixmemory.memories.registry import MemorySite
from prefixmemory.tuner.layers import memory_layers
from test_fidelity import PLAIN_MAPS, TOLERANCE, Oracle, Result, difference, family_model, padded_batch, run_adapter
from tiny import memory_parameters, with_memory

ORACLE = "context_oracle"
LENGTH = 3
# transformers compiles flex attention, and torch's compiler trips over deprecations of its own.
BACKENDS = [
    "eager",
    "sdpa",
    pytest.param("flex_attention", marks=pytest.mark.filterwarnings("ignore::DeprecationWarning")),
]
ALL_FAMILIES = list(fidelity.CONFIGS)

Equation = Callable[..., Tensor]


# --- the equations ----------------------------------------------------------------------------------------------


class Step:
    """What an equation reads: the parameters of one layer, and what attention receives in it."""

    def __init__(self, oracle: Oracle, layer: int, q, k, v, allowed, scaling, softcap) -> None:
        self.oracle, self.layer, self.config = oracle, layer, oracle.config
        self.q, self.k, self.v, self.allowed = q, k, v, allowed
        self.scaling, self.softcap = scaling, softcap
        rows = q.shape[0]
        self.prefix_k, self.prefix_v = (oracle.leaf(layer, n).expand(rows, -1, -1, -1) for n in ("keys", "values"))
        content = self.config.query == "content" and oracle.content_query is not None  # GPT-2 does not rotate
        self.query = oracle.content_query if content else q

    @property
    def base(self) -> Tensor:
        return reference.attention(self.q, self.k, self.v, self.allowed, self.scaling, self.softcap)

    @property
    def of_prefix(self) -> Tensor:
        """Attention to the prefix alone, with the query that attention sees."""
        return reference.attention(self.q, self.prefix_k, self.prefix_v, None, self.scaling, self.softcap)

    def mixed(self, answer: Tensor) -> Tensor:
        """λ·o + (1 − λ)·answer, or o + answer."""
        if self.config.mixing == "none":
            return self.base + self.config.scale * answer
        share = torch.tensor(self.config.mix)
        if self.config.mixing != "fixed":
            share = torch.sigmoid(self.oracle.leaf(self.layer, "logit"))[:, None, None]
        return share * self.base + (1 - share) * answer


def concatenated(s: Step) -> Tensor:
    """Step 1, written out: one softmax over the keys of prefix and input."""
    keys, values = torch.cat([s.prefix_k, s.k], dim=2), torch.cat([s.prefix_v, s.v], dim=2)
    scores = reference.scores(s.q, keys, s.scaling, s.softcap)
    length = s.prefix_k.shape[2]
    dose = torch.zeros(keys.shape[2])
    dose[:length] = math.log(s.config.scale)
    visible = F.pad(s.allowed, (length, 0), value=True)
    weights = (scores + dose).masked_fill(~visible, -torch.inf).softmax(dim=-1)
    return weights @ reference.repeat_kv(values, s.q.shape[1])


def shared(s: Step) -> Tensor:
    """Step 1 again: (1 − α)·base + α·prefix attention."""
    assert s.softcap is None
    alpha = reference.prefix_share(s.q, s.k, s.prefix_k, s.allowed)
    return (1 - alpha) * s.base + alpha * s.of_prefix


def exact_softmax(s: Step) -> Tensor:
    """Step 2: prefix attention, normalised on its own."""
    return s.mixed(reference.attention(s.query, s.prefix_k, s.prefix_v, scaling=s.scaling))


def phi(s: Step) -> Callable[[Tensor], Tensor]:
    if s.config.feature_map != "mlp":
        return PLAIN_MAPS[s.config.feature_map]

    def mlp(x: Tensor) -> Tensor:  # one W and b per key/value head
        w, b = (s.oracle.per_head(s.oracle.leaf(s.layer, name), s.q.shape[1]) for name in ("W", "b"))
        return F.relu(x @ w + b[:, None])

    return mlp


def kernel(s: Step) -> Tensor:
    """Step 3: φ(q)·φ(k) in place of the softmax."""
    if s.config.normalizer:
        return s.mixed(reference.kernel_prefix(s.query, s.prefix_k, s.prefix_v, phi(s)))
    heads = s.q.shape[1]
    similarity = phi(s)(s.query) @ phi(s)(reference.repeat_kv(s.prefix_k, heads)).transpose(-1, -2)
    return s.mixed(similarity @ reference.repeat_kv(s.prefix_v, heads))


_equation: Equation = concatenated


def oracle_attention(module, query, key, value, attention_mask, scaling=None, softcap=None, **kwargs):
    oracle = fidelity._current
    oracle.layers_called.append(module.layer_idx)
    step = Step(oracle, module.layer_idx, query, key, value, attention_mask == 0, scaling, softcap)
    out = _equation(step)
    oracle.content_query = None
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(ORACLE, oracle_attention)
AttentionMaskInterface.register(ORACLE, eager_mask)


def run_equation(
    equation: Equation, family: str, config: PrefixMemoryConfig, parameters: dict[str, Tensor], backward: bool = True
) -> Result:
    global _equation
    _equation = equation
    model = family_model(family, ORACLE)
    leaves = {name: p.detach().clone().requires_grad_() for name, p in parameters.items()}
    oracle = Oracle(config, leaves)
    ids, mask = padded_batch()
    with fidelity.answering_from(oracle, model), torch.set_grad_enabled(backward):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
    assert oracle.layers_called == list(range(model.config.num_hidden_layers))
    return fidelity.result(logits, leaves, backward)


def adapted(family: str, attention: str, **fields: Any):
    return with_memory(family_model(family, attention), **{"prefix_length": LENGTH, **fields})


def compare(equation: Equation, family: str, attention: str, **fields: Any) -> None:
    """Assert that adapter and equation agree in logits, and in the gradient of every parameter."""
    if (family, attention) == ("gemma2", "sdpa"):
        pytest.skip("transformers has no sdpa for Gemma 2: it cannot cap the scores")
    backward = attention != "flex_attention"  # torch: 'FlexAttention does not support backward on CPU'
    if not backward:
        torch.compiler.reset()  # compiled with a prefix and then without: its C++ does not compile (CPU, torch 2.13)
    model = adapted(family, attention, **fields)
    parameters = memory_parameters(model)
    ours = run_adapter(model, *padded_batch(), backward)
    theirs = run_equation(equation, family, model.peft_config["default"], parameters, backward)
    assert set(ours.gradients) == (set(theirs.gradients) if backward else set())
    assert difference(ours, theirs) < TOLERANCE


# --- step 1: inside the softmax ---------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_inside_is_one_softmax_over_prefix_and_input_in_every_family(family, attention):
    compare(concatenated, family, attention, placement="inside")


@pytest.mark.parametrize(
    ("equation", "family"), [(concatenated, "llama_gqa"), (shared, "llama_gqa"), (shared, "llama")]
)
@pytest.mark.parametrize("attention", BACKENDS)
def test_inside_is_the_stated_softmax_and_the_stated_mixture_in_every_backend(family, attention, equation):
    compare(equation, family, attention, placement="inside")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("scale", [0.25, 3.0])
def test_the_scale_multiplies_the_weights_of_the_prefix_in_the_softmax(attention, scale):
    compare(concatenated, "llama_gqa", attention, placement="inside", scale=scale)


# --- steps 2 and 3: outside -------------------------------------------------------------------------------------

MIXINGS = [dict(mixing="none"), dict(mixing="fixed", mix=0.3), dict(mixing="layer"), dict(mixing="head")]
# flex attention is compiled anew for each test, and what stands outside does not touch it
EVERY_BACKEND = [
    *((attention, mixing) for attention in ("eager", "sdpa") for mixing in MIXINGS),
    *(
        pytest.param("flex_attention", mixing, marks=pytest.mark.filterwarnings("ignore::DeprecationWarning"))
        for mixing in (MIXINGS[1], MIXINGS[-1])
    ),
]


@pytest.mark.parametrize(("attention", "mixing"), EVERY_BACKEND, ids=str)
def test_outside_is_the_stated_mixture_with_an_exact_softmax(attention, mixing):
    compare(exact_softmax, "llama_gqa", attention, similarity="softmax", **mixing)


@pytest.mark.parametrize("query", ["content", "rotary"])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_outside_with_an_exact_softmax_in_every_family(family, query):
    compare(exact_softmax, family, "eager", similarity="softmax", mixing="head", query=query)


# Features that are never negative: only then is the normaliser far from zero for certain.
@pytest.mark.parametrize("normalizer", [dict(), dict(normalizer=True, feature_map="softmax")], ids=str)
@pytest.mark.parametrize(("attention", "mixing"), EVERY_BACKEND, ids=str)
def test_the_kernel_form_is_the_stated_sum(attention, mixing, normalizer):
    compare(kernel, "llama_gqa", attention, similarity="feature_map", **mixing, **normalizer)


@pytest.mark.parametrize("feature_map", [*PLAIN_MAPS, "mlp"])
@pytest.mark.parametrize("query", ["content", "rotary"])
def test_the_kernel_form_with_every_feature_map(feature_map, query):
    compare(kernel, "llama_gqa", "eager", feature_map=feature_map, query=query)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_the_kernel_form_in_every_family(family):
    compare(kernel, family, "eager", feature_map="softmax", normalizer=True, mixing="fixed")


def prefix(**fields: Any) -> PrefixVectors:
    """Filled prefix vectors for 4 query heads on 2 key/value heads."""
    module = PrefixVectors(MemorySite(4, 2, 8, 6, scaling=8**-0.5), prefix_length=LENGTH, **fields)
    nn.init.normal_(module.values)
    return module


@pytest.mark.parametrize("normalizer", [True, False])
@pytest.mark.parametrize("feature_map", ["softmax", "mlp"])
def test_the_kernel_form_computed_from_vectors_is_that_computed_from_B_and_n(feature_map, normalizer):
    module, q = prefix(feature_map=feature_map, normalizer=normalizer), torch.randn(2, 5, 4, 8)
    if feature_map == "mlp":
        nn.init.uniform_(module.feature_map.b, 1.0, 2.0)  # away from a normaliser of zero
    with torch.no_grad():
        bank, n = module.kernel()
        assert bank.shape == (2, 8, 6) and n.shape == (2, 8)
        for head in range(4):
            group = head // 2
            features = phi_of_group(module, q[:, :, head], group)
            from_kernel = features @ bank[group]
            similarity = features @ phi_of_group(module, module.keys[group], group).T
            from_vectors = similarity @ module.values[group]
            if normalizer:
                from_kernel = from_kernel / (features @ n[group])[..., None]
                from_vectors = from_vectors / similarity.sum(dim=-1, keepdim=True)
            # sums over features and vectors in another order: as far apart as their values, of about 80, are large
            within = dict(atol=TOLERANCE * max(1.0, float(from_vectors.abs().max())), rtol=0)
            torch.testing.assert_close(from_kernel, from_vectors, **within)
            torch.testing.assert_close(module(q)[:, :, head], from_vectors, **within)


def test_a_query_that_shares_no_feature_with_the_prefix_gets_nothing_rather_than_0_by_0():
    module = prefix(feature_map="relu", normalizer=True)
    with torch.no_grad():
        module.keys[:, :, :4], module.keys[:, :, 4:] = 1.0, -1.0
        here, there = torch.ones(1, 4, 4), -torch.ones(1, 4, 4)
    assert module(torch.cat([here, there], dim=-1)).abs().min() > 0
    answer = module(torch.cat([there, here], dim=-1))
    assert answer.abs().max() == 0
    answer.sum().backward()
    assert torch.isfinite(module.keys.grad).all() and torch.isfinite(module.values.grad).all()


def phi_of_group(module: PrefixVectors, x: Tensor, group: int) -> Tensor:
    if isinstance(getattr(module.feature_map, "W", None), Tensor):
        return F.relu(x @ module.feature_map.W[group] + module.feature_map.b[group])
    return x.softmax(dim=-1)


# --- negative controls ------------------------------------------------------------------------------------------


def far(equation: Equation, **fields: Any) -> bool:
    """Whether an equation with a fault in it is far from the adapter."""
    model = adapted("llama_gqa", "eager", **fields)
    ours = run_adapter(model, *padded_batch(), backward=False)
    config, parameters = model.peft_config["default"], memory_parameters(model)
    theirs = run_equation(equation, "llama_gqa", config, parameters, backward=False)
    return bool((ours.logits - theirs.logits).abs().max() > 1e2 * TOLERANCE)


def share_without_one_key(s: Step) -> Tensor:
    alpha = reference.prefix_share(s.q, s.k, s.prefix_k[:, :, 1:], s.allowed)
    return (1 - alpha) * s.base + alpha * s.of_prefix


def share_of_another_group(s: Step) -> Tensor:
    s.prefix_k = s.prefix_k.roll(1, dims=1)
    return shared(s)


def swapped_mixture(s: Step) -> Tensor:
    s.config = copy.copy(s.config)
    s.config.mix = 1 - s.config.mix
    return exact_softmax(s)


def not_normalised(s: Step) -> Tensor:
    s.config = copy.copy(s.config)
    s.config.normalizer = False
    return kernel(s)


@pytest.mark.parametrize(
    ("equation", "fields"),
    [
        (share_without_one_key, dict(placement="inside")),
        (share_of_another_group, dict(placement="inside")),
        (exact_softmax, dict(placement="inside")),
        (swapped_mixture, dict(similarity="softmax", mixing="fixed", mix=0.3)),
        (concatenated, dict(similarity="softmax")),
        (not_normalised, dict(feature_map="softmax", normalizer=True)),
    ],
)
def test_negative_control_a_fault_in_the_equation_is_far_away(equation, fields):
    assert far(equation, **fields)


# --- training ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        dict(placement="inside"),
        dict(placement="inside", reparameterize=6),
        dict(similarity="softmax", mixing="head"),
        dict(similarity="softmax", reparameterize=6, mixing="layer"),
        dict(feature_map="mlp", mixing="layer", query="rotary"),
        dict(feature_map="softmax", normalizer=True, mixing="head"),
    ],
    ids=str,
)
def test_gradients_reach_every_parameter(fields):
    """Of every layer and head; the keys' once the values, which start at zero, have moved."""
    model = adapted("llama_gqa", "eager", **fields)
    ours = run_adapter(model, *padded_batch())
    assert set(ours.gradients) == set(memory_parameters(model))
    for name, gradient in ours.gradients.items():
        assert gradient.abs().amax(dim=tuple(range(1, gradient.ndim))).min() > 0, name


@pytest.mark.parametrize("fields", [dict(), dict(placement="inside"), dict(reparameterize=6)], ids=str)
def test_values_start_at_zero_and_get_the_first_gradient(fields):
    model = with_memory(family_model("llama_gqa", "eager"), fill=False, prefix_length=LENGTH, **fields)
    for layer in memory_layers(model):
        keys, values = layer.memory("default").vectors()
        assert values.abs().max() == 0 and keys.abs().max() > 0
    gradients = run_adapter(model, *padded_batch()).gradients
    values = [g for name, g in gradients.items() if name.endswith((".values", ".mlp.2.weight"))]
    assert len(values) == 2 and all(g.abs().max() > 0 for g in values)


@pytest.mark.parametrize("placement", ["inside", "outside"])
def test_a_reparameterised_prefix_is_the_prefix_that_its_mlp_makes(placement):
    """Li and Liang's MLP is a way to train: with the vectors that it makes, the plain form answers the same."""
    through_mlp = adapted("llama_gqa", "eager", placement=placement, reparameterize=6)
    plain = adapted("llama_gqa", "eager", placement=placement)
    with torch.no_grad():
        for a, b in zip(memory_layers(plain), memory_layers(through_mlp), strict=True):
            keys, values = b.memory("default").vectors()
            a.memory("default").keys.copy_(keys)
            a.memory("default").values.copy_(values)
    ids, mask = padded_batch()
    a, b = (run_adapter(model, ids, mask, backward=False).logits for model in (plain, through_mlp))
    torch.testing.assert_close(a, b, atol=TOLERANCE, rtol=0)
