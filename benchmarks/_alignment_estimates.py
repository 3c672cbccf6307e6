"""Self-normalised importance sampling against enumeration: intervals, the length of BRAIn's step, and its minimum."""

import math

import torch
from _alignment_methods import TILT, exact, sampled_gradients
from _alignment_training import Schedule, train
from _alignment_world import World, divergence
from torch import Tensor

from bayesrm.alignment import Method, projections


def coverage(world: World, proposal: Tensor, num_draws: int, *, repeats: int, seed: int) -> dict[str, float]:
    """How often intervals of 1.96 reported errors hold the exact expected reward under the tilt.

    Args:
        world: Rows are prompts.
        proposal: log p'(y) of all responses.
        num_draws: Candidates of a set.
        repeats: Sets of each row.
        seed: Of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    truth = (exact(TILT)(world).exp() * world.rewards).sum(1)
    method = Method(TILT, projections.ForwardKL(), num_candidates=num_draws)
    inside, reliable, errors = [], [], []
    for _ in range(repeats):
        places = torch.multinomial(proposal.exp(), num_draws, True, generator=generator)
        posterior = method.weigh(world.candidates(places, proposal=proposal.gather(1, places)))
        mean, error = posterior.expectation(world.rewards.gather(1, places), allow_unreliable=True)
        inside.append((mean - truth).abs() <= 1.96 * error)
        reliable.append(posterior.reliable)
        errors.append(mean - truth)
    held, trusted = torch.stack(inside).double(), torch.stack(reliable)
    bias = torch.stack(errors)
    return {
        "coverage": float(held.mean()),
        "error": float(held.std(0).pow(2).mean().sqrt() / math.sqrt(held.numel())),
        "coverage_reliable": float(held[trusted].mean()) if bool(trusted.any()) else math.nan,
        "reliable": float(trusted.double().mean()),
        "bias": float(bias.mean()),
        "bias_error": float(bias.std() / math.sqrt(bias.numel())),
    }


def shrinkage(world: World, num_candidates: int, proposal: str, *, num_sets: int, seed: int) -> tuple[float, float]:
    """Length of BRAIn's expected step along the gradient of KL(target || policy), as a share of it.

    The policy is half way to the tilt.

    Returns:
        The mean over rows and its standard error over rows.
    """
    log_target = exact(TILT)(world)
    logits = world.responses.logits_of(0.5 * (world.log_reference + log_target))
    leaf = logits.clone().requires_grad_()
    (-(log_target.exp() * world.responses.log_probs(leaf)).sum()).backward()
    assert leaf.grad is not None
    true = leaf.grad.flatten(1)
    method = Method(TILT, projections.ListwiseCrossEntropy(), proposal=proposal, num_candidates=num_candidates)
    mean = sampled_gradients(world, method, logits, num_sets=num_sets, seed=seed).mean(1)
    share = (mean * true).sum(1) / true.square().sum(1)
    return float(share.mean()), float(share.std() / math.sqrt(len(share)))


def at_target(world: World, num_candidates: int, proposal: str, *, num_sets: int, seed: int) -> float:
    """Largest entry of BRAIn's gradient on any set of candidates when the policy is the target."""
    logits = world.responses.logits_of(exact(TILT)(world))
    method = Method(TILT, projections.ListwiseCrossEntropy(), proposal=proposal, num_candidates=num_candidates)
    return float(sampled_gradients(world, method, logits, num_sets=num_sets, seed=seed).abs().max())


def by_place(world: World, parameters: Tensor) -> Tensor:
    """Logits of a policy that knows the place of a token but not the tokens before: those of the first prefix there."""
    first = torch.tensor([int((world.responses.depth == d).nonzero()[0, 0]) for d in world.responses.depth])
    return parameters[:, first]


def nearest_by_place(world: World, log_target: Tensor) -> Tensor:
    """Log q(y) of the place-wise policy nearest to the target: the target's frequencies at each place."""
    responses = world.responses
    counts = (log_target.exp() @ responses.path_matrix.T).reshape(len(log_target), -1, responses.num_tokens)
    places = torch.nn.functional.one_hot(responses.depth).double()
    pooled = torch.einsum("rpt,pd->rdt", counts, places)
    return responses.log_probs((pooled / pooled.sum(2, keepdim=True)).log()[:, responses.depth])


def restricted(world: World, num_candidates: int, proposal: str, schedule: Schedule, *, seed: int) -> Tensor:
    """BRAIn with a policy that cannot be the target: what it loses, by run.

    Returns:
        KL(target || policy) beyond the smallest there is, shape `(seeds,)`.
    """
    log_target = exact(TILT)(world)
    method = Method(TILT, projections.ListwiseCrossEntropy(), proposal=proposal, num_candidates=num_candidates)
    found = train(world, method, schedule, seed=seed, records=1, share=lambda p: by_place(world, p)).last
    nearest = nearest_by_place(world, log_target)
    excess = divergence(log_target, found) - divergence(log_target, nearest)
    return world.by_seed(excess)


def lowest_by_pairs(world: World) -> Tensor:
    """What BRAIn with pairs of the reference converges to with a place-wise policy: KL(target || .) over the least.

    The self-normalised divergence is a sum over all pairs, minimised by L-BFGS; shape `(seeds,)`.
    """
    log_target, log_p0 = exact(TILT)(world), world.log_reference
    leaf = world.reference.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([leaf], max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe")
    drawn = (log_p0[:, :, None] + log_p0[:, None, :]).exp()
    wanted = log_target - log_p0
    share = torch.sigmoid(wanted[:, :, None] - wanted[:, None, :])

    def closure() -> Tensor:
        optimizer.zero_grad()
        ratio = world.responses.log_probs(by_place(world, leaf)) - log_p0
        log_share = torch.nn.functional.logsigmoid(ratio[:, :, None] - ratio[:, None, :])
        loss = -2.0 * (drawn * share * log_share).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    found = world.responses.log_probs(by_place(world, leaf.detach()))
    nearest = nearest_by_place(world, log_target)
    return world.by_seed(divergence(log_target, found) - divergence(log_target, nearest))
