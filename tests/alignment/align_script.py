"""Aligns a tiny policy and saves its weights; run alone, under torchrun, or to be killed at a step.

Arguments: output file, settings as JSON (those of `Training`, with `kill_at`, `anchor_rate` and `projection` beside).
"""

import dataclasses
import importlib.util
import json
import os
import signal
import sys
from pathlib import Path

import torch
import transformers

import bayesrm as brm
from bayesrm.alignment import Method, align, projections, targets


def _policies():
    spec = importlib.util.spec_from_file_location("policies", Path(__file__).with_name("policies.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Kill(transformers.TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def count_reward(prompts, candidates):
    """The reward of a response is how often it says `w1`, known up to noise."""
    most = max(map(len, candidates))
    mean, mask = torch.zeros(len(candidates), most), torch.zeros(len(candidates), most, dtype=torch.bool)
    for row, responses in enumerate(candidates):
        for place, response in enumerate(responses):
            mean[row, place], mask[row, place] = response.split().count("w1"), True
    root = 0.1 * torch.eye(most).expand(len(candidates), -1, -1)
    return brm.RewardBelief(mean, root, mask)


METHODS = {
    "brain": Method(brm.GoodnessPosterior(), projections.ListwiseCrossEntropy(), num_candidates=6),
    "moving": Method(
        targets.BestOfN(4), projections.Jeffreys(), proposal=("policy",) * 3 + ("anchor",) * 3, num_candidates=6,
        anchor_rate=0.3, anchor_every=2,
    ),
    "tokens": Method(
        brm.GoodnessPosterior(brm.programs.ExponentialTilt(maximum=0.0)),
        projections.PathConsistency(reversed_roles=0.5), num_candidates=4, anchor_rate=0.5,
    ),
}  # fmt: skip


def run(settings):
    settings = dict(settings)
    kill_at, name = settings.pop("kill_at", None), settings.pop("method", "brain")
    rounds = settings.pop("rounds", 4)
    policy = _policies().policy("gpt2")
    training = brm.Training(
        **{"epochs": 2.0, "batch_size": 2, "learning_rate": 5e-3} | settings,
        callbacks=() if kill_at is None else (Kill(kill_at),),
    )
    prompts = [f"w{i} w{i + 1}" for i in range(10)]
    report = align(
        policy, count_reward, prompts, method=METHODS[name], rounds=rounds, prompts_per_round=8, training=training,
        seed=3,
    )  # fmt: skip
    theta = torch.cat([p.detach().reshape(-1) for p in policy.trainable.values()])
    return policy, theta, report


if __name__ == "__main__":
    _, theta, report = run(json.loads(sys.argv[2]))
    if int(os.environ.get("RANK", "0")) == 0:
        summary = [dataclasses.asdict(r) for r in report.rounds]
        torch.save(
            {"theta": theta, "steps": report.steps, "resumed_from": report.resumed_from, "rounds": summary},
            sys.argv[1],
        )
