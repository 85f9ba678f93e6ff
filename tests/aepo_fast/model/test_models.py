import json
import shutil
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub.errors import RevisionNotFoundError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
)
from transformers.models.llama.modeling_llama import eager_attention_forward

from aepo_fast.config.errors import ConfigError
from aepo_fast.config.sections import ModelConfig
from aepo_fast.model import attention, load
from aepo_kernels.integrations import backbone_of, head_arguments, heads
from tests.tiny_model import build_tiny_model, build_tiny_tokenizer
from tests.tiny_run import a_machine

CPU = a_machine()
SMALL = dict(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=16,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)


def model_config(**settings) -> ModelConfig:
    return ModelConfig(path="x", **{"compute_dtype": "float32", **settings})


def test_tiny_model_is_the_same_every_time(tmp_path, tiny_model_dir):
    again = LlamaForCausalLM.from_pretrained(build_tiny_model(tmp_path))
    first = LlamaForCausalLM.from_pretrained(tiny_model_dir)
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name


@pytest.mark.parametrize("path", ["nope", "./a/b", "/no/such/folder", "~/no-such-folder"])
def test_missing_folder(path):
    with pytest.raises(ConfigError, match="there is no such folder") as caught:
        load.resolve(path)
    assert caught.value.key == "model.path"


def test_folder_without_a_model(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="no config.json with weights beside it"):
        load.resolve(str(tmp_path))


def test_unreachable_hub_id(monkeypatch):
    def offline(name: str, **options: Any) -> str:
        raise OSError("cannot reach the hub\nmore")

    monkeypatch.setattr(load, "snapshot_download", offline)
    with pytest.raises(ConfigError, match="no local folder.*cannot reach the hub.") as caught:
        load.resolve("someone/something")
    assert "more" not in str(caught.value)


def test_a_revision_is_what_the_hub_is_asked_for(monkeypatch, tiny_model_dir):
    asked = []

    def snapshot_download(name: str, **options: Any) -> str:
        asked.append((options["revision"], "*.py" in options["allow_patterns"]))
        if options["revision"] == "gone":
            response: Any = SimpleNamespace(headers={}, request=None)
            raise RevisionNotFoundError("404", response=response)
        return str(tiny_model_dir)

    monkeypatch.setattr(load, "snapshot_download", snapshot_download)
    assert load.resolve("someone/something") == tiny_model_dir
    load.resolve("someone/something", revision="v2", with_code=True)
    assert asked == [(None, False), ("v2", True)]
    with pytest.raises(
        ConfigError, match="hub has no such revision of someone/something"
    ) as caught:
        load.resolve("someone/something", revision="gone")
    assert (caught.value.key, caught.value.value) == ("model.revision", "gone")


def test_a_revision_of_what_is_not_on_the_hub_is_refused(tiny_model_dir):
    with pytest.raises(ConfigError, match="model.revision = 'v2': .* is a local folder"):
        load.resolve(str(tiny_model_dir), revision="v2")
    with pytest.raises(ConfigError, match="model.revision = 'v2': .* pinned by the package"):
        ModelConfig(path="package:smollm2-135m-instruct", revision="v2")


def test_local_folder_and_package_names_resolve(tiny_model_dir):
    assert load.resolve(str(tiny_model_dir)) == tiny_model_dir
    assert load.check_model("package:smollm2-135m-instruct") == "package:smollm2-135m-instruct"


def test_tokenizer_without_chat_template(tmp_path):
    build_tiny_tokenizer(chat_template=False).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="no chat template"):
        load.load_tokenizer(tmp_path)


