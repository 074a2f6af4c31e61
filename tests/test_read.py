"""kernels/read.py against reference.py: outputs and every gradient, at odd lengths, on tensors that are no rows."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from prefixmemory import reference
from prefixmemory.kernels import read as reading
from prefixmemory.kernels.limit import add, add_product
from prefixmemory.kernels.read import memory_output, read

HEADS, QUERY, FEATURES, VALUE = 4, 6, 6, 5
MAPS: dict[str, Callable[[Tensor], Tensor]] = {"elu": F.elu, "gelu": F.gelu, "softmax": lambda q: q.softmax(dim=-1)}
CASES = list(itertools.product(MAPS, ("full", "low rank"), (4, 2, 1), (False, True), (None, 0.5)))


def tensors(groups: int, rank: str, mean: bool, length: int) -> dict[str, Tensor]:
    """Leaves that want gradients; the query is a view with gaps, as in a fused projection."""
    draw = torch.Generator().manual_seed(length)

    def leaf(*shape: int, size: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=draw, dtype=torch.float64) * size).requires_grad_()

    made = {"fused": leaf(2, length, 3 * HEADS * QUERY), "own": leaf(2, length, HEADS, VALUE, size=0.3)}
    if rank == "full":
        made["M"] = leaf(groups, FEATURES, VALUE)
    else:
        made |= {"A": leaf(groups, FEATURES, 3), "B": leaf(groups, 3, VALUE)}
    return made | ({"mean": leaf(groups, FEATURES).detach()} if mean else {})


def by_reference(made: dict[str, Tensor], phi: Callable[[Tensor], Tensor], limit: float | None, scale: float) -> Tensor:
    matrix = made["M"] if "M" in made else made["A"] @ made["B"]
    repeat = HEADS // matrix.shape[0]
    q, own = query_of(made).transpose(1, 2), made["own"].transpose(1, 2)
    if "mean" in made:
        phi = reference.feature_mean(phi, made["mean"].repeat_interleave(repeat, dim=0))
    answer = reference.read_memory(q, matrix.repeat_interleave(repeat, dim=0), phi)
    answer = answer if limit is None else reference.limited(answer, own, limit)
    return (own + scale * answer).transpose(1, 2)


def query_of(made: dict[str, Tensor]) -> Tensor:
    return made["fused"][..., : HEADS * QUERY].unflatten(-1, (HEADS, QUERY))


def by_kernel(
    made: dict[str, Tensor], phi: Callable[[Tensor], Tensor], limit: float | None, scale: float, keep: bool = True
) -> Tensor:
    factors = (made["M"],) if "M" in made else (made["A"], made["B"])
    return read(query_of(made), made["own"], factors, phi, made.get("mean"), limit, scale, keep=keep)


def gradients(output: Tensor, made: dict[str, Tensor]) -> dict[str, Tensor]:
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    leaves = {name: tensor for name, tensor in made.items() if tensor.requires_grad}
    return dict(zip(leaves, torch.autograd.grad((output * weights).sum(), leaves.values()), strict=True))


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("length", [1, 7])
@pytest.mark.parametrize(("phi", "rank", "groups", "mean", "limit"), CASES)
def test_outputs_and_gradients_are_those_of_the_reference(phi, rank, groups, mean, limit, length, keep):
    made = tensors(groups, rank, mean, length)
    ours, theirs = by_kernel(made, MAPS[phi], limit, 0.7, keep), by_reference(made, MAPS[phi], limit, 0.7)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-9)
    expected = gradients(theirs, made)
    for name, gradient in gradients(ours, made).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-11, rtol=1e-8)
    # controls: another scale, and another entry of a factor, are noticed
    assert (by_kernel(made, MAPS[phi], limit, 0.71) - theirs).abs().max() > 1e-4
    with torch.no_grad():
        made["M" if rank == "full" else "A"][0, 0, 0] += 0.01
    assert (by_kernel(made, MAPS[phi], limit, 0.7) - theirs).abs().max() > 1e-6


def test_what_is_added_to_what_others_have_added_is_limited_by_the_heads_own_output():
    own, first, second = (torch.randn(2, 3, 4, 5) for _ in range(3))
    both = add(own, second, 0.5, 2.0, onto=add(own, first, 0.5))
    torch.testing.assert_close(both, own + reference.limited(first, own, 0.5) + 2 * reference.limited(second, own, 0.5))
    assert not torch.allclose(both, add(add(own, first, 0.5), second, 0.5, 2.0))  # control: limited by the sum


def test_gradients_of_what_is_added_to_what_others_have_added():
    """They reach it, and the heads' own output through the limit alone."""
    own, onto, hidden, B = (
        torch.randn(*shape, dtype=torch.float64) for shape in ((2, 3, 4, 5),) * 2 + ((2, 3, 4, 3), (2, 3, 5))
    )
    leaves = [x.requires_grad_() for x in (own, onto, hidden, B)]
    each = B.repeat_interleave(2, dim=0)
    exact = onto + 0.7 * reference.limited(torch.einsum("bthr,hrv->bthv", hidden, each), own, 0.5)
    found = add_product(own, hidden, B, 0.5, 0.7, onto)
    weights = torch.randn_like(own)
    expected = torch.autograd.grad((exact * weights).sum(), leaves)
    for gradient, right in zip(torch.autograd.grad((found * weights).sum(), leaves), expected, strict=True):
        torch.testing.assert_close(gradient, right)
    assert not torch.allclose(expected[0], weights)  # control: as if it were added to the heads' own output


