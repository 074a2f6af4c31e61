"""Runs that are killed at random moments end as if nothing had happened; ``make kills`` tries thirty."""

from __future__ import annotations

from pathlib import Path

import pytest

import kills
import processes


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    folder = tmp_path_factory.mktemp("kills")
    return folder, kills.prepare(folder)


def test_a_run_killed_at_a_random_moment_ends_with_the_same_losses(place):
    found = list(kills.killed(*place, moments=3, seed=1))
    assert all(kill.same for kill in found), found
    assert all(kill.resumed for kill in found), found  # none had come to its end


def test_another_seed_has_other_losses(place):
    process = processes.start(kills.train, place[0], "other", "--seed", "1")
    process.join()
    assert process.exitcode == 0 and not kills.same(place[0], "other")
