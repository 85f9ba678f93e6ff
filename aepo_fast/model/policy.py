"""The policy as the losses see it: hidden states of completion tokens, and the head over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from transformers import PretrainedConfig, PreTrainedModel

from aepo_fast.config.errors import ConfigError
from aepo_fast.config.resolve import Machine
from aepo_fast.config.sections import TrainerConfig
from aepo_fast.model.activations import OffloadedActivations
from aepo_fast.model.batch import (
    BATCH_TOKENS,
    GPU_BATCH_TOKENS,
    RANK_BATCH_TOKENS,
    Layout,
    MicroBatch,
    make_microbatches,
)
from aepo_fast.model.experts import balancing_loss, with_loss
from aepo_fast.model.load import recurrent_layers, takes_positions
from aepo_fast.model.lora import without_adapter
from aepo_fast.model.rank_batches import microbatches_of_rank
from aepo_fast.model.sharded import inside_forward, is_sharded, reshard
from aepo_fast.model.tensor_parallel import is_split, part_of_head
from aepo_fast.samples import Sample, TokenValues, token_index, token_offsets
from aepo_kernels import (
    LogprobOutput,
    TokenLossOutput,
    linear_logprob,
    linear_token_loss,
    row_kernels,
)
from aepo_kernels.integrations import backbone_of, head_arguments


def choose_layout(model: PreTrainedModel, requested: Layout | Literal["auto"]) -> Layout:
    """Resolve trainer.layout for a model; raises ConfigError where the request cannot be met.

    "auto" packs where the attention takes variable lengths, shares prompts under plain sdpa, eager
    or grouped attention, and pads where the model has sliding windows, which a dense mask would
    undo, layers whose state would run on from row to row, or positions of its own.
    """
    alone = recurrent_layers(model.config) or not takes_positions(model.config)
    if alone and requested in ("packed", "shared"):
        reason = "needs attention with rotary embeddings in every layer"
        raise ConfigError("trainer.layout", requested, reason, 'Use "auto"')
    if alone:
        return "padded"
    attention = model.config._attn_implementation
    varlen = attention in ("flash_attention_2", "varlen")
    windowed = has_windows(model.config)
    if requested == "auto":
        return "packed" if varlen else "padded" if windowed else "shared"
    if requested == "shared" and (varlen or windowed):
        reason = "needs sdpa, eager or grouped attention on every layer without a sliding window"
        raise ConfigError("trainer.layout", requested, reason, 'Use "auto"')
    return requested


def has_windows(config: PretrainedConfig) -> bool:
    """Whether some layer sees less than all tokens before its own."""
    config = config.get_text_config()
    layers = getattr(config, "layer_types", None)
    if layers:
        return any(kind != "full_attention" for kind in layers)
    # Mistral, Mixtral, Phi-3 and others have one window for all layers.
    window = getattr(config, "sliding_window", None)
    return window is not None and getattr(config, "use_sliding_window", None) is not False


class Policy:
    """A model with its head taken apart, so that logits are never materialised.

    Works under autocast to the machine's compute_dtype; the head's GEMMs run in that dtype and its
    statistics in fp32.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        machine: Machine,
        trainer: TrainerConfig,
        *,
        adapter: bool = True,
        activation_offloading: bool = False,
        router_aux_loss_coef: float = 0.0,
    ) -> None:
        """adapter: False leaves out the model's adapter: the policy before any training.

        activation_offloading: the layers' activations lie in CPU memory until the backward pass.
        router_aux_loss_coef: above 0, backward passes add the gradient of the loss that balances
        experts, so weighted. The micro-batches of a call of `microbatches` share that weight.
        """
        self.model, self.machine = model, machine
        self.router_aux_loss_coef = router_aux_loss_coef
        self.activation_offloading = activation_offloading
        self.on_offloaded: Callable[[torch.Tensor], None] = lambda copy: None  # each such tensor
        self.backbone = backbone_of(model)
        self._adapted = nullcontext if adapter else partial(without_adapter, model)
        with self._adapted():
            self.weight, self.head = head_arguments(model)
        self.device = machine.device
        embedding = model.get_input_embeddings()
        tied = isinstance(embedding, torch.nn.Embedding) and embedding.weight is self.weight
        if tied and not machine.is_gpu and not is_sharded(model):
            # The rows of the batch's tokens are added to the head's gradient, instead of V x H
            # numbers that are mostly zero.
            embedding.sparse = True  # type: ignore[union-attr]
        self.layout: Layout = choose_layout(model, trainer.layout)
        self.max_tokens = trainer.tokens_per_microbatch
        on_cpu = RANK_BATCH_TOKENS if machine.data.size > 1 else BATCH_TOKENS
        self.batch_tokens = GPU_BATCH_TOKENS if machine.is_gpu else on_cpu

    @property
    def row_kernels(self) -> str:
        """Which row operations the head runs."""
        return row_kernels(self.device.type, self.machine.compute_dtype, self.machine.head_backend)

    @contextmanager
    def same_weights(self) -> Iterator[None]:
        """While the weights stay the same: they are cast once for all micro-batches."""
        # Autocast forgets its casts at the end of the outermost context.
        with self.machine.autocast(), torch.autocast(self.device.type, enabled=False):
            yield
        if is_sharded(self.model):
            reshard(self.model)

    def microbatches(self, samples: Sequence[Sample], indices: Sequence[int]) -> list[MicroBatch]:
        """Lay samples[indices] out for the model, of several processes this one's part."""
        options: dict[str, Any] = {
            "layout": self.layout,
            "max_tokens": self.max_tokens,
            "batch_tokens": self.batch_tokens,
        }
        if self.machine.data.size > 1:
            return microbatches_of_rank(self.machine.data, samples, indices, **options)
        return make_microbatches(samples, indices, **options)

    def hidden(self, batch: MicroBatch) -> torch.Tensor:
        """Final hidden states that predict the completion tokens: [N, H] in compute dtype."""
        mask = batch.attention_mask
        added = self.model.config._attn_implementation in ("eager", "grouped")
        if added and mask is not None and mask.ndim == 4:
            # Eager attention adds its mask to the scores.
            low = torch.finfo(self.machine.compute_dtype).min
            mask = torch.zeros(mask.shape, dtype=self.machine.compute_dtype).masked_fill(~mask, low)
        # Not the head: its kernels save gradients, among them that of its weight, for the very next
        # pass.
        moves = self.activation_offloading and torch.is_grad_enabled()
        saved = OffloadedActivations(on_copy=self.on_offloaded) if moves else nullcontext()
        balances = self.router_aux_loss_coef > 0 and torch.is_grad_enabled()
        options = {"output_router_logits": True} if balances else {}
        with self.machine.autocast(), self._adapted(), saved:
            output = self.backbone(
                input_ids=batch.input_ids.to(self.device),
                position_ids=batch.position_ids.to(self.device),
                attention_mask=None if mask is None else mask.to(self.device),
                use_cache=False,
                **options,
            )
        states = output.last_hidden_state.flatten(0, 1)
        if balances:
            valid = batch.valid.to(self.device)
            loss = balancing_loss(self.model, output.router_logits, valid)
            states = with_loss(states, self.router_aux_loss_coef * batch.share * loss)
        # index_select: its backward is deterministic on the CPU where plain indexing's is not.
        return states.index_select(0, batch.select.to(self.device)).to(self.machine.compute_dtype)

    def logprobs(
        self,
        batch: MicroBatch,
        *,
        second_temperature: float | None = None,
        with_entropy_gradient: bool = False,
    ) -> LogprobOutput:
        """Log-probs and entropies at temperature 1 of a micro-batch's completion tokens.

        Where the sampler left tokens out, they are those of softmax over the ids that it kept.

        with_entropy_gradient: a gradient will come by the entropy beside that by the log-probs. It
        saves a GEMM of a frozen head to know it beforehand.
        """
        several = with_entropy_gradient and second_temperature is None

        def run() -> LogprobOutput:
            hidden, (weight, settings) = self.hidden(batch), self._whole_head(batch)
            return linear_logprob(
                hidden,
                weight,
                batch.targets.to(self.device),
                second_temperature=second_temperature,
                grad_of=("logprob", "entropy") if several else None,
                **settings,
            )

        return inside_forward(self.model, run) if is_sharded(self.model) else run()

    def token_loss(
        self,
        batch: MicroBatch,
        loss: Callable[..., tuple[torch.Tensor, dict[Any, torch.Tensor]]],
        *columns: torch.Tensor,
        second_temperature: float | None = None,
    ) -> TokenLossOutput:
        """A loss over a micro-batch's completion tokens, summed, ready for its backward pass.

        loss, columns: as `linear_token_loss` takes them; each column is [N], on the device. Kept
        ids count as in `logprobs`.
        """

        def run() -> TokenLossOutput:
            hidden, (weight, settings) = self.hidden(batch), self._whole_head(batch)
            return linear_token_loss(
                hidden,
                weight,
                batch.targets.to(self.device),
                loss,
                *columns,
                second_temperature=second_temperature,
                **settings,
            )

        return inside_forward(self.model, run) if is_sharded(self.model) else run()

    def _whole_head(self, batch: MicroBatch) -> tuple[torch.Tensor, dict[str, Any]]:
        """The head's weight, and all that the kernels must know besides it."""
        weight, head = self.weight, self.head
        if is_sharded(self.model):  # whole only now, in tensors of its own
            with self._adapted():
                weight, head = head_arguments(self.model)
        if is_split(weight):
            weight, head = part_of_head(weight, head)
        settings = {
            **head,
            "ignore_index": None,  # a micro-batch selects its completion tokens itself
            "backend": self.machine.head_backend,
        }
        if batch.kept_ids is not None:
            settings["kept_ids"] = batch.kept_ids.to(self.device).long()
        return weight, settings

    @torch.no_grad()
    def token_values(
        self,
        samples: Sequence[Sample],
        indices: Sequence[int],
        *,
        second_temperature: float | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> TokenValues:
        """Log-probs and entropies of samples[indices], without gradients, 0 for all others.

        `check` is called before every micro-batch and may raise.
        """
        offsets = token_offsets(samples)
        columns = [torch.zeros(int(offsets[-1])) for _ in range(3)]
        with self.same_weights():
            for batch in self.microbatches(samples, indices):
                check()
                output = self.logprobs(batch, second_temperature=second_temperature)
                if batch.idle:
                    continue
                index = token_index(offsets, batch.samples)
                columns[0][index] = output.logprob.cpu()
                columns[1][index] = output.entropy.cpu()
                if output.second_logprob is not None:
                    columns[2][index] = output.second_logprob.cpu()
        self.machine.data.add(*columns)
        return TokenValues(columns[0], columns[1], columns[2] if second_temperature else None)