@pytest.mark.parametrize("groups", [4, 1])
@pytest.mark.parametrize("heads", [4, 1])
def test_a_model_may_write_into_the_sum(heads, groups):
    """As Falcon does into that of a feed-forward block."""
    groups = min(groups, heads)
    own, hidden = torch.randn(2, 3, heads, 5), torch.randn(2, 3, heads, 3, requires_grad=True)
    B = torch.randn(groups, 3, 5, requires_grad=True)
    plain = add_product(own, hidden, B, 0.5)
    written = add_product(own, hidden, B, 0.5)
    written += 1
    torch.testing.assert_close(written, plain + 1)
    expected = torch.autograd.grad(plain.sum(), (hidden, B))
    torch.testing.assert_close(torch.autograd.grad(written.sum(), (hidden, B)), expected)


FLOATS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize(("outputs", "factors"), [*itertools.product(FLOATS, FLOATS)])
@pytest.mark.parametrize("groups", [4, 1])
@pytest.mark.parametrize("loud", [1.0, 300.0])
def test_products_are_learned_in_every_dtype_as_in_the_widest(outputs, factors, groups, loud):
    """Also where squares overflow float16; values and gradients are of the dtype that they were given in."""
    made = {name: tensor.detach() for name, tensor in tensors(groups, "low rank", True, 7).items()}
    made |= {"own": made["own"].mul(loud).to(outputs), "B": made["B"] * loud}
    made = {name: x if name == "own" else x.to(factors) for name, x in made.items()}
    narrow = {name: x.clone().requires_grad_(name != "mean") for name, x in made.items()}
    wide = {name: x.double().requires_grad_(name != "mean") for name, x in made.items()}
    found, exact = by_kernel(narrow, F.elu, 0.5, 0.7, keep=False), by_kernel(wide, F.elu, 0.5, 0.7, keep=False)
    assert found.dtype == outputs
    near = 8 * max(torch.finfo(dtype).eps for dtype in (outputs, factors))
    assert (found.double() - exact).abs().max() < near * exact.abs().max()
    expected = gradients(exact, wide)
    for name, gradient in gradients(found, narrow).items():
        assert gradient.dtype == narrow[name].dtype
        assert (gradient.double() - expected[name]).abs().max() < near * expected[name].abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_features_without_spread_are_cancelled_by_their_mean(dtype):
    """The mean is subtracted within the product; nothing is lost where it is nearly all there is."""
    mean = torch.randn(4, 6) + 4
    query = (mean + 0.1 * torch.randn(2, 9, 4, 6)).to(dtype)
    matrix = torch.randn(4, 6, 5).to(dtype)
    found = memory_output(query, (matrix,), lambda q: q, mean.to(dtype))
    exact = torch.einsum("bthf,hfv->bthv", query.double() - mean.to(dtype).double(), matrix.double())
    size = float(query.double().norm(dim=-1).max() * matrix.double().norm(dim=1).max())
    assert (found.double() - exact).abs().max() < 2 * torch.finfo(dtype).eps * size


def test_weights_of_one_dtype_and_outputs_of_another_keep_the_outputs_dtype():
    query, own, matrix = torch.randn(1, 3, 4, 6), torch.randn(1, 3, 4, 5).bfloat16(), torch.randn(4, 6, 5)
    found = read(query, own, (matrix,), F.elu, limit=0.5)
    assert found.dtype == torch.bfloat16
    exact = read(query, own.float(), (matrix,), F.elu, limit=0.5)
    torch.testing.assert_close(found.float(), exact, atol=0.02, rtol=0.01)


