"""`aepo-fast export`: a run's last checkpoint as a folder that other programs load."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import torch

from aepo_fast.config.errors import ConfigError
from aepo_fast.config.resolve import Machine, auto_device
from aepo_fast.config.toml import load_config
from aepo_fast.model.load import load_model, load_tokenizer, resolve
from aepo_fast.model.lora import check_lora, holds_adapter, merge_adapter
from aepo_fast.training.checkpoint import STATE_NAME, save_model
from aepo_fast.training.checkpoint_damage import last_checkpoint
from aepo_fast.training.optimizer_state import FOLDER_NAME, OPTIMIZER_NAME

_OF_THE_RUN = (OPTIMIZER_NAME, FOLDER_NAME, STATE_NAME)


def export_run(run: Path, folder: Path, *, merge: bool) -> str:
    """Write the last checkpoint of a run to a folder, in Hugging Face or peft format.

    merge: the adapter is added to the weights of its model, in float32 or model.dtype, and to what
    4-bit weights stand for; else an adapter stays alone. Returns a line that says what was written.
    Raises ConfigError for a folder that is in use, a run without a whole checkpoint, and for
    nothing to merge.
    """
    run, folder = run.expanduser(), folder.expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError("FOLDER", str(folder), "is not an empty folder", "Name a new one")
    checkpoint = last_checkpoint(run, "RUN", "Copy the model's files from {}")
    adapted = holds_adapter(checkpoint)
    if merge and not adapted:
        reason = f"{checkpoint} holds whole weights and no adapter"
        raise ConfigError("--merge", True, reason, "Leave it out")
    draft = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        if merge:
            _merge(run, checkpoint, draft)
        else:
            for path in checkpoint.iterdir():
                if path.name not in _OF_THE_RUN:
                    shutil.copy2(path, draft)
        if folder.exists():
            folder.rmdir()
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    kind = "merged model" if merge else "adapter" if adapted else "model"
    return f"{folder}: the {kind} of {checkpoint}"


def _merge(run: Path, checkpoint: Path, folder: Path) -> None:
    cfg = load_config(str(run / "config.toml"))
    check_lora(cfg.model.lora)
    dtype = torch.bfloat16 if cfg.model.dtype == "bfloat16" else torch.float32
    device = torch.device("cpu")
    if cfg.model.quantization != "none" and cfg.trainer.device != "cpu":
        device = auto_device()  # where the run rounded to 4 bits
    machine = Machine(device, dtype, dtype, dtype, head_backend="auto")
    # What only speeds training up, or needs its machine, has no place here.
    plain = dataclasses.replace(
        cfg.model, attention="auto", liger=False, gradient_checkpointing="none"
    )
    trusts = cfg.model.trust_remote_code
    source = resolve(cfg.model.path, revision=cfg.model.revision, with_code=trusts)
    model = load_model(plain, source, machine, adapter=checkpoint)
    merge_adapter(model)
    model.to("cpu")  # type: ignore[arg-type]
    save_model(model, load_tokenizer(checkpoint, trust_code=trusts), folder)
