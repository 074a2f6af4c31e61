"""The Triton kernels against reference.py: outputs and every gradient, on views into memory that is NaN elsewhere.

Without a GPU Triton interprets its kernels (``conftest.py``), and what it would launch on a card is compiled for one.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed: it has wheels for Linux alone", allow_module_level=True)

import test_serving_bank as served
from prefixmemory import PrefixMemoryError, reference, register_feature_map, set_impl
from prefixmemory.kernels import impl, triton_read
from prefixmemory.kernels.impl import KINDS, NORMS, Product
from prefixmemory.serving.bank import LayerBank, forms
from prefixmemory.serving.served import read_memory
from prefixmemory.tuner.layers import reads_by
from processes import run_python
from tiny import DEFAULT, build, memory_parameters, tokens, with_memory

DEVICE = torch.device("cpu" if impl.INTERPRETED else "cuda")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which deterministic products of the reference want
interpreted = pytest.mark.skipif(not impl.INTERPRETED, reason="on a card, benchmarks/triton_read.py checks a bank")
HEADS, QUERY, VALUE, RANK = 2, 6, 5, 3
#: Of the largest value. float16 and bfloat16: eight times their rounding, since features, h and ∂a are rounded.
RELATIVE = {torch.float32: 1e-5, torch.bfloat16: 8 * 2**-8, torch.float16: 8 * 2**-11}
MAPS = {
    "elu": F.elu, "gelu": F.gelu, "relu": F.relu, "silu": F.silu, "identity": lambda x: x,
    "softmax": lambda x: x.softmax(-1),
}  # fmt: skip
AROUND = {
    "none": lambda phi: phi,
    "feature_mean": lambda phi: phi,
    "query_rms": reference.query_rms,
    "feature_l2": reference.feature_l2,
}
CASES = list(itertools.product(KINDS, AROUND, ("full", "low rank"), (HEADS, 1), (None, 0.5)))


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan() -> Iterator[None]:
    """What a kernel should have written and did not is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def by_triton() -> Iterator[None]:
    set_impl("triton")
    yield
    set_impl("auto")


class Case:
    """Leaves that want gradients, each a view into a tensor that is NaN around it."""

    def __init__(self, batch: tuple[int, ...], form: tuple[str, str], rank: str, groups: int, **fields) -> None:
        self.heads = fields.pop("heads", HEADS)
        self.dtype = fields.pop("dtype", torch.float32)
        size, value = fields.pop("sizes", (QUERY, VALUE))
        self.memories, self.form = fields.pop("memories", ()), form
        self.limit, self.scale, self.onto = fields.pop("limit", None), 0.7, None
        self.leaves = {
            "query": self.view(*batch, self.heads, size),
            "outputs": self.view(*batch, self.heads, value, spread=0.3),
        }
        if fields.pop("onto", False):
            self.leaves["onto"] = self.view(*batch, self.heads, value)
        shapes = {"M": (size, value)} if rank == "full" else {"A": (size, RANK), "B": (RANK, value)}
        self.leaves |= {name: self.view(*self.memories, groups, *shape) for name, shape in shapes.items()}
        self.factors = [self.leaves[name] for name in shapes]
        has_mean = form[1] == "feature_mean"
        self.mean = self.view(*self.memories, groups, size).detach() if has_mean else None
        assert not fields

    def view(self, *shape: int, spread: float = 1.0) -> Tensor:
        around = torch.full([n + 3 for n in shape], float("nan"), dtype=self.dtype, device=DEVICE)
        view = around[tuple(slice(2, 2 + n) for n in shape)]
        return view.copy_(torch.randn(shape) * spread).requires_grad_()

    def product(self) -> Product:
        norm = "none" if self.form[1] == "feature_mean" else self.form[1]
        return Product(tuple(self.factors), MAPS[self.form[0]], self.mean, (self.form[0], norm))

    def read(self) -> Tensor:
        query, outputs = self.leaves["query"], self.leaves["outputs"]
        return triton_read.read(query, outputs, self.product(), self.limit, self.scale, self.leaves.get("onto"))

    def expected(self, leaves: dict[str, Tensor]) -> Tensor:
        """By the reference, in double precision."""
        answer = memory_output(leaves, self.mean, self.form, self.limit)
        return leaves.get("onto", leaves["outputs"]) + self.scale * answer

    def check(self) -> None:
        """Outputs and gradients are those of the reference."""
        found = self.read()
        exact = {name: leaf.detach().double().requires_grad_() for name, leaf in self.leaves.items()}
        expected = self.expected(exact)
        assert found.dtype == self.dtype and found.shape == expected.shape
        close(found, expected, self.dtype, "outputs")
        weights = torch.randn(expected.shape, dtype=torch.float64, device=DEVICE).to(self.dtype)
        unused = {"allow_unused": True, "materialize_grads": True}  # without a limit, the heads' own outputs
        ours = torch.autograd.grad(found, list(self.leaves.values()), weights, **unused)
        theirs = torch.autograd.grad(expected, list(exact.values()), weights.double(), **unused)
        for name, gradient, right in zip(self.leaves, ours, theirs, strict=True):
            assert gradient.dtype == self.dtype
            close(gradient, right, self.dtype, name)


