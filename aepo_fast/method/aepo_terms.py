"""AEPO's term in its forms, per token (arXiv 2510.08141; DCPO 2601.12730).

All ratios are between temperature-1 policies. Dividing by the tempered law, or correcting for it,
would turn the term back into the plain policy gradient and undo the method.
"""

from __future__ import annotations

import torch

from aepo_fast.method.policy_losses import TokenTerms, clipped_surrogate


def resample_token_loss(
    logprob: torch.Tensor, old_logprob: torch.Tensor, clip_low: float, clip_high: float
) -> TokenTerms:
    """-min(r, clip(r, 1 - low, 1 + high)) for tokens of positive samples drawn at T: [N].

    At r = 1 its gradient is that of -log pi: REINFORCE on the samples the tempered law found.
    """
    ones = torch.ones_like(logprob)
    return clipped_surrogate(logprob, old_logprob, ones, clip_low, clip_high)


def temperature_ratio(
    logprob_at_t: torch.Tensor, logprob: torch.Tensor, rho_clip: float
) -> torch.Tensor:
    """rho = clamp(pi_T / pi, 1/c, c) of the sampled tokens, without gradient: [N].

    Weights actions of pi at visited states so that, up to the clamp, they stand for actions of
    pi_T. Per token only: the product over a sequence has no usable variance.
    """
    bound = torch.log(torch.tensor(rho_clip)).item()
    return (logprob_at_t - logprob).detach().clamp(-bound, bound).exp()


def one_pass_token_loss(
    logprob: torch.Tensor,
    old_logprob: torch.Tensor,
    rho: torch.Tensor,
    clip_low: float,
    clip_high: float,
    *,
    baseline: bool,
) -> TokenTerms:
    """-min(r w, clip(r) w), w = rho, or rho - 1 with `baseline`: [N].

    Where every action is right, the baseline takes out E_pi[grad log pi] = 0, pure variance: what
    is left acts on entropy alone, and vanishes at T = 1. Where only the likeliest action is right,
    rho < 1 at T > 1 and the baseline pushes it down: held entropy then costs accuracy.
    """
    weight = rho - 1 if baseline else rho
    return clipped_surrogate(logprob, old_logprob, weight, clip_low, clip_high)


def lift_token_loss(
    logprob: torch.Tensor,
    old_logprob: torch.Tensor,
    rho: torch.Tensor,
    clip_low: float,
    clip_high: float,
) -> TokenTerms:
    """-min(r w, clip(r) w), w = max(rho - 1, 0): [N].

    The tokens that are likelier at T are lifted, and none is pushed down. Where every action is
    right, its gradient over a ~ pi is J^T ((pi_T - pi)+ - c pi), c being the sum of (pi_T - pi)+.
    At T > 1 it raises the entropy of every pi that is not uniform. Where only the likeliest action
    is right it is 0, while the one-pass term with its baseline pushes that action down.
    """
    return clipped_surrogate(logprob, old_logprob, (rho - 1).clamp(min=0), clip_low, clip_high)


def expected_token_loss(
    logprob: torch.Tensor,
    second_logprob: torch.Tensor,
    temperature: float,
    weight: torch.Tensor,
) -> torch.Tensor:
    """-w (log pi(y) - T log pi_T(y)): the one-pass term summed over the vocabulary, [N].

    Derivation. With logits z, pi = softmax(z) and pi_T = softmax(z / T), the one-pass term with its
    baseline weights an action a by pi_T(a) / pi(a) - 1. Over a ~ pi its expected gradient is

        sum_a (pi_T(a) - pi(a)) grad log pi(a) = sum_a (pi_T(a) - pi(a)) grad z(a)

    (the normaliser of log pi drops out: the weights add up to 0). That is the gradient of
    F_T = T lse(z / T) - lse(z), and log pi(y) - T log pi_T(y) = F_T, since the logit of y cancels.
    F_T is the integral of the entropy of pi_tau over tau from 1 to T: (T - 1) H near T = 1, and at
    larger T it grows on after H has vanished. So the term ascends the entropy at each state without
    the noise of a sampled action.

    logprob, second_logprob: of any token y, at temperatures 1 and T, both differentiated. weight:
    without gradient.
    """
    return -weight * (logprob - temperature * second_logprob)


def dcpo_advantage(
    advantage: torch.Tensor, rho: torch.Tensor, positive: torch.Tensor, mix: float
) -> torch.Tensor:
    """DCPO's advantage (1 - a) A + a R rho: [N]; `positive` holds R as 0 or 1, `mix` is a."""
    return (1 - mix) * advantage + mix * positive * rho


def dcpo_mix(entropy_error: float, positive_share: float, num_samples: int) -> float:
    """DCPO's a = a' / (1 + a') with a' = min(|H0 - H|, 0.1) / max(positive share, 1 / samples)."""
    raw = min(abs(entropy_error), 0.1) / max(positive_share, 1 / num_samples)
    return raw / (1 + raw)
