"""The model of the small size: a Llama of characters, and the base policy that it starts from."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import random
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bench.entropy.small_tasks import CHARACTERS, SmallTask

# The prompt is the question's characters and nothing else.
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
VOCABULARY = ("<pad>", "<end>", *CHARACTERS)
PAD_ID, END_ID = 0, 1
_IGNORED = -100  # torch's own


@dataclass(frozen=True)
class WarmUp:
    """How the base policy is made: its size, and supervised steps on the task's examples.

    sharpness: what the logits are multiplied by afterwards, in the last norm. Below 1 the policy
    knows the task, in all its ways, and yet is often wrong: as base models are, whose skill a few
    hundred steps of reinforcement learning bring out and do not make. The learning rate rises over
    the first tenth of the steps and falls to zero as a half cosine.
    """

    steps: int
    sharpness: float
    hidden: int = 128
    layers: int = 2
    batch: int = 64  # examples a step
    lr: float = 3e-3
    seed: int = 0


_WRITE = WarmUp(steps=4000, sharpness=0.3)
WARM_UPS = {
    "write": _WRITE,
    "reach": _WRITE,
    "value": WarmUp(steps=2500, sharpness=0.3),
}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, the end token and one to pad with."""
    vocabulary = {text: index for index, text in enumerate(VOCABULARY)}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token=VOCABULARY[PAD_ID]))
    plain.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    plain.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain,
        pad_token=VOCABULARY[PAD_ID],
        eos_token=VOCABULARY[END_ID],
        padding_side="left",
        model_max_length=64,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(warm_up: WarmUp) -> LlamaForCausalLM:
    """The model before its first step."""
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=warm_up.hidden,
        intermediate_size=3 * warm_up.hidden,
        num_hidden_layers=warm_up.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(warm_up.seed)
        return LlamaForCausalLM(config)


def base_model(task: SmallTask, warm_up: WarmUp, folder: Path) -> Path:
    """The folder of the base policy, made where there is none of these settings yet."""
    path = folder / f"{task.name}-{_fingerprint(task, warm_up)}"
    if not path.is_dir():
        draft = path.with_suffix(".tmp")
        shutil.rmtree(draft, ignore_errors=True)
        model = build_model(warm_up)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # sums, and so the model, depend on it
        warm(model, task, warm_up)
        torch.set_num_threads(threads)
        model.save_pretrained(draft)
        build_tokenizer().save_pretrained(draft)
        draft.rename(path)
    return path


def _fingerprint(task: SmallTask, warm_up: WarmUp) -> str:
    """Of all that makes the model: its settings, what it imitates, and how."""
    rng = random.Random(warm_up.seed)
    examples = [task.example(rng) for _ in range(300)]
    sources = [inspect.getsource(part) for part in (build_model, warm, _schedule, _as_batch)]
    made_of = [asdict(warm_up), VOCABULARY, examples, sources]
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:12]


def write_prompts(task: SmallTask, folder: Path) -> Path:
    """The task's prompts as a source of the trainer's: one JSON object a line."""
    path = folder / f"{task.name}.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in task.prompts()))
    return path


def warm(model: LlamaForCausalLM, task: SmallTask, warm_up: WarmUp) -> None:
    """Imitate the task's examples: cross-entropy of their completions, the end token included."""
    rng = random.Random(warm_up.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=warm_up.lr, weight_decay=0.01)
    for step in range(warm_up.steps):
        for group in optimizer.param_groups:
            group["lr"] = warm_up.lr * _schedule((step + 1) / warm_up.steps)
        examples = [task.example(rng) for _ in range(warm_up.batch)]
        ids, labels = _as_batch(examples)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = functional.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=_IGNORED
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step + 1 == warm_up.steps:
            print(f"warm-up of {task.name}: step {step + 1}, loss {loss.item():.3f}", flush=True)
    with torch.no_grad():
        model.model.norm.weight.mul_(warm_up.sharpness)


def _schedule(progress: float) -> float:
    return min(progress / 0.1, 0.5 + 0.5 * math.cos(math.pi * progress))


def _as_batch(examples: list[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels [B, L], padded on the right; labels of prompts and padding are ignored."""
    index = {text: number for number, text in enumerate(VOCABULARY)}
    length = max(len(prompt) + len(answer) + 1 for prompt, answer in examples)
    ids = torch.full((len(examples), length), PAD_ID)
    labels = torch.full_like(ids, _IGNORED)
    for row, (prompt, answer) in enumerate(examples):
        known = torch.tensor([*(index[character] for character in prompt + answer), END_ID])
        ids[row, : len(known)] = known
        labels[row, len(prompt) : len(known)] = known[len(prompt) :]
    return ids, labels
