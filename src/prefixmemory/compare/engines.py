"""Where workers run: processes of this machine, or tasks of a Ray cluster that sees the same files."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from rich.console import Console

from prefixmemory.compare.store import Store
from prefixmemory.compare.suite import load_suite
from prefixmemory.compare.work import checksums, work
from prefixmemory.errors import PrefixMemoryError

#: Starts further workers, (suite, output, data, retry_failed, number). The block that they work beside waits for them
#: in the end, and ends them where it is broken off.
Engine = Callable[[Path, Path, Path | None, bool, int], AbstractContextManager[None]]


def one_worker(suite: Path, output: Path, data: Path | None, retry_failed: bool) -> None:
    """What a further worker does: the same as the first."""
    from prefixmemory.training.run import quiet_libraries

    quiet_libraries()
    loaded = load_suite(suite)
    work(Store(output, loaded, checksums(loaded, data)), data, Console(stderr=True), retry_failed)


@contextmanager
def local(suite: Path, output: Path, data: Path | None, retry_failed: bool, number: int) -> Iterator[None]:
    """``number`` processes of this machine, the calling one beside them; its GPUs are dealt out in turn."""
    code = "from prefixmemory.compare.engines import main; main()"
    words = [sys.executable, "-c", code, str(suite), str(output), "" if data is None else str(data), str(retry_failed)]
    started = [subprocess.Popen(words, env=_with_gpu(place + 1)) for place in range(number)]

    try:
        yield
    except BaseException:
        for process in started:
            process.terminate()
        for process in started:
            process.wait()
        raise
    failed = [status for process in started if (status := process.wait())]  # of all: none is left running
    if failed:
        raise PrefixMemoryError(f"A worker ended with {failed[0]}; what it said stands above.")


def _with_gpu(place: int) -> dict[str, str]:
    """The environment of the worker at ``place``: it sees one GPU, where there are several."""
    count = torch.cuda.device_count()
    if count < 2:
        return dict(os.environ)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    return {**os.environ, "CUDA_VISIBLE_DEVICES": visible.split(",")[place % count]}


def main() -> None:
    """Entry point of a further worker."""
    suite, output, data, retry_failed = sys.argv[1:]
    try:
        one_worker(Path(suite), Path(output), Path(data) if data else None, retry_failed == "True")
    except KeyboardInterrupt:
        raise SystemExit(130) from None


@contextmanager
def on_ray(suite: Path, output: Path, data: Path | None, retry_failed: bool, number: int) -> Iterator[None]:
    """``number`` tasks on the Ray cluster that RAY_ADDRESS names, or on a local one; each has a GPU, if it has any."""
    try:
        import ray
    except ImportError as error:
        raise PrefixMemoryError("--engine ray needs Ray, which is not installed: pip install ray.") from error
    if not ray.is_initialized():
        ray.init(log_to_driver=True, include_dashboard=False)
    remote = ray.remote(max_calls=1, num_gpus=1 if ray.cluster_resources().get("GPU") else 0)(one_worker)
    paths = suite.resolve(), output.resolve(), data and data.resolve()
    handles = [remote.remote(*paths, retry_failed) for _ in range(number)]

    yield
    ray.get(handles)


ENGINES: dict[str, Engine] = {"local": local, "ray": on_ray}


def run_suite(
    engine: Engine, suite: Path, store: Store, data: Path | None, workers: int, retry_failed: bool, console: Console
) -> None:
    """Run a suite with ``workers`` workers; with the local engine, this process is the first of them."""
    alone = engine is local
    further = workers - alone
    with engine(suite, store.folder, data, retry_failed, further) if further else nullcontext():
        if alone:
            work(store, data, console, retry_failed)
