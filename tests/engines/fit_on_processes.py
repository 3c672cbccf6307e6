"""Fits a small model, alone or on the processes that torchrun started; the first process writes its beliefs.

Arguments: model folder, output file, JSON of Laplace settings, gradient accumulation steps.
"""

import json
import os
import sys
from pathlib import Path

import bayesrm as brm
from bayesrm.engines import _derivatives


def main(folder, out, settings, accumulation):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "rewards"))
    import lora_models as models

    _derivatives.BLOCK = 8
    compute, computed = _derivatives.Derivatives._compute, []

    def counted(self, items):
        computed.append(items)
        return compute(self, items)

    _derivatives.Derivatives._compute = counted
    model = brm.RewardModel(
        brm.rewards.LoRA(folder, rank=2, device="cpu"), brm.likelihoods.BradleyTerry(), brm.priors.Gaussian(4.0)
    )
    training = brm.Training(
        epochs=2.0, learning_rate=3e-3, batch_size=4, gradient_accumulation_steps=int(accumulation), max_grad_norm=0.0
    )
    engine = brm.Laplace(training=training, **json.loads(settings))
    posterior = brm.fit(model, models.pairs(24), inference=engine)
    belief = posterior.predict(["w1 w2"], [["w3 w4 w5", "w30 w31", "w10 w20"]])
    if int(os.environ.get("RANK", "0")) == 0:
        answer = {"mean": belief.mean.tolist(), "covariance": belief.covariance.tolist(), "blocks": len(computed)}
        Path(out).write_text(json.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
