# SPDX-License-Identifier: MIT
"""The squared objective: its gradient, its minimisers on bandits, what is left out."""

import math

import pytest
import torch

from kimi_ops.agentic.objective import advantages, chosen_log_probs, log_ratios, squared_losses

OLD = {2: [0.7, 0.3], 3: [0.5, 0.3, 0.2]}
REWARDS = {2: [0.0, 1.0], 3: [1.0, 0.0, 0.25]}


def test_the_gradient_is_that_of_the_paper():
    """K1.5, eq. 3: 1/K sum of grad log pi (r - mean) - tau/2 grad (log pi / pi_old)^2, uphill."""
    generator = torch.Generator().manual_seed(0)
    k, tau = 6, 0.05
    logits = torch.randn(k, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    answers = torch.randint(5, (k,), generator=generator)
    old = torch.randn(k, dtype=torch.float64, generator=generator) - 2
    rewards = torch.rand(k, dtype=torch.float64, generator=generator)

    def log_pi():
        return logits.log_softmax(-1)[torch.arange(k), answers]

    uphill = ((rewards - rewards.mean()) * log_pi()).mean()
    uphill = uphill - tau / 2 * (log_pi() - old).square().mean()
    expected = torch.autograd.grad(uphill, logits)[0]
    s = log_ratios(log_pi()[:, None], old[:, None], torch.ones(k, 1, dtype=torch.bool))
    loss = squared_losses(s, advantages(rewards[None])[0], torch.ones(k), tau).mean()
    torch.testing.assert_close(-torch.autograd.grad(loss, logits)[0], expected)


def test_the_weight_of_an_answer_is_over_its_length():
    s = torch.zeros(4, requires_grad=True)
    lengths = torch.tensor([1, 4, 2, 0])  # an episode may be cut before a word of the model
    squared_losses(s, torch.ones(4), lengths, 0.1).mean().backward()
    assert s.grad is not None and s.grad.tolist() == [-0.25, -0.0625, -0.125, -0.25]


def test_only_own_ids_count_and_the_old_policy_has_no_gradient():
    new = torch.tensor([[-1.0, -2.0, -torch.inf]], requires_grad=True)
    old = torch.tensor([[-1.5, -1.0, -torch.inf]], requires_grad=True)
    s = log_ratios(new, old, torch.tensor([[True, True, False]]))
    assert s.tolist() == [-0.5]
    s.sum().backward()
    assert new.grad is not None and new.grad.tolist() == [[1, 1, 0]] and old.grad is None


def test_equal_rewards_have_no_gradient():
    rewards = torch.tensor([[1.0, 1, 1], [0, 0, 1], [-0.5, -0.5, -0.5]])
    assert advantages(rewards)[[0, 2]].abs().max() == 0
    s = torch.zeros(3, requires_grad=True)
    squared_losses(s, advantages(rewards)[0], torch.ones(3), 0.05).mean().backward()
    assert s.grad is not None and s.grad.abs().max() == 0
    torch.testing.assert_close(advantages(rewards).sum(-1), torch.zeros(3))


def minimised(arms: int, tau: float, baseline: float) -> torch.Tensor:
    """The policy at the minimum of the expected objective under pi_old."""
    old, rewards = (torch.tensor(x[arms], dtype=torch.float64) for x in (OLD, REWARDS))
    logits = old.log().clone().requires_grad_()
    solver = torch.optim.LBFGS([logits], max_iter=500, line_search_fn="strong_wolfe",
                               tolerance_grad=1e-14, tolerance_change=1e-18)  # fmt: skip

    def closure():
        solver.zero_grad()
        s = logits.log_softmax(-1) - old.log()
        loss = (old * squared_losses(s, rewards - baseline, torch.ones(arms), tau)).sum()
        loss.backward()
        return loss

    solver.step(closure)
    return logits.detach().softmax(-1)


@pytest.mark.parametrize("arms", [2, 3])
@pytest.mark.parametrize("tau", [0.3, 1.0])
def test_with_the_log_of_the_sum_a_bandit_reaches_the_best_policy(arms, tau):
    """pi_old exp(r / tau) / Z solves max E[r] - tau KL(pi || pi_old)."""
    weighted = [p * math.exp(r / tau) for p, r in zip(OLD[arms], REWARDS[arms], strict=True)]
    found = minimised(arms, tau, tau * math.log(sum(weighted)))
    expected = torch.tensor(weighted, dtype=torch.float64) / sum(weighted)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("arms", [2, 3])
@pytest.mark.parametrize("tau", [0.3, 1.0])
def test_with_the_mean_a_bandit_reaches_that_fixed_point(arms, tau):
    """The gradient vanishes where A - tau log u = u d for every arm, u = pi / pi_old, with the d
    for which pi sums to 1: both found by bisection."""
    mean = sum(p * r for p, r in zip(OLD[arms], REWARDS[arms], strict=True))

    def root(function, low, high):
        """Of a falling function."""
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if function(middle) > 0 else (low, middle)
        return low

    def policy(d):
        ratios = [
            root(lambda u, r=r: r - mean - tau * math.log(u) - u * d, 1e-300, 1e6)
            for r in REWARDS[arms]
        ]
        return [p * u for p, u in zip(OLD[arms], ratios, strict=True)]

    d = root(lambda d: sum(policy(d)) - 1, 0.0, 1e3)
    expected = torch.tensor(policy(d), dtype=torch.float64)
    found = minimised(arms, tau, mean)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    best = max(range(arms), key=REWARDS[arms].__getitem__)
    assert found[best] > OLD[arms][best]


def test_log_probabilities_are_those_of_the_temperature():
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(1), requires_grad=True)
    ids = torch.tensor([[9, 1, 2, 3], [9, 4, 0, 1]])
    found, entropies = chosen_log_probs(logits, ids, torch.tensor([1.0, 0.5]))
    for row, temperature in enumerate((1.0, 0.5)):
        drawn = torch.distributions.Categorical(logits=logits[row] / temperature)
        torch.testing.assert_close(found[row], drawn.log_prob(ids[row, 1:]))
        torch.testing.assert_close(entropies[row], drawn.entropy())
    assert found.requires_grad and not entropies.requires_grad
    short = logits.detach().bfloat16()  # of which the sums are not
    found, entropies = chosen_log_probs(short, ids, torch.ones(2))
    assert found.dtype == entropies.dtype == torch.float32
    torch.testing.assert_close(
        found.exp().sum(), short.float().softmax(-1).gather(-1, ids[:, 1:, None]).sum()
    )


def test_tau_is_above_zero():
    with pytest.raises(ValueError, match="tau: expected a number above 0, got 0"):
        squared_losses(torch.zeros(1), torch.zeros(1), torch.ones(1), 0)
