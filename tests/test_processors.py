"""The stand-ins for other processors: their variables, resuming, and the table, with a pytest that is written here."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))  # experiments is no installed package

from experiments import processors

from processes import run_python

SUITE = """
import os, torch
def test_threads():
    assert os.environ["OMP_NUM_THREADS"] == os.environ["PREFIXMEMORY_TEST_THREADS"]
def test_compiled_code_is_of_this_environment_alone():
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"].endswith("-1.compiled")
def test_which():
    assert os.environ.get("MKL_CBWR") != "AVX2"
def test_later():
    import pytest
    pytest.skip("not here")
"""


def test_no_environment_inherits_what_another_sets() -> None:
    found = processors.variables("plain-2", {"MKL_CBWR": "AVX2", "HOME": "/home"})
    threads = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE", "PREFIXMEMORY_TEST_THREADS": "2"}
    assert found == {"HOME": "/home", **threads}
    assert processors.variables("aten-default-1", {})["ATEN_CPU_CAPABILITY"] == "default"


def test_mkl_and_pytorch_understand_the_variables() -> None:
    """A name that is misspelt is passed over in silence, and the environment would be that of this machine."""
    script = "import torch; print(torch.backends.cpu.get_cpu_capability())"
    assert run_python("-c", script, ATEN_CPU_CAPABILITY="default").strip() == "DEFAULT"


def test_runs_are_counted_and_a_finished_log_is_not_made_again(tmp_path: Path, capsys) -> None:
    (tmp_path / "test_it.py").write_text(SUITE)
    only = ["--only", "mkl-avx2-1", "plain-1"]
    words = [str(tmp_path / "test_it.py"), "--jobs", "0", "--output", str(tmp_path / "logs"), *only]
    assert processors.main(words) == 1
    printed = capsys.readouterr()
    assert printed.err.count("running") == 2
    rows = printed.out.splitlines()
    assert rows[0] == "| environment | threads | passed | failed | errors | skipped |"
    assert rows[2] == "| nothing set | 1 | 3 | 0 | 0 | 1 |"
    assert rows[3] == "| MKL_CBWR=COMPATIBLE | 1 | not finished | not finished | not finished | not finished |"
    assert rows[4] == "| MKL_CBWR=AVX2 | 1 | 2 | 1 | 0 | 1 |"
    (tmp_path / "logs" / "mkl-avx2-1.log").unlink()
    (tmp_path / "test_it.py").write_text(SUITE.replace("AVX2", "SSE"))
    assert processors.main(words) == 0
    assert capsys.readouterr().err.count("running") == 1


def test_a_run_that_broke_off_is_not_finished(tmp_path: Path, capsys) -> None:
    (tmp_path / "test_it.py").write_text("import os\ndef test_it(): os._exit(3)\n")
    words = [str(tmp_path / "test_it.py"), "--jobs", "0", "--output", str(tmp_path / "logs"), "--only", "plain-1"]
    assert processors.main(words) == 1
    printed = capsys.readouterr()
    assert "plain-1: pytest ended with exit code 3" in printed.err
    assert "| nothing set | 1 | not finished |" in printed.out
    assert not (tmp_path / "logs" / "plain-1.log").exists()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("23 failed, 3188 passed, 77 skipped in 740.58s (0:12:20)", (3188, 23, 0, 77)),
        ("== 2 passed, 1 warning, 1 error in 0.30s ==", (2, 0, 1, 0)),
        ("3 passed, 2 errors in 1.2s", (3, 0, 2, 0)),
    ],
)
def test_the_summary_is_read(line: str, expected: tuple[int, ...]) -> None:
    assert tuple(processors.counts(f"1 passed in 2.00s\n.....\n{line}\n").values()) == expected


def test_a_log_without_a_summary_is_an_error() -> None:
    with pytest.raises(ValueError, match="no summary"):
        processors.counts("....\n")
