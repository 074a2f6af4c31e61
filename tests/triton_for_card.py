"""Compile for a GPU, without one, every kernel that a read launches, and print what each takes of a multiprocessor.

    TRITON_INTERPRET=0 PREFIXMEMORY_SHAPES=0 python tests/triton_for_card.py

A plain script, run by ``test_triton.py`` in a process in which Triton does not interpret. The functions of
``triton_read.py`` are called as ever; in the place of a launch, Triton compiles for compute capability 9.0 what it
would have launched, down to machine code.
"""

from __future__ import annotations

import itertools
import sys
from typing import Any

import torch
from torch.nn import functional as F
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from prefixmemory.kernels import impl, triton_kernels, triton_read
from prefixmemory.kernels.impl import KINDS, NORMS, Product

TARGET = GPUTarget("cuda", 90, 32)
#: Shared memory that a program may have, bytes: of the cards with compute capability 8.6 and 8.9, which have least.
MOST = 99 * 1024


class Card:
    """What Triton asks of a driver before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiled:
    """A kernel that is compiled where it would be launched."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.name = kernel, kernel.fn.__name__

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            found = self.kernel.warmup(*args, grid=grid, **options)
            assert found.asm["cubin"] and ".target sm_90" in found.asm["ptx"]
            shared = found.metadata.shared
            assert shared <= MOST, f"{self.name} needs {shared} bytes of shared memory"
            print(f"{self.name}: {shared} bytes of shared memory, {len(found.asm['cubin'])} of code")

        return launch


def check(heads: int, groups: int, size: int, rank: int | None, dtype: torch.dtype, weights: torch.dtype) -> None:
    """Forward and backward of one memory."""
    print(f"{heads} heads of {size}, {groups} memories, {rank=}, {dtype}, memory {weights}")
    query, outputs = (torch.zeros(2, 64, heads, size, dtype=dtype, requires_grad=True) for _ in range(2))
    shapes = [(groups, size, size)] if rank is None else [(groups, size, rank), (groups, rank, size)]
    factors = tuple(torch.zeros(shape, dtype=weights, requires_grad=True) for shape in shapes)
    product = Product(factors, F.elu, torch.zeros(groups, size, dtype=weights), ("elu", "none"))
    triton_read.read(query, outputs, product, 0.5).sum().backward()


def check_bank(heads: int, size: int, rank: int, dtype: torch.dtype) -> None:
    """A memory for each token, of every kind: training, and a server's slots."""
    print(f"{heads} heads of {size}, a bank of {rank=}, {dtype}")
    forms = list(itertools.product(KINDS, NORMS))
    slots = torch.zeros(2, 600, dtype=torch.int64)
    bank = triton_read.Bank.of([0.5] * len(forms), [1.0] * len(forms), forms, slots.device)
    query, outputs = (torch.zeros(2, 600, heads, size, dtype=dtype, requires_grad=True) for _ in range(2))
    A, B = torch.zeros(len(forms), heads, size, rank), torch.zeros(len(forms), heads, rank, size)
    triton_read.read_bank(query, outputs, (A.requires_grad_(), B.requires_grad_()), slots, bank).sum().backward()
    with torch.no_grad():
        for tokens in (8, 600):
            content, constant = query[0, :tokens].contiguous(), torch.zeros(len(forms), heads, rank)
            triton_read.add_from_slots_(
                outputs[0, :tokens], query[0, :tokens], content, A, B, constant,
                torch.zeros(len(forms), dtype=torch.bool), slots[0, :tokens], bank,
            )  # fmt: skip


def main() -> None:
    assert not impl.INTERPRETED, "TRITON_INTERPRET=0"
    driver.set_active(Card())
    for name in ("forward", "rows_backward", "factors_backward"):
        setattr(triton_kernels, name, Compiled(getattr(triton_kernels, name)))
    half, single = torch.bfloat16, torch.float32
    check(32, 8, 64, 8, half, single)  # of 1B
    if "--few" in sys.argv:
        return print("all ok")
    check(32, 32, 128, 8, half, single)  # of 8B
    check(32, 32, 128, 64, half, single)  # the largest factors in float32
    check(32, 8, 128, None, half, half)  # and in bfloat16
    check(24, 24, 128, 8, torch.float16, torch.float16)  # of 3B
    check(9, 3, 64, None, single, single)
    check(8, 4, 256, 8, half, single)
    check(71, 1, 64, 8, half, half)  # a memory that all heads share
    check_bank(32, 128, 8, half)
    print("all ok")


if __name__ == "__main__":
    main()
