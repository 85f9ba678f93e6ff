"""Model folders as people have them: one line that names the file and the next step."""

import json
import re
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from aepo_fast.config.errors import ConfigError
from aepo_fast.config.sections import ModelConfig
from aepo_fast.model.folder import same_model
from aepo_fast.model.load import check_vocabulary, load_model, load_tokenizer, read_config, resolve
from tests.tiny_run import a_machine

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"


@pytest.fixture
def folder(tmp_path, tiny_model_dir):
    return shutil.copytree(tiny_model_dir, tmp_path / "model")


def change(folder, **settings):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def shard(folder, *, places=None, parts=("a", "b")):
    """Split the weights into two files with an index, of which `places` are others."""
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    (folder / "model.safetensors").unlink()
    index = {}
    for part, some in zip(parts, (names[::2], names[1::2]), strict=True):
        file = folder / f"model-{part}.safetensors"
        save_file({name: weights[name] for name in some}, file, metadata={"format": "pt"})
        index |= {name: f"model-{part}.safetensors" for name in some}
    index |= places or {}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )


def test_shards_with_their_index_load(folder):
    shard(folder)
    load_model(ModelConfig(path="x"), resolve(str(folder)), a_machine())


def broken_shard(folder):
    shard(folder)
    file = folder / "model-b.safetensors"
    file.write_bytes(file.read_bytes()[:-7])


def cut(name, size):
    """Keep the first bytes of a file."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def put(name, text):
    """Another text in the place of a file's."""
    return lambda folder: (folder / name).write_text(text)


def drop(name, *, shards=False):
    def damage(folder):
        if shards:
            shard(folder)
        (folder / name).unlink()

    return damage


def damaged_index(folder):
    shard(folder)
    (folder / INDEX).write_text("{}")


def wrong_list(folder):
    shard(folder, places={"x": "model-a.safetensors"})


DAMAGES = {
    "weights by LFS": (put(WEIGHTS, POINTER), "model.safetensors is a pointer.*git lfs pull"),
    "tokenizer by LFS": (put("tokenizer.json", POINTER), "tokenizer.json is a pointer"),
    "cut off": (cut(WEIGHTS, 9000), "model.safetensors has 9000 bytes where its header says"),
    "cut off early": (cut(WEIGHTS, 90), "model.safetensors is cut off"),
    "empty": (cut(WEIGHTS, 0), "model.safetensors is cut off"),
    "zeros": (put(WEIGHTS, "\0" * 9000), "model.safetensors .* header is damaged"),
    "a web page": (put(WEIGHTS, "<!doctype html>"), "cut off or no safetensors file"),
    "settings cut off": (put("config.json", "{"), "config.json is not JSON"),
    "settings empty": (put("config.json", ""), "config.json is not JSON"),
    "settings a list": (put("config.json", "[]"), "config.json holds no settings"),
    "tokenizer damaged": (cut("tokenizer_config.json", 9), "tokenizer_config.json is not JSON"),
    "no config": (drop("config.json"), "no config.json with weights"),
    "no weights": (drop(WEIGHTS), "no config.json with weights"),
    "no index": (drop(INDEX, shards=True), "it has model-a.safetensors, but neither"),
    "a missing shard": (
        drop("model-b.safetensors", shards=True),
        "model-b.safetensors is missing, one of 2 files that model.safetensors.index.json names",
    ),
    "a shard cut off": (broken_shard, "model-b.safetensors has .* bytes where its header says"),
    "the wrong list": (wrong_list, "model-a.safetensors lacks x, which model.safetensors.index"),
    "a damaged index": (damaged_index, "model.safetensors.index.json has no weight_map"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder_is_one_line(folder, name):
    damage, message = DAMAGES[name]
    damage(folder)
    with pytest.raises(ConfigError, match=message) as caught:
        resolve(str(folder))
    assert caught.value.key == "model.path" and "\n" not in str(caught.value)


FOREIGN = {
    "unknown": ({"model_type": "brandnew_v9"}, "knows no model_type 'brandnew_v9'.*newer trans"),
    "no type": ({"model_type": None}, "names no model_type"),
    "code": (
        {"model_type": "mine", "auto_map": {"AutoConfig": "a.B"}},
        "knows no model_type 'mine', and the code that comes with it is not run",
    ),
    "no language model": ({"model_type": "t5"}, "no causal language model of type 't5'"),
    "another width": ({"hidden_size": 96, "head_dim": 24}, "transformers cannot load it"),
    "another vocabulary": ({"vocab_size": 512}, "transformers cannot load it"),
    "more layers": ({"num_hidden_layers": 3}, "lack 9 of the model's weights, e.g. model.layers.2"),
    "no head": (
        {"tie_word_embeddings": False},
        "lack 1 of the model's weights, e.g. lm_head.weight. Set tie_word_embeddings = true",
    ),
    "nonsense": ({"num_attention_heads": "four"}, "config.json cannot be used"),
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_weights_and_settings_that_do_not_belong_together(folder, name):
    settings, message = FOREIGN[name]
    change(folder, **settings)
    with pytest.raises(ConfigError, match=message) as caught:
        load_model(ModelConfig(path="x"), folder, a_machine())
    assert "\n" not in str(caught.value)


def test_a_missing_norm_is_never_random(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="lack 1 of the model's weights, e.g. model.norm.weight"):
        load_model(ModelConfig(path="x"), folder, a_machine())


def test_weights_that_are_not_finite(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="its logits are not finite"):
        load_model(ModelConfig(path="x"), folder, a_machine())


def test_a_tokenizer_without_its_file(folder):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match="tokenizer cannot be loaded.*Add tokenizer.json"):
        load_tokenizer(folder)


def test_code_of_a_folder_is_not_run(folder):
    change(folder, model_type="mine", auto_map={"AutoConfig": "evil.Config"})
    (folder / "evil.py").write_text("import sys\nsys.evil_was_run = True\n")
    with pytest.raises(ConfigError, match="is not run"):
        read_config(folder)
    assert not hasattr(sys, "evil_was_run")


def test_tokens_beyond_the_embedding(folder):
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens(["plus"])
    size = read_config(folder).vocab_size
    check_vocabulary(folder, tokenizer, range(size))
    with pytest.raises(ConfigError, match=f"gives 'plus' the id {size}, and it has {size} emb"):
        check_vocabulary(folder, tokenizer, tokenizer("a plus b")["input_ids"])


def test_a_folder_is_the_same_however_it_is_spelled(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(folder)
    shutil.copytree(folder, tmp_path / "copy")
    for name in ("model", "./model/", "model/../model", str(folder), "link"):
        assert same_model(name, "model") and same_model(str(folder), name)
    for name in ("copy", "a/b", "package:model"):
        assert not same_model(name, "model")
    assert same_model("a/b", "a/b")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert same_model("~/model", str(folder))
    assert re.match("/", str(folder))