def memory_output(leaves: dict[str, Tensor], mean: Tensor | None, form: tuple[str, str], limit: float | None) -> Tensor:
    """The limited memory output of the reference, ``[*b, heads, value]``."""
    query, own = (leaves[name].flatten(end_dim=-3).transpose(0, 1)[None] for name in ("query", "outputs"))
    matrix = leaves["M"] if "M" in leaves else leaves["A"] @ leaves["B"]
    repeat = query.shape[1] // matrix.shape[0]
    phi = AROUND[form[1]](MAPS[form[0]])
    if mean is not None:
        phi = reference.feature_mean(phi, mean.double().repeat_interleave(repeat, dim=0))
    answer = reference.read_memory(query, matrix.repeat_interleave(repeat, dim=0), phi)
    answer = answer if limit is None else reference.limited(answer, own, limit)
    return answer[0].transpose(0, 1).reshape(leaves["outputs"].shape)


def close(found: Tensor, expected: Tensor, dtype: torch.dtype, name: str) -> None:
    size = max(float(expected.detach().abs().max()), 1e-30)
    error = float((found.double() - expected).detach().abs().max()) / size
    assert error <= RELATIVE[dtype], f"{name} is off by {error:.2g} of its largest value"


@pytest.mark.parametrize(("kind", "norm", "rank", "groups", "limit"), CASES)
def test_outputs_and_gradients_are_those_of_the_reference(kind, norm, rank, groups, limit):
    Case((2, 3), (kind, norm), rank, groups, limit=limit).check()


@pytest.mark.parametrize("batch", [(1,), (17,), (1, 1), (3, 11), (2, 1, 7)])
@pytest.mark.parametrize("rank", ["full", "low rank"])
def test_odd_lengths(batch, rank):
    Case(batch, ("elu", "feature_mean"), rank, HEADS, limit=0.5).check()


@pytest.mark.parametrize("heads", [6, 21])  # a memory of 3 heads; of 21, more than a tile holds
def test_odd_numbers_of_heads(heads):
    Case((2, 9), ("gelu", "none"), "low rank", 2 if heads == 6 else 1, heads=heads, limit=0.5).check()


@pytest.mark.parametrize("sizes", [(16, 16), (40, 33), (1, 1)])
@pytest.mark.parametrize("rank", ["full", "low rank"])
def test_odd_sizes_of_heads(sizes, rank):
    Case((1, 4), ("softmax", "feature_l2"), rank, 1, sizes=sizes, limit=0.5).check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", ["full", "low rank"])
@pytest.mark.parametrize("limit", [None, 0.5])
def test_half_precision(dtype, rank, limit):
    Case((2, 9), ("elu", "feature_mean"), rank, 1, dtype=dtype, limit=limit).check()


