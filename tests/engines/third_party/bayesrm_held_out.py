"""Laplace at the prior precision that predicts held-out prompts best; repeated answers can mislead the evidence."""

import dataclasses

import numpy as np

import bayesrm as brm


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Cross-validates the prior precision over prompts.

    Attributes:
        num_folds: Parts of the prompts, each of which is held out once.
        factors: Factors on the declared precision that are tried.
    """

    num_folds: int = 5
    factors: tuple[float, ...] = (0.01, 0.1, 1.0, 10.0, 100.0)

    def fit(self, program: brm.RewardModel, data: brm.Comparisons, *, seed: int, progress: bool) -> brm.Posterior:
        """The posterior at the best of the precisions, see `bayesrm.fit`."""
        if isinstance(program.reward, brm.rewards.LoRA):
            raise brm.errors.EngineError("HeldOut would train a LoRA reward in every fold; use Laplace")
        if not 2 <= self.num_folds <= data.num_prompts:
            raise brm.errors.ArgumentError(f"`num_folds` is {self.num_folds}; use 2 to {data.num_prompts}, the prompts")
        order = np.random.default_rng(seed).permutation(data.num_prompts)
        fold = (order % self.num_folds)[data.prompt_of_row]

        def held_out_log_prob(candidate: brm.RewardModel) -> float:
            total = 0.0
            for k in range(self.num_folds):
                found = brm.Laplace().fit(candidate, data.select(fold != k), seed=seed, progress=False)
                prediction = found.predict_feedback(data.select(fold == k), seed=seed)
                total += float((prediction.weight * prediction.log_prob)[prediction.weight > 0].sum())
            return total

        candidates = [dataclasses.replace(program, prior=program.prior.scaled(factor)) for factor in self.factors]
        posterior = brm.Laplace().fit(max(candidates, key=held_out_log_prob), data, seed=seed, progress=progress)
        engine = {"name": "HeldOut", "settings": dataclasses.asdict(self)}
        posterior.report = dataclasses.replace(posterior.report, engine=engine)
        return posterior