def test_a_template_takes_the_place_of_the_tokenizer_s_own(tmp_path):
    template = "{% for message in messages %}Q: {{ message['content'] }}\nA:{% endfor %}"
    (tmp_path / "chat.jinja").write_text(template)
    for name, value in (("none", template), ("own", str(tmp_path / "chat.jinja"))):
        tokenizer = build_tiny_tokenizer(chat_template=name == "own")
        tokenizer.save_pretrained(tmp_path / name)
        loaded = load.load_tokenizer(tmp_path / name, chat_template=value)
        asked = [{"role": "user", "content": "why?"}]
        assert loaded.apply_chat_template(asked, tokenize=False) == "Q: why?\nA:"
        loaded.save_pretrained(tmp_path / "saved")  # as a checkpoint has it
        assert load.load_tokenizer(tmp_path / "saved").chat_template == template


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("no/such/file.jinja", r"'no/such/file.jinja': cannot be read as a file: .*No such file"),
        ("{% for message in messages %}", "is no template of a chat: TemplateSyntaxError"),
        ("Question: {{ prompt }}", "prints no message"),
    ],
)
def test_a_template_that_cannot_be_used(tiny_model_dir, template, said):
    with pytest.raises(ConfigError, match=f"model.chat_template = .*{said}"):
        load.load_tokenizer(tiny_model_dir, chat_template=template)


def test_tokenizer_pads_left_whatever_was_saved(tmp_path):
    tokenizer = build_tiny_tokenizer()
    tokenizer.padding_side = "right"
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    loaded = load.load_tokenizer(tmp_path)
    assert loaded.padding_side == "left"
    assert loaded.pad_token_id == loaded.eos_token_id == 2


def test_folder_without_tokenizer(tmp_path, tiny_model_dir):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_model_dir / name, tmp_path)
    with pytest.raises(ConfigError, match="tokenizer cannot be loaded"):
        load.load_tokenizer(tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_model_loads_for_training(tiny_model_dir, dtype):
    machine = a_machine(weights=getattr(torch, dtype))
    model = load.load_model(model_config(dtype=dtype), tiny_model_dir, machine)
    assert model.training and model.is_activation_checkpointing
    assert all(parameter.dtype == getattr(torch, dtype) for parameter in model.parameters())
    assert model.config._attn_implementation == "grouped"


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma2"])
@pytest.mark.parametrize("length", [20, 150])
@torch.no_grad()
def test_auto_attention_is_that_of_transformers(kind, length, tmp_path):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SMALL, "num_attention_heads": 4})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    ids, mask = torch.randint(3, 50, (2, length)), torch.ones(2, length, dtype=torch.long)
    mask[0, :5] = 0
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    model = load.load_model(model_config(), tmp_path, CPU)
    # Gemma2 caps its scores, and so has no sdpa, either.
    assert model.config._attn_implementation == ("eager" if kind == "gemma2" else "grouped")
    found, expected = (
        one(input_ids=ids, attention_mask=mask).logits[mask == 1] for one in (model, plain)
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("attention", ["sdpa", "grouped", "varlen", "flash_attention_2"])
def test_attention_without_sinks_is_refused_where_a_model_has_them(attention):
    on_gpu = a_machine("cuda", compute=torch.bfloat16)
    assert load.choose_attention("auto", on_gpu, "gpt_oss") == "eager"
    with pytest.raises(ConfigError, match="leaves out the attention sinks of gpt_oss"):
        load.choose_attention(attention, on_gpu, "gpt_oss")


def test_gradient_checkpointing_changes_nothing_but_memory(tiny_model_dir):
    gradients = []
    for on in (True, False):
        cfg = model_config(gradient_checkpointing=on)
        model = load.load_model(cfg, tiny_model_dir, CPU)
        assert model.is_activation_checkpointing == on
        model(input_ids=torch.arange(12)[None]).logits.logsumexp(-1).sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for with_checkpointing, without in zip(*gradients, strict=True):
        assert torch.equal(with_checkpointing, without)


def test_gradient_checkpointing_by_its_older_name(tiny_model_dir, monkeypatch):
    calls = []
    monkeypatch.delattr(PreTrainedModel, "activation_checkpointing_enable")  # as in 5.17
    monkeypatch.setattr(
        PreTrainedModel,
        "gradient_checkpointing_enable",
        lambda self, options: calls.append(options),
    )
    load.load_model(model_config(), tiny_model_dir, CPU)
    assert calls == [{"use_reentrant": False}]


def test_dropout_is_off_in_train_mode(tmp_path, tiny_model_dir):
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "attention_dropout": 0.5}))
    model = load.load_model(model_config(), tmp_path / "model", CPU)
    ids = torch.arange(12)[None]
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("name", ["flash_attention_2", "varlen"])
def test_gpu_attention_is_refused_on_the_cpu(tiny_model_dir, name):
    with pytest.raises(ConfigError, match="model.attention.*needs a GPU"):
        load.load_model(model_config(attention=name), tiny_model_dir, CPU)