@pytest.mark.parametrize("limit", [None, 0.5])
def test_what_others_have_added_stays(limit):
    """The limit goes by the heads' own outputs; what is added to is something else."""
    Case((2, 3), ("elu", "none"), "low rank", HEADS, limit=limit, onto=True).check()


def test_heads_that_say_nothing():
    case = Case((1, 3), ("elu", "none"), "low rank", HEADS, limit=0.5)
    with torch.no_grad():
        case.leaves["outputs"].zero_()
    assert case.read().isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(case.read().sum(), list(case.leaves.values())))


def test_no_tokens_at_all():
    case = Case((2, 0), ("elu", "none"), "low rank", HEADS, limit=0.5)
    assert case.read().shape == (2, 0, HEADS, VALUE)
    assert all(not g.any() for g in torch.autograd.grad(case.read().sum(), list(case.leaves.values())))


class BankCase(Case):
    """Memories of some maps, all normalisations, with and without a limit; a row or token for each, one for none."""

    def __init__(self, kinds: Sequence[str], rank: str, groups: int, by_row: bool, norm: str = "feature_mean") -> None:
        self.forms, self.limits = zip(*itertools.product(itertools.product(kinds, NORMS), (None, 0.5)), strict=True)
        self.scales = [0.5 + 0.1 * n for n in range(len(self.forms))]
        slots = torch.arange(-1, len(self.forms), device=DEVICE)[torch.randperm(len(self.forms) + 1)]
        batch = (len(slots), 2) if by_row else (1, len(slots))
        super().__init__(batch, ("", norm), rank, groups, memories=(len(self.forms),))
        self.slots = slots[:, None].expand(batch) if by_row else slots[None]

    def read(self) -> Tensor:
        bank = triton_read.Bank.of(self.limits, self.scales, self.forms, DEVICE)
        query, outputs = self.leaves["query"], self.leaves["outputs"]
        return triton_read.read_bank(query, outputs, self.factors, self.slots, bank, self.mean)

    def expected(self, leaves: dict[str, Tensor]) -> Tensor:
        new = leaves["outputs"]
        for slot, form in enumerate(self.forms):
            one = {name: leaf if name in ("query", "outputs") else leaf[slot] for name, leaf in leaves.items()}
            mean = None if self.mean is None else self.mean[slot]
            answer = self.scales[slot] * memory_output(one, mean, form, self.limits[slot])
            mine = (self.slots == slot)[..., None, None]
            new = torch.where(mine, leaves["outputs"] + answer, new)
        return new


