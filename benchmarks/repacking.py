"""What forbidding bitsandbytes to repack 4-bit weights costs a model that only answers, on a CPU with AVX512-BF16.

    python benchmarks/repacking.py            # prints a table, writes results/benchmarks/repacking.json

One ``Linear4bit`` (NF4, its scales packed too) of 2048 inputs and 8192 outputs, in evaluation mode on one thread,
CPU-milliseconds of a call, the median of 21. Plain and repacked take turns. Compare within one run.
"""

from __future__ import annotations

import os
import statistics
import time
from importlib.metadata import version
from pathlib import Path

import torch
from bitsandbytes.functional import has_avx512bf16
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn

from prefixmemory.files.records import provenance, write_json
from prefixmemory.models.quantization import is_repacked, set_repacking

RESULT = Path(__file__).parent.parent / "results" / "benchmarks" / "repacking.json"
INPUTS, OUTPUTS = 2048, 8192
REPEATS = 21
TOKENS = (1, 16, 256)


def layer(repacked: bool) -> nn.Module:
    """The same weights either way."""
    torch.manual_seed(0)
    packed = Linear4bit(INPUTS, OUTPUTS, bias=False, quant_type="nf4").to("cpu").eval()
    set_repacking(packed, allowed=repacked)
    return packed


def milliseconds(call: nn.Module, x: Tensor) -> float:
    start = time.process_time()
    call(x)
    return 1000 * (time.process_time() - start)


@torch.no_grad()
def main() -> None:
    if not has_avx512bf16():
        raise SystemExit("bitsandbytes repacks on CPUs with AVX512-BF16 only; this is none.")
    torch.set_num_threads(1)
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in TOKENS:
            x = torch.randn(tokens, INPUTS, generator=torch.Generator().manual_seed(1)).to(dtype)
            layers = {"plain": layer(repacked=False), "repacked": layer(repacked=True)}
            taken: dict[str, list[float]] = {name: [] for name in layers}
            for _ in range(REPEATS + 1):
                for name, made in layers.items():
                    taken[name].append(milliseconds(made, x))
            assert [is_repacked(made) for made in layers.values()] == [False, True]
            medians = {name: statistics.median(times[1:]) for name, times in taken.items()}  # the first call repacks
            case = f"{str(dtype).removeprefix('torch.')}, {tokens} tokens"
            results[case] = {name: round(median, 3) for name, median in medians.items()}
            print(f"{case:22}" + "".join(f"{name} {ms:8.3f} CPU-ms   " for name, ms in medians.items()), flush=True)
    record = {"cpu_milliseconds": results, "repeats": REPEATS, "load_average": os.getloadavg()[0], **provenance()}
    record["versions"]["bitsandbytes"] = version("bitsandbytes")
    write_json(RESULT, record)


if __name__ == "__main__":
    main()
