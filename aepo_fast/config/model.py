"""The sections of the model: which weights, how they are held, and the adapters on them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from aepo_fast.config.conditions import (
    Needs,
    above_zero,
    one_of,
    refuse_what_does_nothing,
    setting,
    settle_older,
)
from aepo_fast.config.errors import require, require_not_negative, require_positive

# "auto" is bfloat16 where the device has instructions for its GEMMs, else float32.
ComputeDtype = Literal["auto", "float32", "bfloat16"]
Attention = Literal["auto", "sdpa", "flash_attention_2", "varlen", "grouped", "eager"]
Checkpointing = Literal["none", "full"] | int


_WITH_LORA = above_zero("rank")
_WITH_ADAPTER = Needs(
    ("model.lora.rank",),
    lambda rank: rank > 0,
    "set {} above 0",
    without="{} = 0: weights of 4 bits are never trained themselves",
)
_ALL_WEIGHTS = one_of("model.lora.rank", 0)
_TRAINED_ROUTER = one_of("freeze_router", False)


@dataclass(frozen=True)
class LoraConfig:
    """Train low-rank adapters in place of the weights (peft): W + alpha / rank * B A.

    There is no dropout: it would make the ratio of new and old probabilities differ from 1 for the
    very same weights.
    """

    rank: int = 0  # rank of the adapters; 0: no adapters, all weights are trained
    # The adapters are scaled by alpha / rank.
    alpha: float = setting(32.0, needs=_WITH_LORA)
    # Names of the linear layers that get an adapter, e.g. "q_proj" or "lm_head". "all-linear" is
    # all of them but the head.
    targets: tuple[str, ...] = setting(("all-linear",), needs=_WITH_LORA)
    rslora: bool = setting(False, needs=_WITH_LORA)  # scale by alpha / sqrt(rank) instead

    def __post_init__(self) -> None:
        require_not_negative("model.lora", self, "rank")
        require_positive("model.lora", self, "alpha")
        require(
            bool(self.targets) and all(self.targets),
            "model.lora.targets",
            list(self.targets),
            "names no layer",
            'Use ["all-linear"], or names such as ["q_proj", "v_proj"]',
        )
        require(
            len(self.targets) == 1 or "all-linear" not in self.targets,
            "model.lora.targets",
            list(self.targets),
            '"all-linear" stands for all names but the head\'s',
            "Use it alone, or name each layer",
        )
        refuse_what_does_nothing("model.lora", self)


@dataclass(frozen=True)
class ModelConfig:
    """Which weights to train and how they are held."""

    path: str = ""  # local folder, hub id, or package:NAME (see `aepo-fast doctor`)
    # Revision of a hub model: a branch, a tag or a commit; empty: its main branch.
    revision: str = ""
    # Python files that come with the model are run, also by vLLM; false: a model that needs them is
    # refused. Only for authors whom you trust with this machine.
    trust_remote_code: bool = False
    # Jinja template of a chat, or a file with one, in place of the tokenizer's own. Base models may
    # have none.
    chat_template: str = ""
    # Dtype of the trained weights. Of bfloat16 weights the optimizer holds float32 copies.
    dtype: Literal["float32", "bfloat16"] = "float32"
    # "nf4" holds the weights of linear layers in 4 bits (bitsandbytes), all but the head's; what is
    # trained is the adapter (QLoRA).
    quantization: Literal["none", "nf4"] = setting("none", needs=_WITH_ADAPTER)
    # Dtype of the GEMMs, by autocast where the weights have another one. "auto" is bfloat16 where
    # the device has instructions for its GEMMs, else float32.
    compute_dtype: ComputeDtype = "auto"
    # Attention of the layers. "varlen" and "flash_attention_2" need a GPU, "grouped" is for CPUs;
    # "auto" chooses by device and model.
    attention: Attention = "auto"
    # Layers keep only their inputs and are computed again in the backward pass: slower, in less
    # memory. "full" is all layers; a number n, 2 or more, is the layers 0, n, 2n and so on, and the
    # others keep all.
    gradient_checkpointing: Checkpointing = setting("full", older={True: "full", False: "none"})
    # What is kept for the backward pass lies in pinned CPU memory until then. Needs a GPU; moves
    # least with gradient_checkpointing = "full".
    activation_offloading: bool = False
    liger: bool = False  # Liger-Kernel for the layers other than the head
    # Backend of the head's kernels; `aepo-fast doctor` says which run here.
    head_backend: Literal["auto", "chunked", "fused", "reference"] = "auto"
    # Routers of a mixture of experts stay as they are.
    freeze_router: bool = setting(False, needs=_ALL_WEIGHTS)
    # Weight of the loss that balances the experts of a mixture (arXiv 2101.03961, over all layers
    # and each micro-batch); 0: none.
    router_aux_loss_coef: float = setting(0.0, needs=(_ALL_WEIGHTS, _TRAINED_ROUTER))
    lora: LoraConfig = field(default_factory=LoraConfig)

    @property
    def origin(self) -> str:
        """The path, with the revision where one is named: path@revision."""
        return f"{self.path}@{self.revision}" if self.revision else self.path

    def __post_init__(self) -> None:
        settle_older(self)
        layers = self.gradient_checkpointing
        require(
            isinstance(layers, str) or layers > 1,
            "model.gradient_checkpointing",
            layers,
            "is no number of layers from one that is computed again to the next",
            'Use "none", "full", or 2 or more',
        )
        require(
            bool(self.path),
            "model.path",
            self.path,
            "no model is named",
            "Set a folder, a hub id, or package:smollm2-135m-instruct",
        )
        require(
            not self.revision or not self.path.startswith("package:"),
            "model.revision",
            self.revision,
            f"is of a hub model, and {self.path} is pinned by the package",
            "Leave it out",
        )
        require_not_negative("model", self, "router_aux_loss_coef")
        refuse_what_does_nothing("model", self)
