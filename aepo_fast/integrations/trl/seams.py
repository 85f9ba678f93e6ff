"""Whether this TRL is one that AEPO fits into: the functions that AEPO overrides or replaces."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
from __future__ import annotations

import inspect

import trl
from trl import GRPOTrainer
from trl.trainer import utils

# The name in trl.trainer.utils by which TRL's fused head calls its log-prob function.
HEAD_FUNCTION = "_ChunkedLogProbFunction"

# What AEPO overrides, and the arguments it is called with. A "..." ends what AEPO depends on.
_METHODS = {
    "_compute_loss": "self model inputs",
    "_calculate_rewards": "self inputs prompts completions completion_ids_list",
    "_generate_and_score_completions": "self inputs",
    "_get_per_token_logps_and_entropies": "self model input_ids attention_mask logits_to_keep ...",
    "_save_checkpoint": "self model trial",
    "_load_optimizer_and_scheduler": "self checkpoint",
}
_HEAD = "ctx hidden weight bias targets temperature chunk_size final_logit_softcapping logit_scale "
_HEAD_RESULTS = 5
_STATE = ("_step", "_metrics", "reward_weights", "num_generations", "max_completion_length")


def check_trl() -> None:
    """Raise RuntimeError, with the name of what differs, unless AEPO fits into this TRL."""
    for name, expected in _METHODS.items():
        _check(f"GRPOTrainer.{name}", getattr(GRPOTrainer, name, None), expected)
    _check("trl.trainer.utils.add_fused_lm_head", getattr(utils, "add_fused_lm_head", None), "...")
    if not hasattr(utils, HEAD_FUNCTION):
        raise _changed(f"trl.trainer.utils.{HEAD_FUNCTION}", "is missing")
    function = getattr(utils, HEAD_FUNCTION)
    if function is not None and hasattr(function, "forward"):  # None without Triton in TRL 1.15
        _check(f"{HEAD_FUNCTION}.forward", function.forward, _HEAD + "outputs")


def check_trainer(trainer: object) -> None:
    """The same for the attributes of a trainer that AEPO reads."""
    for name in _STATE:
        if not hasattr(trainer, name):
            raise _changed(f"GRPOTrainer.{name}", "is missing")


def _check(name: str, function: object, expected: str) -> None:
    if not callable(function):
        raise _changed(name, "is missing")
    found, wanted = list(inspect.signature(function).parameters), expected.split()
    if wanted[-1] == "...":
        wanted.pop()
        found = found[: len(wanted)]
    if found != wanted:
        raise _changed(name, f"takes ({', '.join(found)}) and not ({', '.join(wanted)})")


def _changed(name: str, what: str) -> RuntimeError:
    return RuntimeError(
        f"TRL {trl.__version__}: {name} {what}, so AEPO does not fit into this version. It was "
        "tested with TRL 1.15 and 1.16: pip install 'trl>=1.15,<1.17'"
    )