def test_liger_is_refused_where_it_cannot_run(tiny_model_dir):
    with pytest.raises(ConfigError, match="model.liger"):
        load.load_model(model_config(liger=True), tiny_model_dir, CPU)


def small_models():
    granite = {key: value for key, value in SMALL.items() if key != "head_dim"}
    return {
        "granite": GraniteForCausalLM(GraniteConfig(**granite, logits_scaling=8.0)),
        "cohere": CohereForCausalLM(CohereConfig(**granite, logit_scale=0.0625)),
        "gemma2": Gemma2ForCausalLM(Gemma2Config(**SMALL, final_logit_softcapping=0.5)),
        "phi": PhiForCausalLM(PhiConfig(**granite)),
    }


@pytest.mark.parametrize("name", ["granite", "cohere", "gemma2", "phi"])
def test_head_and_backbone_reproduce_the_logits(name):
    torch.manual_seed(0)
    model = small_models()[name].eval()
    for parameter in model.get_output_embeddings().parameters():
        torch.nn.init.normal_(parameter)
    weight, settings = head_arguments(model)
    ids = torch.randint(3, 50, (2, 7))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        hidden = backbone_of(model)(input_ids=ids).last_hidden_state
        logits = hidden @ weight.T
        if settings["bias"] is not None:
            logits = logits + settings["bias"]
        logits = logits * settings["logit_scale"]
        if (cap := settings["softcap"]) is not None:
            logits = cap * torch.tanh(logits / cap)
    torch.testing.assert_close(logits, expected)
    scale, cap, bias = settings["logit_scale"], settings["softcap"], settings["bias"]
    special = {"granite": scale == 1 / 8, "cohere": scale == 0.0625}
    assert special.get(name, cap == 0.5 if name == "gemma2" else bias is not None)


def test_head_that_the_config_does_not_describe_is_refused(tmp_path, monkeypatch):
    granite = {key: value for key, value in SMALL.items() if key != "head_dim"}
    GraniteForCausalLM(GraniteConfig(**granite, logits_scaling=8.0)).save_pretrained(tmp_path)
    load.load_model(model_config(), tmp_path, CPU)
    plain = heads.head_arguments

    def blind(model):
        weight, settings = plain(model)
        return weight, {**settings, "logit_scale": 1.0}

    monkeypatch.setattr(heads, "head_arguments", blind)
    with pytest.raises(ConfigError, match="not those of a plain linear head"):
        load.load_model(model_config(), tmp_path, CPU)


def varlen_on_cpu(query, key, value, **options):
    """The kernel's contract in plain PyTorch, one packed row after the other."""
    bounds = options["cu_seq_q"].tolist()
    assert options["max_q"] == max(b - a for a, b in zip(bounds, bounds[1:], strict=False))
    left, right = options["window_size"]
    assert right == 0
    groups = query.shape[1] // key.shape[1]
    pieces = []
    for start, stop in zip(bounds, bounds[1:], strict=False):
        length = stop - start
        distance = torch.arange(length)[:, None] - torch.arange(length)[None]
        mask = (distance >= 0) & (distance <= (left if left >= 0 else length))
        q, k, v = (states[start:stop].transpose(0, 1) for states in (query, key, value))
        k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
        scores = (q @ k.transpose(1, 2) * options["scale"]).masked_fill(~mask, -torch.inf)
        pieces.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(pieces)


