"""AEPO's term for tokens of another trainer's samples, made by the forms of `method`."""

from __future__ import annotations

from torch import Tensor

from aepo_fast.config.method import Form
from aepo_fast.method.forms import AepoForm, Clip
from aepo_fast.method.tokens import StepContext, Tokens

# The forms that neither sample at T nor need a sample's group, nor change the policy loss.
FORMS: tuple[Form, ...] = ("lift", "expected", "one_pass")


def token_terms(
    form: AepoForm,
    *,
    logprob: Tensor,
    old_logprob: Tensor,
    entropy: Tensor,
    second_logprob: Tensor | None,
    old_second_logprob: Tensor | None,
    positive: Tensor,
    temperature: float,
    clip: Clip,
) -> tuple[Tensor | None, Tensor | None]:
    """The term before alpha, and rho, each [N], or None where the form has none at T.

    logprob, entropy, second_logprob: of the policy at temperature 1 and T, differentiable.
    old_logprob, old_second_logprob: of the policy that sampled; None for the latter while it is the
    same. positive: 1 for tokens of correct samples. All [N].
    """
    column = {"positive": positive}
    if old_second_logprob is not None:
        column["old_second_logprob"] = old_second_logprob
    tokens = Tokens(logprob, old_logprob, entropy, second_logprob, column)
    context = StepContext(
        temperature=temperature,
        bonus_coef=0.0,
        dcpo_mix=0.0,
        aux_draws=0,
        aux_positives=0,
        num_minibatches=1,
    )
    rho = form.rho(tokens)
    return form.token_term(tokens, rho, context, clip), rho
