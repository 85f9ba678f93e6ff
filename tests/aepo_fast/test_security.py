"""Foreign files are data: no pickle, no code of a model's folder runs, and a run writes at home."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from aepo_fast.config.errors import ConfigError
from aepo_fast.config.sections import ModelConfig
from aepo_fast.config.toml import dump_config
from aepo_fast.model.load import load_model, load_tokenizer, read_config
from aepo_fast.training.checkpoint import STATE_NAME, load_state, save_model
from aepo_fast.training.checkpoint_damage import damage
from aepo_fast.training.optimizer_state import OPTIMIZER_NAME, load_optimizer
from bench.common.environment import ROOT
from tests.tiny_run import a_machine, tiny_config


class Intruder:
    """Runs code where it is unpickled: makes the folder `mark`."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.mark),)


def test_the_intruder_is_real(tmp_path: Path) -> None:
    torch.save(Intruder(tmp_path / "mark"), tmp_path / "x.pt")
    torch.load(tmp_path / "x.pt", weights_only=False)
    assert (tmp_path / "mark").is_dir()


@pytest.mark.parametrize("name", [STATE_NAME, OPTIMIZER_NAME])
def test_no_code_of_a_checkpoint_runs(tmp_path: Path, name: str) -> None:
    torch.save({"step": 1, "state": Intruder(tmp_path / "mark")}, tmp_path / name)
    assert name in (damage(tmp_path) or "")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    with pytest.raises(pickle.UnpicklingError):
        load_state(tmp_path) if name == STATE_NAME else load_optimizer(tmp_path, optimizer)
    assert not (tmp_path / "mark").exists()


def test_no_pickle_of_a_model_runs(tmp_path: Path, tiny_model_dir: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Intruder(tmp_path / "mark")}, folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"model\.path"):
        load_model(ModelConfig(path=str(folder)), folder, a_machine())
    assert not (tmp_path / "mark").exists()


def test_no_code_of_a_model_runs(tmp_path: Path, tiny_model_dir: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    (folder / "own.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'mark')!r})\n")
    classes = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    for name, own in (
        ("config.json", {"auto_map": classes}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["own.Slow", "own.Fast"]}}),
    ):
        settings = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**settings, **own}))
    load_tokenizer(folder)  # what it says of itself suffices: the code is left alone
    load_model(ModelConfig(path=str(folder)), folder, a_machine())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "own"}))
    with pytest.raises(ConfigError, match=r"model\.path"):
        load_model(ModelConfig(path=str(folder)), folder, a_machine())
    assert not (tmp_path / "mark").exists()


OWN_MODEL = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_of_a_model_runs_where_it_is_trusted(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "own"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    (folder / "own.py").write_text(OWN_MODEL)
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    own = {"model_type": "own", "architectures": ["OwnModel"], "auto_map": classes}
    (folder / "config.json").write_text(json.dumps({**config, **own}))
    with pytest.raises(ConfigError, match="code that comes with it is not run") as caught:
        read_config(folder)
    assert "Set model.trust_remote_code = true if you trust its authors" in caught.value.fix
    cfg = ModelConfig(path=str(folder), trust_remote_code=True)
    model = load_model(cfg, folder, a_machine())
    assert type(model).__name__ == "OwnModel" and model.config.model_type == "own"
    tokenizer = load_tokenizer(folder, trust_code=True)
    save_model(model, tokenizer, saved := tmp_path / "saved")  # with the code that it needs
    again = load_model(cfg, saved, a_machine()).state_dict()
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())
    assert read_config(folder, trust_code=True).vocab_size == model.config.vocab_size


# Prints every path that a run opens for writing, makes, renames or removes.
WATCH = """
import os, sys
said = set()
def watch(event, args):
    paths, place = [], "."
    if event == "open" and isinstance(args[0], (str, bytes)):
        writes = args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) if args[2] else 0
        paths = [args[0]] if writes else []
    elif event in ("os.mkdir", "os.remove", "os.rmdir"):
        paths = [args[0]]
        if args[-1] != -1:  # relative to an open folder
            place = os.readlink(f"/proc/self/fd/{args[-1]}")
    elif event in ("os.truncate", "os.symlink", "os.link"):
        paths = [args[0]]
    elif event == "os.rename":
        paths = args[:2]
    for path in paths:
        if isinstance(path, int):  # a file that was opened before
            continue
        path = os.path.abspath(os.path.join(place, os.fsdecode(path)))
        if path not in said:
            said.add(path)
            os.write(2, f"WRITES {path}\\n".encode())
sys.addaudithook(watch)
from aepo_fast.__main__ import main
sys.argv = ["aepo-fast", "train", sys.argv[1]]
main()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks up open folders as Linux has them")
def test_a_run_writes_in_its_folder_and_the_cache_alone(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    config = tmp_path / "run.toml"
    output, home, temporary = tmp_path / "run", tmp_path / "home", tmp_path / "temporary"
    config.write_text(dump_config(tiny_config(tiny_model_dir, output)))
    home.mkdir()
    temporary.mkdir()
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "XDG_"))}
    paths = f"{ROOT}:{ROOT / 'kernels'}"
    env = kept | {"HOME": str(home), "TMPDIR": str(temporary), "PYTHONPATH": paths}
    env["TORCHINDUCTOR_CACHE_DIR"] = str(temporary / "inductor")  # torch's own choice is in /tmp
    done = subprocess.run(
        [sys.executable, "-c", WATCH, str(config)],
        cwd=tmp_path,
        env=env | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    written = {Path(line[7:]) for line in done.stderr.splitlines() if line.startswith("WRITES ")}
    allowed = (output, temporary, home / ".cache", home / ".config", Path("/dev"))
    outside = {path for path in written if not any(path.is_relative_to(one) for one in allowed)}
    assert output / "metrics.jsonl" in written
    assert not outside
    # torch and matplotlib make folders there when imported; of ours nothing is left behind.
    assert not [path for path in temporary.rglob("*") if path.is_file()]
    assert {path.name for path in (home / ".config").rglob("*")} <= {"matplotlib"}
