"""Architectures that are sampled and trained on a CPU, and those that cannot be."""

import json

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from aepo_fast.config.errors import ConfigError
from aepo_fast.training.run import train
from tests.tiny_model import build_tiny_tokenizer
from tests.tiny_run import tiny_config, with_trainer

SETTINGS = dict(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=48,
    moe_intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=256,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=2,
    sliding_window=16,
    num_local_experts=4,
    num_experts_per_tok=1,
    layer_types=["sliding_attention", "full_attention"],
    # Of GPT-J and CodeGen, Gemma 4 and Llama 4
    n_embd=32,
    n_layer=2,
    n_head=4,
    n_positions=256,
    rotary_dim=8,
    vocab_size_per_layer_input=300,
    global_head_dim=16,
    num_kv_shared_layers=0,
    hidden_size_per_layer_input=0,
    intermediate_size_mlp=48,
    alibi=True,
    attention_hidden_size=32,
)


@pytest.fixture
def run(tmp_path):
    def one(kind: str, **settings) -> dict:
        base = CONFIG_MAPPING[kind]()
        known = base.to_dict()
        own = {key: value for key, value in {**SETTINGS, **settings}.items() if key in known}
        if known.get("layer_types") is None:
            own.pop("layer_types", None)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**own))
        model.save_pretrained(tmp_path / "model")
        build_tiny_tokenizer().save_pretrained(tmp_path / "model")
        cfg = tiny_config(tmp_path / "model", tmp_path / "run")
        train(with_trainer(cfg, steps=1, prompts_per_step=2, minibatches=1))
        return json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])

    return one


KINDS = ("gpt_oss", "gemma4_text", "gptj", "codegen", "llama4_text", "falcon", "bloom", "gpt2")


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_training(run, kind):
    layers = {"layer_types": ["chunked_attention", "full_attention"]} if "llama" in kind else {}
    metrics = run(kind, **layers)
    assert metrics["sampling/logp_difference/max"] < 1e-5
    assert 0 < metrics["grad_norm"] < 100


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "phimoe",
            "PhimoeForCausalLM draws random numbers when it trains, and none when it samples",
        ),
        ("rwkv", "RwkvForCausalLM gives other log-probs when it samples than when it trains"),
        ("bart", "BartForCausalLM gives other log-probs when it samples than when it trains"),
        ("bert", "not those of a plain linear head"),
    ],
)
def test_what_cannot_be_trained_is_refused_by_name(run, kind, message):
    with pytest.raises(ConfigError, match=message) as caught:
        run(kind, num_experts_per_tok=2, d_model=32, decoder_layers=2)
    assert caught.value.key == "model.path" and "\n" not in str(caught.value)
