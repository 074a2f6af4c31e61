"""What is promised of two models, or two runs, that were made separately: the comparisons, and their tolerances.

The same numbers need not give the same bits. A tensor that PyTorch makes begins at a multiple of 64 bytes, one that is
mapped from a file wherever the file has it, and MKL chooses the order of its sums by the address, the processor and the
number of threads (``MKL_CBWR=COMPATIBLE`` takes that choice from it). So files and parameters are compared bit for bit,
and what is computed from them is close. Bit-equal logits are asked of one model compared with itself: before and after,
disabled, at scale zero, unloaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

#: Of the largest value. float32: 84 times its rounding step; 4e-7 was the most seen in the tiny models, and a change of
#: 1e-3 in one entry of a memory makes 3e-5 or more (the keys of a prefix inside the softmax: 5e-6, so that the check of
#: the parameters is the sharper one). bfloat16: 5 times its rounding, since each layer rounds anew.
RELATIVE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
#: Between parameters of two trainings alike, which are of about 1e-2: each step of the optimizer adds a rounding.
TRAINED = 1e-6


def tensors(model: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters and buffers by name, with or without PEFT's model around it."""
    state = model.state_dict() if isinstance(model, nn.Module) else model
    return {name.removeprefix("base_model.model."): tensor for name, tensor in state.items()}


def same_parameters(found: nn.Module | Mapping[str, Tensor], expected: nn.Module | Mapping[str, Tensor]) -> None:
    """The same tensors bit for bit, of the same dtype, under the same names; models, or tensors by name."""
    ours, theirs = tensors(found), tensors(expected)
    assert ours.keys() == theirs.keys() and ours
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


def close_logits(found: Tensor, expected: Tensor, amplified: float = 1.0) -> None:
    """Alike to ``RELATIVE`` of the largest value expected, and finite.

    ``amplified``: by how much the model multiplies rounding; a divisor near zero does.
    """
    assert expected.isfinite().all()
    size = float(expected.detach().abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=RELATIVE[expected.dtype] * amplified * size)


def close_figures(found: Any, expected: Any) -> None:
    """Records of two runs alike: floats to a relative 1e-5, everything else equal."""
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            close_figures(found[name], value)
    elif is_dataclass(expected):
        close_figures(vars(found), vars(expected))
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            close_figures(one, other)
    else:
        assert found == (pytest.approx(expected, rel=1e-5) if isinstance(expected, float) else expected)


def close_training(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Parameters by name as two trainings leave them that differ in nothing but where their tensors lie."""
    assert found.keys() == expected.keys() and found
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=TRAINED, msg=lambda m, n=name: f"{n}: {m}")
