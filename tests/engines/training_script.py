"""Trains a tiny model and saves weights and latents; run alone, under torchrun, or to be killed at a step.

Arguments: model folder, output file, settings as JSON (those of `Training`, with `kill_at` and `dropout` beside).
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1] / "rewards"))
import lora_models

import bayesrm as brm
from bayesrm.engines._density import FeedbackDensity
from bayesrm.engines.training import Training, train


class Kill(transformers.TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def run(model, settings):
    settings = dict(settings)
    kill_at, dropout = settings.pop("kill_at", None), settings.pop("dropout", 0.0)
    data = lora_models.pairs(38)
    lora = brm.rewards.LoRA(model, rank=2, dropout=dropout, device="cpu")
    program = brm.RewardModel(lora, brm.likelihoods.Davidson())
    network = lora.load(0)
    callbacks = () if kill_at is None else (Kill(kill_at),)
    density = FeedbackDensity(program, data.groups())
    report = train(network, program, data, density, Training(**settings, callbacks=callbacks), seed=1, progress=False)
    return network.theta(), report


if __name__ == "__main__":
    theta, report = run(sys.argv[1], json.loads(sys.argv[3]))
    if int(os.environ.get("RANK", "0")) == 0:
        found = {"theta": theta, "latents": report.latents, "resumed_from": report.resumed_from, "steps": report.steps}
        torch.save(found | {"processes": int(os.environ.get("WORLD_SIZE", "1"))}, sys.argv[2])
