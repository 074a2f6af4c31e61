"""Six of the 108 crowds on one folder that ``make crowds`` tries: no run is lost, and each refusal says who has it."""

from __future__ import annotations

from pathlib import Path

import pytest

from crowds import Case, crowds, prepare


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    place: Path = tmp_path_factory.mktemp("crowds")
    return list(crowds(place, prepare(place), seed=1, cases=6))


def test_no_run_is_lost_that_was_reported_as_done_and_each_refusal_names_the_holder(cases):
    assert [case.faults for case in cases] == [[]] * 6


def test_crowds_meet_runs_that_go_on(cases):
    # The control: crowds whose processes came one after another would show nothing.
    ends = [end for case in cases for end in case.ends]
    assert "done" in ends and "killed" in ends and "refused, holder named" in ends