def kept(work: Callable[[], Tensor]) -> dict[int, int]:
    """Addresses of the storages that autograd keeps for the backward pass, and how many numbers each holds."""
    found: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        work()
    return found


@pytest.mark.parametrize(("rank", "of_a_head"), [("full", 0), ("low rank", 3 + 3)])
def test_what_is_not_kept_is_all_but_the_arguments_and_a_few_numbers_a_head(rank, of_a_head):
    made = tensors(HEADS, rank, mean=True, length=7)
    given = {tensor.untyped_storage().data_ptr() for tensor in made.values()}

    def beside(keep: bool) -> int:
        found = kept(lambda: by_kernel(made, F.elu, 0.5, 1.0, keep))
        return sum(size for address, size in found.items() if address not in given)

    heads, gram = 2 * 7 * HEADS, 0 if rank == "full" else HEADS * 3 * 3
    assert beside(keep=False) == heads * of_a_head + gram
    assert beside(keep=True) >= heads * (of_a_head + FEATURES)  # the control


def test_what_is_computed_again_is_computed_in_autocasts_dtype():
    made = {
        name: tensor.detach().float().requires_grad_(name != "mean")
        for name, tensor in tensors(HEADS, "low rank", True, 7).items()
    }
    found = []
    for keep in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            output = by_kernel(made, F.elu, 0.5, 1.0, keep)
        found.append(gradients(output, made))  # outside of it, as in a training step
    exact = gradients(by_kernel(made, F.elu, 0.5, 1.0, keep=False), made)
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-5)
        assert (exact[name] - gradient).abs().max() > 1e-4


def test_a_memory_that_did_not_keep_learns_where_the_query_wants_no_gradient():
    made = tensors(HEADS, "low rank", mean=True, length=7)
    made["fused"].requires_grad_(False)
    ours = gradients(by_kernel(made, F.elu, 0.5, 0.7, keep=False), made)
    theirs = gradients(by_reference(made, F.elu, 0.5, 0.7), made)
    assert set(ours) == {"own", "A", "B"}
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name])


@pytest.mark.parametrize("limit", [None, 0.5])
def test_what_others_have_added_passes_its_gradient_on(limit):
    made = tensors(HEADS, "low rank", mean=True, length=7) | {
        "onto": torch.randn(2, 7, HEADS, VALUE, dtype=torch.float64)
    }
    made["onto"].requires_grad_()
    arguments = query_of(made), made["own"], (made["A"], made["B"]), F.elu, made["mean"], limit, 0.7, made["onto"]
    leaves, found = [made[name] for name in ("fused", "own", "A", "B", "onto")], []
    for keep in (True, False):
        output = read(*arguments, keep=keep)
        weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
        found.append(torch.autograd.grad((output * weights).sum(), leaves, allow_unused=True, materialize_grads=True))
    assert torch.equal(found[1][-1].flatten(), weights.flatten()) and found[1][1].any() == (limit is not None)
    for ours, theirs in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("keep", [True, False])
def test_without_a_limit_there_are_gradients_of_gradients(keep):
    made = tensors(HEADS, "low rank", mean=True, length=7)
    first = torch.autograd.grad(by_kernel(made, F.elu, None, 0.7, keep).pow(2).sum(), [made["B"]], create_graph=True)[0]
    exact = torch.autograd.grad(by_reference(made, F.elu, None, 0.7).pow(2).sum(), [made["B"]], create_graph=True)[0]
    names = ["fused", "own", "A", "B"]
    found, expected = (torch.autograd.grad(x.pow(2).sum(), [made[name] for name in names]) for x in (first, exact))
    for ours, theirs in zip(found, expected, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs)


def test_where_nothing_learns_no_function_of_autograd_stands_in_the_way(monkeypatch):
    """Which transforms and tracers of PyTorch could not pass."""
    made = tensors(HEADS, "low rank", mean=True, length=7)
    monkeypatch.setattr(reading._Again, "apply", lambda *args: pytest.fail("it stands there"))
    with pytest.raises(pytest.fail.Exception):
        by_kernel(made, F.elu, None, 1.0, keep=False)
    by_kernel({name: tensor.detach() for name, tensor in made.items()}, F.elu, None, 1.0, keep=False)
