"""torch.compile and the Triton kernel: a plain script, run by ``test_triton.py`` in a process without shape checks.

TRITON_INTERPRET=1 PREFIXMEMORY_SHAPES=0 PREFIXMEMORY_IMPL=triton python tests/triton_checks.py
"""

from __future__ import annotations

import torch

import compile_checks
from prefixmemory.tuner.layers import reads_by
from tiny import DEFAULT, build, with_memory


def main() -> None:
    torch.set_num_threads(1)
    model = with_memory(build("llama_gqa"), **DEFAULT)
    assert reads_by(model) == "triton"
    compile_checks.SWAPS = 1
    compile_checks.check(model, "aot_eager", "by Triton")
    print("all ok")


if __name__ == "__main__":
    main()
