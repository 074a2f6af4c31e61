"""What the plugin adds to vLLM's requests and steps, by itself."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from vllm.v1.worker.gpu.lora_utils import LoraState

from prefixmemory import PrefixMemoryError
from prefixmemory.serving.vllm_plugin import register
from prefixmemory.serving.vllm_requests import Intake, Speech, marked


def test_tokens_of_a_step_are_marked_by_their_requests():
    speeches = [Speech(), Speech(first=5), Speech(scale=0.5)]
    found = marked((0, 7, 7, 7, 9), speeches, computed=[3, 3, 8], scheduled=[1, 3, 1])
    assert found == (0, 7, 7, 7, 9)
    assert found.silent.tolist() == [False, True, True, False, False]
    np.testing.assert_array_equal(found.scales, np.array([np.nan] * 4 + [0.5], dtype=np.float32))
    plain = marked((0, 7), [Speech(), Speech()], computed=[0, 0], scheduled=[1, 1])
    assert plain.silent is None and plain.scales is None


def test_the_second_model_runners_state_marks_them_too():
    register()
    state = LoraState(4)
    state.lora_ids[2] = 7
    state._memory_speeches = {"one": Speech(first=4, scale=2.0)}
    state._memory_states = SimpleNamespace(num_computed_tokens_np=np.array([0, 0, 3, 0]))
    _, tokens, _ = state.make_lora_inputs(["one"], np.array([2]), np.array([2]))
    assert tokens == (7, 7) and tokens.silent.tolist() == [True, False] and tokens.scales.tolist() == [2.0, 2.0]
    state.remove_request("one")
    assert not state._memory_speeches


def test_a_server_on_several_machines_needs_a_folder_that_all_see(monkeypatch, tmp_path):
    config = SimpleNamespace(parallel_config=SimpleNamespace(nnodes=2))
    with pytest.raises(PrefixMemoryError, match="set PREFIXMEMORY_COPIES to a folder"):
        Intake(config)
    monkeypatch.setenv("PREFIXMEMORY_COPIES", str(tmp_path))
    intake = Intake(config)
    assert len(list(tmp_path.iterdir())) == 1
    del intake
