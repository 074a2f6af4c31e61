"""Which checkpoint of a run can be resumed from, after the machine may have died while one was written."""

from __future__ import annotations

import logging
import os
import shutil
import zipfile
from pathlib import Path

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from transformers.trainer import OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from prefixmemory.files.json_text import parse_json
from prefixmemory.memories.checkpoint import weights_checksum

logger = logging.getLogger(__name__)


def last_complete_checkpoint(folder: str | Path) -> Path | None:
    """The newest checkpoint in ``folder`` that holds all that resuming needs, or ``None``.

    transformers' ``get_last_checkpoint`` takes the highest number. A checkpoint whose writing was cut off then ends
    in an error about a missing file; one that lost its optimizer or random state is resumed from without a word, and
    training goes on differently. Checkpoints that are passed over are named in a warning.
    """
    for step, checkpoint in sorted(_numbered(Path(folder)).items(), reverse=True):
        fault = what_is_wrong(checkpoint, step)
        if fault is None:
            return checkpoint
        logger.warning("%s was not written to its end (%s); looking for an earlier one.", checkpoint, fault)
    return None


def drop_incomplete(folder: Path) -> bool:
    """Delete the checkpoints in ``folder`` that were not written to their end; whether others are left."""
    checkpoints = _numbered(folder)
    faulty = [step for step, checkpoint in checkpoints.items() if what_is_wrong(checkpoint, step) is not None]
    for step in faulty:
        shutil.rmtree(checkpoints[step], ignore_errors=True)
    return len(faulty) < len(checkpoints)


def _numbered(folder: Path) -> dict[int, Path]:
    """The checkpoints in ``folder`` by their step."""
    prefix = f"{PREFIX_CHECKPOINT_DIR}-"
    return {
        int(path.name.removeprefix(prefix)): path
        for path in folder.glob(f"{prefix}*")
        if path.is_dir() and path.name.removeprefix(prefix).isdecimal()
    }


def what_is_wrong(checkpoint: Path, step: int) -> str | None:
    """Why ``checkpoint`` cannot be resumed from, in a few words, or ``None`` when it can."""
    if is_sharded(checkpoint):  # FSDP and DeepSpeed lay their files out in their own ways, and check them
        return None if (checkpoint / TRAINER_STATE_NAME).is_file() else f"{TRAINER_STATE_NAME} is missing"
    processes = int(os.environ.get("WORLD_SIZE", "1"))  # a run is resumed with as many as it had
    random_states = [f"rng_state_{i}.pth" for i in range(processes)] if processes > 1 else ["rng_state.pth"]
    scaler = [SCALER_NAME] if (checkpoint / SCALER_NAME).is_file() else []  # with fp16
    # in the order in which they are written, which is why the last one is usually what is missing
    for name in (SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME, OPTIMIZER_NAME, SCHEDULER_NAME, *random_states):
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
    try:
        with safe_open(checkpoint / SAFETENSORS_WEIGHTS_NAME, framework="pt"):
            pass
    except SafetensorError:
        return f"{SAFETENSORS_WEIGHTS_NAME} is cut off"
    for name in (OPTIMIZER_NAME, SCHEDULER_NAME, *scaler, *random_states):
        if not zipfile.is_zipfile(checkpoint / name):  # the index of what torch.save writes stands at its end
            return f"{name} is cut off"
    try:
        config = parse_json((checkpoint / CONFIG_NAME).read_bytes())
        state = parse_json((checkpoint / TRAINER_STATE_NAME).read_bytes())
    except FileNotFoundError:
        return f"{TRAINER_STATE_NAME} is missing"
    except ValueError:
        return f"{CONFIG_NAME} or {TRAINER_STATE_NAME} is cut off"
    if not isinstance(config, dict) or not isinstance(state, dict):
        return f"{CONFIG_NAME} or {TRAINER_STATE_NAME} holds no object"
    if config.get("weights_sha256") not in (None, weights_checksum(checkpoint)):
        return f"{SAFETENSORS_WEIGHTS_NAME} is not the file that was saved"
    if state.get("global_step") != step:
        return f"{TRAINER_STATE_NAME} is of step {state.get('global_step')}"
    return None


def is_sharded(checkpoint: Path) -> bool:
    """Whether FSDP or DeepSpeed wrote ``checkpoint``, each process its part."""
    return (checkpoint / "latest").is_file() or any(checkpoint.glob("*fsdp*")) or any(checkpoint.glob("optimizer_*"))