@pytest.fixture
def varlen_model(tiny_model_dir, monkeypatch):
    monkeypatch.setattr(attention.varlen, "varlen_attn", varlen_on_cpu)
    attention.register()
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir, attn_implementation="varlen").eval()


@torch.no_grad()
def test_varlen_keeps_packed_rows_apart(varlen_model, tiny_model_dir):
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()
    for lengths in ((5, 1, 9), (3, 7), (15,)):
        rows = [torch.randint(3, 300, (1, length)) for length in lengths]
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        packed = varlen_model(
            input_ids=torch.cat(rows, 1), position_ids=positions, use_cache=False
        ).logits
        expected = torch.cat([plain(input_ids=row).logits for row in rows], 1)
        torch.testing.assert_close(packed, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_varlen_model_generates_as_sdpa_does(varlen_model, tiny_model_dir):
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()
    ids = torch.randint(3, 300, (2, 6))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    options = dict(attention_mask=mask, max_new_tokens=6, do_sample=False)
    assert torch.equal(varlen_model.generate(ids, **options), plain.generate(ids, **options))


@pytest.mark.parametrize(("length", "total"), [(7, 7), (1, 9), (130, 140)])
def test_grouped_attention_is_eager_attention(length, total):
    module = torch.nn.Identity()
    module.num_key_value_groups = 3
    query = torch.randn(2, 6, length, 4, requires_grad=True)
    key, value = (torch.randn(2, 2, total, 4, requires_grad=True) for _ in range(2))
    hidden = torch.rand(2, 1, length, total) < 0.4
    hidden[..., -1] = False
    mask = torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)
    found, expected = (
        forward(module, query, key, value, mask, scaling=0.3)[0]
        for forward in (attention.grouped_attention, eager_attention_forward)
    )
    torch.testing.assert_close(found, expected)
    along = torch.randn_like(found)
    leaves = query, key, value
    gradients = (torch.autograd.grad(output, leaves, along) for output in (found, expected))
    for mine, right in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, right)
    with pytest.raises(ValueError, match="softcap"):
        attention.grouped_attention(module, query, key, value, mask, scaling=0.3, softcap=30.0)


@pytest.mark.skipif(not CPU.runs_cpp, reason="installed without the C++ part")
@torch.no_grad()
def test_grouped_attention_decodes_in_cpp_as_it_does_in_torch():
    module = torch.nn.Identity()
    query, (key, value) = torch.randn(2, 6, 1, 4), torch.randn(2, 2, 2, 9, 4)
    mask = torch.zeros(2, 1, 1, 9)
    mask[1, ..., :4] = torch.finfo(torch.float32).min
    inputs = module, query, key, value, mask
    expected, _ = attention.grouped_attention(*inputs, scaling=0.3)
    found, _ = attention.grouped_attention(*inputs, scaling=0.3, decode_in_cpp=True)
    torch.testing.assert_close(found, expected)


def test_varlen_takes_a_sliding_window(monkeypatch):
    monkeypatch.setattr(attention.varlen, "varlen_attn", varlen_on_cpu)
    query, key, value = (torch.randn(1, 2, 8, 4) for _ in range(3))
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    module = torch.nn.Identity()
    output, _ = attention.varlen_attention(
        module, query, key, value, None, position_ids=positions, scaling=0.5, sliding_window=2
    )
    scores = query @ key.transpose(2, 3) * 0.5
    seen = {(0, 0), (1, 0), (1, 1), (2, 1), (2, 2), (3, 3), (4, 3), (4, 4), (5, 4), (5, 5)}
    seen |= {(6, 5), (6, 6), (7, 6), (7, 7)}
    mask = torch.tensor([[(i, j) in seen for j in range(8)] for i in range(8)])
    expected = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value
    torch.testing.assert_close(output, expected.transpose(1, 2))


def test_varlen_refuses_what_its_kernel_lacks():
    states = torch.randn(1, 2, 8, 4)
    with pytest.raises(ValueError, match="cannot apply softcap"):
        attention.varlen_attention(
            torch.nn.Identity(), states, states, states, None, softcap=30.0, scaling=1.0
        )
