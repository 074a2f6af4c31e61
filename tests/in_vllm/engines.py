"""Engines of vLLM, and questions to them."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from asked import COUNT
from served_models import BASE, Answer, expected
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.inputs import TokensPrompt
from vllm.lora.request import LoRARequest

#: Of log-probabilities in float32: vLLM's attention sums in another order.
TOLERANCE = 1e-4
#: Adapters are numbered as they are first asked for.
_numbers: dict[Path, int] = {}


@contextmanager
def engine(folder: Path, **more: Any) -> Iterator[LLM]:
    """An engine for the base model, which is gone afterwards."""
    settings: dict[str, Any] = dict(
        dtype="float32", max_model_len=2560, max_num_seqs=16, max_num_batched_tokens=2560, enforce_eager=True,
        skip_tokenizer_init=True, enable_lora=True, max_loras=6, max_lora_rank=8, block_size=32, seed=0,
        disable_log_stats=True,
    )  # fmt: skip
    llm = LLM(str(folder / BASE), **settings | more)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def request(folder: Path, adapter: str) -> LoRARequest | None:
    """For an adapter by its name."""
    if adapter == BASE:
        return None
    number = _numbers.setdefault(folder / adapter, len(_numbers) + 1)
    return LoRARequest(adapter, number, str(folder / adapter))


def ask(
    llm: LLM, folder: Path, questions: Iterable[tuple[str, Sequence[int]]], count: int,
    each: Sequence[dict[str, Any]] | None = None, **sampling: Any,
) -> list[Any]:  # fmt: skip
    """vLLM's outputs for adapters and prompts, all in one batch; ``each``: sampling parameters of each request."""
    questions = list(questions)
    common: dict[str, Any] = dict(temperature=0, max_tokens=count, logprobs=0, ignore_eos=True, detokenize=False)
    parameters = [SamplingParams(**common, **sampling, **more) for more in each or [{}] * len(questions)]
    return llm.generate(
        [TokensPrompt(prompt_token_ids=list(prompt)) for _, prompt in questions],
        parameters,
        lora_request=[request(folder, adapter) for adapter, _ in questions],
        use_tqdm=False,
    )


def answer(output: Any) -> Answer:
    """Of one request."""
    (made,) = output.outputs
    return Answer(list(made.token_ids), [next(iter(step.values())).logprob for step in made.logprobs])


def difference(found: Answer, wanted: Answer) -> float:
    """The largest of log-probabilities; infinite where the tokens differ."""
    if found.tokens != wanted.tokens:
        return float("inf")
    return max(abs(one - other) for one, other in zip(found.logprobs, wanted.logprobs, strict=True))


def check(llm: LLM, folder: Path, questions: Sequence[tuple[str, Sequence[int]]], count: int) -> None:
    """Every answer is transformers'."""
    for (adapter, prompt), output in zip(questions, ask(llm, folder, questions, count), strict=True):
        wanted = expected(folder, adapter, prompt, count)
        assert difference(answer(output), wanted) < TOLERANCE, (adapter, len(prompt), answer(output), wanted)


ELSEWHERE = """
import json, sys
sys.path[:0] = {paths!r}
from pathlib import Path
from engines import answer, ask, engine
from asked import questions
if __name__ == "__main__":
    with engine(Path({folder!r}), **{settings!r}) as llm:
        found = [answer(output) for output in ask(llm, Path({folder!r}), questions({names!r}), {count!r})]
    print("FOUND", json.dumps([[each.tokens, each.logprobs] for each in found]))
"""


def in_another_process(
    made: Path, names: list[str], environment: dict[str, str], fails: bool = False, **settings: object
) -> Any:
    """What an engine elsewhere answers; the errors that it writes, if it ``fails``."""
    script = made / "elsewhere.py"
    paths = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    script.write_text(ELSEWHERE.format(paths=paths, folder=str(made), settings=settings, names=names, count=COUNT))
    done = subprocess.run(
        [sys.executable, str(script)], env={**os.environ, **environment}, capture_output=True, text=True, timeout=500
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert bool(lines) != fails, done.stderr[-3000:]
    if fails:
        return done.stderr
    return [Answer(*each) for each in json.loads(lines[-1].removeprefix("FOUND "))]
