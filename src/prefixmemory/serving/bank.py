"""The memories that are in use, side by side in tensors of fixed size, and their output for a batch of many requests.

A layer's :class:`LayerBank` has a slot for each memory. All slots are read in one product: the factors of S memories of
rank r stand next to each other as those of one memory of rank S·r, and each token keeps the columns of its own. So
nothing depends on which memories a batch holds but the contents of tensors, as captured CUDA graphs need it. Where
Triton is asked for (``kernels/impl.py``), one kernel reads for each token the slot of its own instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from prefixmemory._shapes import Float
from prefixmemory.errors import PrefixMemoryError
from prefixmemory.kernels.impl import KINDS, NORMS, serves
from prefixmemory.kernels.limit import TINY
from prefixmemory.kernels.limit import add as add_one
from prefixmemory.memories.feature_maps import FEATURE_MAPS
from prefixmemory.memories.matrix import EPS
from prefixmemory.serving.served import Manner, ServedLayer, served_maps

#: φ and what is done to its argument or result: the names of both.
Form = tuple[str, str]


class Step:
    """Which slot each token of the engine's present step reads; one for all layers of a model.

    Attributes:
        slots: ``[max_tokens]``, the slot of each token, -1: none; on the device.
        scales: ``[max_tokens]``, the scale that each token's request asked for, NaN: the memory's own; on the device.
        scaled: whether any asked for one.
        used: the slots that occur, known to the host.
        rows: numbers of the tokens that read one, on the device; ``None``: all tokens.
        tokens: how many tokens the step has.
        shown: ``[max_tokens, heads·head_dim]``, the queries before rotation that a layer is shown.
        shown_by: the layer that showed them.
    """

    def __init__(self, max_tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.slots = torch.full((max_tokens,), -1, dtype=torch.long, device=device)
        self.scales = torch.full((max_tokens,), torch.nan, device=device)
        self.scaled = False
        self.shown = torch.zeros(max_tokens, width, dtype=dtype, device=device)
        self.shown_by = ""
        self.used: list[int] = []
        self.rows: Tensor | None = None
        self.tokens = 0

    def point(self, slots: Tensor, scales: Tensor | None = None) -> None:
        """Begin a step whose tokens read these slots, ``[tokens]`` on the host, -1: none, at these scales, NaN: the
        memory's own; ``None``: all at their memory's own."""
        self.slots.fill_(-1)
        self.slots[: len(slots)].copy_(slots)
        if scales is not None or self.scaled:
            self.scales.fill_(torch.nan)
        if scales is not None:
            self.scales[: len(scales)].copy_(scales)
        self.scaled = scales is not None
        self.tokens, found = len(slots), slots.unique().tolist()
        self.used = [slot for slot in found if slot >= 0]
        self.rows = None if found == self.used else (slots >= 0).nonzero()[:, 0].to(self.slots.device)


@dataclass(frozen=True)
class Cut:
    """How several processes share a projection.

    Attributes:
        inputs: whether each has a part of what it reads.
        outputs: whether each has a part of what it returns.
        total: the sum of a tensor over them.
    """

    inputs: bool
    outputs: bool
    total: Callable[[Tensor], Tensor]


class LayerBank(nn.Module):
    """The slots of one attention module, or of one projection of a feed-forward block, to which that is one head.

    Args:
        only: the one form that its memories have, which then read the content query; ``None``: any.
        cut: among processes, each of which has its part of the factors; ``None``: not, or between heads.

    Buffers, for S slots of rank R and ``h`` heads: ``A [h, d, S, R]``, ``B [h, S, R, v]``, ``mean [S, h, d]``,
    ``tightness [S]`` (1/c², 0 without a limit), ``scale [S]``, ``form [S]`` and ``rotary [S]``.
    """

    def __init__(
        self, slots: int, rank: int, heads: int, head_dim: int, value_dim: int, dtype: torch.dtype,
        device: torch.device, only: Form | None = None, cut: Cut | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.heads, self.head_dim, self.value_dim, self.only, self.cut = heads, head_dim, value_dim, only, cut

        def buffer(name: str, *shape: int, kind: torch.dtype = dtype) -> None:
            self.register_buffer(name, torch.zeros(*shape, dtype=kind, device=device), persistent=False)

        buffer("A", heads, head_dim, slots, rank)
        buffer("B", heads, slots, rank, value_dim)
        buffer("constant", heads, slots, rank)
        buffer("tightness", slots, kind=torch.float32)
        buffer("scale", slots, kind=torch.float32)
        buffer("form", slots, kind=torch.long)
        buffer("rotary", slots, kind=torch.bool)
        self.numbers: Tensor
        self.register_buffer("numbers", torch.arange(slots, device=device), persistent=False)
        self.held: list[Manner | None] = [None] * slots  # what the host knows of them
        self.launched: set[bool] = set()  # for few tokens, for many: compiled before a graph is recorded
        # for good: graphs are recorded
        self.by_triton = only is None and serves(device.type) and set(served_maps()) <= set(KINDS)

    A: Tensor
    B: Tensor
    constant: Tensor
    tightness: Tensor
    scale: Tensor
    form: Tensor
    rotary: Tensor

    @torch.no_grad()
    def put(self, slot: int, layer: ServedLayer) -> None:
        """Put a memory of no higher rank than the slot's into it."""
        if self.by_triton and layer.manner.feature_map not in KINDS:
            raise PrefixMemoryError(
                f"feature_map={layer.manner.feature_map!r} was registered when the server's slots had been made. "
                "Import the module that registers it before the engine starts, or set PREFIXMEMORY_IMPL=torch."
            )
        self.clear(slot)
        manner = self.held[slot] = layer.manner
        self.A[:, :, slot, : manner.rank].copy_(layer.A)
        self.B[:, slot, : manner.rank].copy_(layer.B)
        if layer.mean is not None:
            self.constant[:, slot, : manner.rank].copy_((layer.mean[:, None].float() @ layer.A.float())[:, 0])
        self.tightness[slot] = 0.0 if manner.limit is None else 1 / manner.limit**2
        self.scale[slot] = manner.scale
        self.form[slot] = forms().index(_form(manner))
        self.rotary[slot] = manner.rotary

    @torch.no_grad()
    def clear(self, slot: int) -> None:
        """Empty a slot."""
        self.A[:, :, slot].zero_()
        self.B[:, slot].zero_()
        self.constant[:, slot].zero_()
        self.scale[slot] = self.tightness[slot] = self.form[slot] = self.rotary[slot] = 0
        self.held[slot] = None

    @torch.no_grad()
    def add_(
        self,
        outputs: Float[Tensor, "t hv"],
        rotated: Float[Tensor, "t hd"],
        content: Float[Tensor, "t hd"],
        step: Step,
        captured: bool = False,
    ) -> None:
        """Add to the heads' ``outputs``, in place, what the memories of the tokens answer to their queries.

        Args:
            outputs: of attention.
            rotated: the queries that attention saw.
            content: those before rotation; the same where nothing rotates.
            step: the slots of the tokens.
            captured: whether this call is recorded, to be replayed with other contents of the step's tensors.
        """
        used = [slot for slot in step.used if self.held[slot] is not None]
        tokens, rows = outputs.shape[0], None if captured else step.rows
        parts = [x[:tokens].view(tokens, self.heads, -1) for x in (outputs, rotated, content)]
        parts += [step.slots[:tokens], step.scales[:tokens]]
        if self.by_triton:
            return self._add_by_triton(parts, bool(used) or captured)
        if not used and not captured:
            return
        if rows is not None:
            parts = [x.index_select(0, rows) for x in parts]
        own, of_rotated, of_content, slots, scales = parts
        if captured:
            occurring, rotary = ([self.only], False) if self.only else (forms(), None)
            new = self._add_all(own, self._features(of_rotated, of_content, slots, occurring, rotary), slots, scales)
        # one slot for all, unless a token reads what is not held here
        elif len(used) == 1 and used == step.used and not step.scaled and self.cut is None:
            new = self._add_one(own, of_rotated, of_content, used[0])
        else:
            manners = [cast(Manner, self.held[slot]) for slot in used]
            kinds = {manner.rotary for manner in manners}
            rotary = kinds.pop() if len(kinds) == 1 else None
            occurring = sorted({_form(manner) for manner in manners})
            new = self._add_all(own, self._features(of_rotated, of_content, slots, occurring, rotary), slots, scales)
        if rows is None:
            outputs.copy_(new.reshape(outputs.shape))
        else:
            outputs.index_copy_(0, rows, new.reshape(len(rows), -1))

    def _add_by_triton(self, parts: list[Tensor], needed: bool) -> None:
        """In one launch, whatever the slots are; the first of a size is made in any case, and compiles the kernel."""
        from prefixmemory.kernels import triton_read

        own, rotated, content, slots, scales = parts
        few = len(slots) <= triton_read.FEW
        if not needed and few in self.launched:
            return
        self.launched.add(few)
        A, B, constant = self.A.permute(2, 0, 1, 3), self.B.transpose(0, 1), self.constant.transpose(0, 1)
        of_slots = triton_read.Bank(self.tightness, self.scale, self.form)
        triton_read.add_from_slots_(own, rotated, content, A, B, constant, self.rotary, slots, scales, of_slots)

    def _add_one(self, own: Tensor, rotated: Tensor, content: Tensor, slot: int) -> Tensor:
        """All tokens read the same slot."""
        manner = cast(Manner, self.held[slot])
        query, here = (rotated if manner.rotary else content).to(self.A.dtype), slice(manner.rank)
        features = _function(_form(manner))(query).transpose(0, 1)
        hidden = torch.baddbmm(self.constant[:, slot : slot + 1, here], features, self.A[:, :, slot, here], beta=-1)
        answer = torch.bmm(hidden, self.B[:, slot, here]).transpose(0, 1)
        return add_one(own, answer, manner.limit, manner.scale)

    def _features(
        self, rotated: Tensor, content: Tensor, slots: Tensor, occurring: Sequence[Form], rotary: bool | None
    ) -> Float[Tensor, "t h d"]:
        """φ(q) of each token, with the query and the form that its slot's memory wants."""
        slots = slots.clamp(min=0)
        if rotary is None:
            query = torch.where(self.rotary[slots][:, None, None], rotated, content)
        else:
            query = rotated if rotary else content
        query = query.to(self.A.dtype)
        if len(occurring) == 1:
            return _function(occurring[0])(query)
        form, features, known = self.form[slots][:, None, None], query, forms()
        for each in occurring:
            features = torch.where(form == known.index(each), _function(each)(query), features)
        return features

    def _add_all(self, own: Tensor, features: Tensor, slots: Tensor, scales: Tensor) -> Tensor:
        """Tokens read different slots, or none, or at scales of their own."""
        columns = self.A.flatten(2)  # [h, d, S·R]
        hidden = torch.baddbmm(self.constant.flatten(1)[:, None], features.transpose(0, 1), columns, beta=-1)
        mine = (slots[:, None] == self.numbers)[:, :, None]  # [t, S, 1]
        hidden = torch.where(mine, hidden.unflatten(2, self.A.shape[2:]), 0.0)
        if self.cut is not None and self.cut.inputs:
            hidden = torch.where(mine, self.cut.total(hidden.sum(2, keepdim=True)), 0.0)
        answer = torch.bmm(hidden.flatten(2), self.B.flatten(1, 2)).transpose(0, 1)  # [t, h, v]
        place = slots.clamp(min=0)
        scale = torch.where(scales.isnan(), self.scale[place], scales)[:, None, None]
        tightness = self.tightness[place][:, None, None]
        length, size = (torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32) for x in (answer, own))
        of_own = size * size + own.shape[-1] * TINY * torch.where(tightness > 0, tightness, 1.0)
        of_answer = length * length
        if self.cut is not None and self.cut.outputs:
            of_own, of_answer = self.cut.total(torch.stack([of_own, of_answer]))
        factor = (of_own / (of_own + of_answer * tightness)).sqrt()
        return torch.addcmul(own, answer, factor * scale).to(own.dtype)


def _form(manner: Manner) -> Form:
    """A mean is subtracted within the product: as far as features go, it is no normalisation."""
    return manner.feature_map, "none" if manner.normalize == "feature_mean" else manner.normalize


def _function(form: Form) -> Callable[[Tensor], Tensor]:
    feature_map = cast(Callable[[Tensor], Tensor], FEATURE_MAPS[form[0]])
    if form[1] == "query_rms":
        return lambda query: feature_map(query * _per_length(query, "mean"))
    if form[1] == "feature_l2":
        return lambda query: (features := feature_map(query)) * _per_length(features, "sum")
    return feature_map


def _per_length(x: Tensor, kind: str) -> Tensor:
    squares = x.float().pow(2)
    reduced = squares.mean(dim=-1, keepdim=True) if kind == "mean" else squares.sum(dim=-1, keepdim=True)
    return torch.rsqrt(reduced + EPS).to(x.dtype)


def forms() -> list[Form]:
    """All that can be served, in the order by which ``LayerBank.form`` counts; registering a map adds to its end."""
    return [(name, normalize) for name in served_maps() for normalize in NORMS]