@pytest.mark.parametrize("rank", ["full", "low rank"])
@pytest.mark.parametrize("groups", [HEADS, 1])
@pytest.mark.parametrize("norm", ["none", "feature_mean"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_row_has_a_memory_of_its_own(kind, rank, groups, norm):
    BankCase([kind], rank, groups, by_row=True, norm=norm).check()


@pytest.mark.parametrize("few", [0, 512])
def test_each_token_has_a_memory_of_its_own(few, monkeypatch):
    """One program a token, and programs whose tokens have memories of several maps."""
    monkeypatch.setattr(triton_read, "FEW", few)
    BankCase(KINDS, "low rank", HEADS, by_row=False).check()


def test_tokens_without_a_memory_stay_as_they_are():
    case = BankCase(["elu"], "low rank", HEADS, by_row=False)
    case.slots = torch.full_like(case.slots, -1)
    assert torch.equal(case.read(), case.leaves["outputs"])


# --- controls: what is planted is noticed ------------------------------------------------------------------------


def plant(kernel: str, planted: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Launch a kernel with some of its constants wrong."""
    right = getattr(triton_read.kernels, kernel)

    class Planted:
        def __getitem__(self, grid):
            return lambda *args, **sizes: right[grid](*args, **sizes | planted)

    monkeypatch.setattr(triton_read.kernels, kernel, Planted())


@pytest.mark.parametrize(
    ("kernel", "planted"),
    [
        ("forward", {"KIND": KINDS.index("silu")}),
        ("forward", {"NORM": 1}),
        ("forward", {"CENTRE": 0}),
        ("forward", {"LIMIT": False}),
        ("forward", {"R": RANK - 1}),
        ("forward", {"V": VALUE - 1}),  # a column is not written
        ("forward", {"D": QUERY + 1}),  # one is read that is not there
        ("rows_backward", {"KIND": KINDS.index("silu")}),
        ("rows_backward", {"LIMIT": False}),
        ("rows_backward", {"ONTO": True}),
        ("rows_backward", {"V": VALUE - 1}),
        ("factors_backward", {"CENTRE": 0}),
        ("factors_backward", {"R": RANK - 1}),
        ("factors_backward", {"TOKENS": 9}),
    ],
)
def test_a_planted_error_is_noticed(kernel, planted, monkeypatch):
    case = Case((3, 11), ("elu", "feature_mean"), "low rank", HEADS, limit=0.5)
    case.check()
    plant(kernel, planted, monkeypatch)
    with pytest.raises(AssertionError, match="off by"):
        case.check()


# --- a server's slots --------------------------------------------------------------------------------------------


def test_forms_count_as_a_server_counts_them():
    assert forms()[: len(KINDS) * len(NORMS)] == list(itertools.product(KINDS, NORMS))


@interpreted
@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("few", [0, 512])
def test_a_servers_batch_of_all_kinds_answers_each_token_with_its_own(captured, few, by_triton, tmp_path, monkeypatch):
    monkeypatch.setattr(triton_read, "FEW", few)
    made = [served.memory(tmp_path / str(slot), kind)[1][1] for slot, kind in enumerate(served.KINDS)]
    slots = [slot for _ in range(2) for slot in (-1, *range(len(made)))]
    given = served.batch(len(slots))
    asked = [(torch.nan, 0.5)[place % 2] for place in range(len(slots))]  # scales of requests, NaN: the memory's own
    found = {}
    for choice in ("torch", "triton"):
        set_impl(choice)
        bank = served.bank(*made)
        assert bank.by_triton == (choice == "triton")
        found[choice] = given[0].flatten(1).clone()
        bank.add_(found[choice], given[1].flatten(1), given[2].flatten(1), served.step(slots, asked), captured=captured)
    close(found["triton"], found["torch"].double(), torch.float32, "outputs")
    silent = torch.tensor(slots) < 0
    assert torch.equal(found["triton"][silent], given[0].flatten(1)[silent])
    assert not torch.isclose(found["triton"][~silent], given[0].flatten(1)[~silent]).all(dim=1).any()


@interpreted
@pytest.mark.parametrize("planted", [{"SERVED": False}, {"CENTRE": 0}, {"BANK": False, "KIND": 0, "NORM": 0}])
def test_a_planted_error_in_a_servers_batch_is_noticed(planted, by_triton, tmp_path, monkeypatch):
    plant("forward", planted, monkeypatch)
    with pytest.raises(AssertionError, match="off by"):
        test_a_servers_batch_of_all_kinds_answers_each_token_with_its_own(True, 0, by_triton, tmp_path, monkeypatch)


@interpreted
def test_a_servers_kernel_is_compiled_by_an_empty_step_and_not_while_a_graph_is_recorded(by_triton, monkeypatch):
    """A server tries each size of a step before it records it."""
    launched = []
    monkeypatch.setattr(triton_read, "add_from_slots_", lambda outputs, *others: launched.append(len(outputs)))
    bank, given = served.bank(None), [x.flatten(1) for x in served.batch(60)]
    for tokens_of_step in (3, 60, 7, 60):
        monkeypatch.setattr(triton_read, "FEW", 50)
        bank.add_(*[x[:tokens_of_step] for x in given], served.step([-1] * tokens_of_step))
    assert launched == [3, 60]  # either kind once


@interpreted
def test_a_servers_slots_in_half_precision(by_triton, tmp_path):
    _, layers = served.memory(tmp_path, "default")
    given = [x.bfloat16() for x in served.batch(7)]
    sizes = served.SIZES
    bank = LayerBank(2, 8, sizes.heads, sizes.head_dim, sizes.value_dim, torch.bfloat16, torch.device("cpu"))
    bank.put(1, layers[0])
    found = given[0].flatten(1).clone()
    bank.add_(found, given[1].flatten(1), given[2].flatten(1), served.step([1] * 7))
    set_impl("torch")
    exact = served.bank(layers[0])
    expected = given[0].flatten(1).float()
    exact.add_(expected, given[1].flatten(1).float(), given[2].flatten(1).float(), served.step([0] * 7))
    close(found, expected.double(), torch.bfloat16, "outputs")


@interpreted
def test_a_map_that_is_registered_after_a_servers_slots_is_refused_by_name(by_triton, tmp_path, feature_map_names):
    bank = served.bank(None)
    register_feature_map("cosine")(torch.cos)
    with_memory(build(), feature_map="cosine", rank=4).save_pretrained(tmp_path)
    layers = read_memory(tmp_path, served.SIZES, served.LAYERS, served.RANK)
    with pytest.raises(PrefixMemoryError, match="feature_map='cosine' was registered when the server's slots"):
        bank.put(0, layers[0])
    assert not served.bank(None).by_triton  # those that are made now are read by torch


def test_the_benchmark_refuses_to_time_a_wrong_kernel(monkeypatch):
    file = Path(__file__).parent.parent / "benchmarks" / "triton_read.py"
    spec = importlib.util.spec_from_file_location("benchmark_of_reads", file)
    assert spec is not None and spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    one = benchmark.Read((2, 1, 16), "rank 8", 3, DEVICE)
    one.check("Triton")
    plant("rows_backward", {"LIMIT": False}, monkeypatch)
    with pytest.raises(SystemExit, match=r"Triton is wrong by .* in tensor 1: nothing is timed"):
        one.check("Triton")


# --- in models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        DEFAULT,
        {"query": "rotary", "share_heads": True, "rank": None, "feature_map": "gelu", "normalize": "query_rms"},
        {"feature_map": "mlp", "feature_dim": 5},  # whose features PyTorch computes, with gradients for their map
        {"feature_map": "mlp", "rank": None, "normalize": "feature_l2", "share_heads": True},
        {"feature_map": "cosine", "rank": 3},
        {"dropout": 0.5},
        {"prefix_length": 3},
        {"prefix_length": 3, "feature_map": "mlp"},
        {"rank": 4, "active_from": "invocation", "invocation_tokens": [5, 7]},
    ],
)
def test_a_model_says_and_learns_the_same(config, feature_map_names):
    register_feature_map("cosine")(torch.cos)
    model, ids = with_memory(build("llama_gqa"), **config).train().to(DEVICE), tokens(2, 9).to(DEVICE)
    ids[:, 4:6] = torch.tensor([5, 7], device=DEVICE)
    parameters = [p for p in memory_parameters(model).values() if p.requires_grad]
    found = []
    for choice in ("torch", "triton"):
        set_impl(choice)
        torch.manual_seed(0)
        logits = model(input_ids=ids, use_cache=False).logits
        weights = torch.linspace(-1, 1, logits.numel(), device=DEVICE).view_as(logits)
        found.append([logits, *torch.autograd.grad((logits * weights).sum(), parameters)])
        assert reads_by(model) == {"torch": "torch (chosen)", "triton": "triton"}[choice]
    set_impl("auto")
    with model.disable_adapter():
        assert (model(input_ids=ids, use_cache=False).logits - found[0][0]).abs().max() > 1e-3
    for ours, theirs in zip(found[1], found[0], strict=True):
        close(ours, theirs, torch.float32, "of the model")


def test_what_is_kept_for_the_backward_pass_is_what_was_given():
    """No features, no memory output: 0 bytes beyond the arguments."""
    case = Case((2, 3), ("elu", "feature_mean"), "low rank", HEADS, limit=0.5)
    given = {x.untyped_storage().data_ptr() for x in (*case.leaves.values(), case.mean)}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        case.read()
    assert kept and {x.untyped_storage().data_ptr() for x in kept} <= given


def test_the_operations_are_what_compilers_expect():
    case = Case((2, 3), ("elu", "feature_mean"), "low rank", HEADS)
    A, B = (factor.detach()[None].clone().requires_grad_() for factor in case.factors)
    query, outputs = (case.leaves[name].detach().clone().requires_grad_() for name in ("query", "outputs"))
    for tight in (0.0, 4.0):
        arguments = (query, outputs, None, A, B, case.mean[None], [], tight, 0.7, 1, 0, torch.float32)
        torch.library.opcheck(torch.ops.prefixmemory.read.default, arguments)


def test_a_compiled_model_is_one_graph():
    script = Path(__file__).with_name("triton_checks.py")
    out = run_python(script, PREFIXMEMORY_SHAPES="0", PREFIXMEMORY_IMPL="triton", TRITON_INTERPRET="1")
    assert out.endswith("all ok\n"), out


def test_what_would_be_launched_on_a_card_compiles_for_one():
    script = Path(__file__).with_name("triton_for_card.py")
    out = run_python(script, "--few", PREFIXMEMORY_SHAPES="0", TRITON_INTERPRET="0")
    assert out.endswith("all ok\n"), out


# --- what is chosen, and what is refused -------------------------------------------------------------------------


def test_auto_is_torch_until_the_kernel_is_trusted_on_the_device(monkeypatch):
    model = with_memory(build(), **DEFAULT)
    assert reads_by(model) == f"torch (on {DEVICE.type})"
    monkeypatch.setattr(impl, "TRUSTED", {DEVICE.type})
    assert reads_by(model) == "triton"


def test_a_choice_that_is_none_is_refused(untyped):
    with pytest.raises(PrefixMemoryError, match=r"impl='tirton' is not known\. Did you mean 'triton'"):
        set_impl("tirton")


def test_a_wrong_choice_in_the_environment_is_refused_when_a_memory_is_read(untyped, monkeypatch):
    monkeypatch.setattr(impl, "_impl", "cuda")
    model = with_memory(build())
    with pytest.raises(PrefixMemoryError, match="PREFIXMEMORY_IMPL='cuda' is not known"):
        model(input_ids=tokens(1, 4))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"mixing": "head"}, "mixed with the heads' own"),
        ({"prefix_length": 3, "normalizer": True}, "divided by a sum"),
        ({"prefix_length": 3, "similarity": "softmax"}, "divided by a sum"),
    ],
)
def test_a_memory_that_triton_cannot_read_is_refused_by_name(config, reason, by_triton):
    model = with_memory(build(), **config).train()
    assert reason in str(reads_by(model))
    with pytest.raises(PrefixMemoryError, match=rf"impl='triton' cannot read this memory: .*{reason}"):
        model(input_ids=tokens(1, 4))
    set_impl("torch")
    model(input_ids=tokens(1, 4))


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("_MISSING", "triton 3.2.0 is older than 3.4", "triton 3.2.0 is older than 3.4"),
        ("INTERPRETED", False, "it lies on cpu, where only"),
    ],
)
def test_a_machine_without_triton_is_refused_by_name(name, value, reason, by_triton, monkeypatch):
    monkeypatch.setattr(impl, name, value)
    with pytest.raises(PrefixMemoryError, match=reason):
        with_memory(build())(input_ids=tokens(1, 4))


def test_a_matrix_that_is_too_large_is_refused_by_name(by_triton):
    for factors, size in (((128, 128),), 64), (((128, 80), (80, 128)), 64):
        product = Product(tuple(torch.zeros(1, *each) for each in factors), F.elu)
        with pytest.raises(PrefixMemoryError, match=f"{size} KiB a head, padded, is too large for the kernel"):
            impl.fused(product, torch.zeros(1))


def test_double_precision_is_refused_by_name(by_triton):
    with pytest.raises(PrefixMemoryError, match="the kernel takes no float64"):
        impl.fused(Product((torch.zeros(1, 4, 4),), F.elu), torch.zeros(1, dtype=torch.float64))
