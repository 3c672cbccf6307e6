import numpy as np
import pytest

import bayesrm as brm


def make_data(kind="choice", rows=60, k=2, num_features=4, *, depth=None, seed=0, **columns):
    """Comparisons of `rows * k` random items; outcomes are placeholders for `simulate`."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(rows * k, num_features))
    outcome = np.tile(np.arange(depth or k), (rows, 1)) if kind == "ranking" else np.zeros(rows, int)
    return brm.Comparisons.from_arrays(
        features,
        candidates=np.arange(rows * k).reshape(rows, k),
        outcome=outcome,
        kind=kind,
        words=rng.integers(10, 300, size=rows * k),
        **columns,
    )


L = brm.likelihoods

#: Every likelihood with a design it fits; RATERS rows have one of eight annotators.
CASES = {
    "bradley_terry": (L.BradleyTerry(temperature=0.7), {}),
    "thurstone": (L.Thurstone(), {}),
    "davidson": (L.Davidson(), {}),
    "rao_kupper": (L.RaoKupper(), {}),
    "plackett_luce": (L.PlackettLuce(), {"kind": "ranking", "k": 4}),
    "plackett_luce_top2": (L.PlackettLuce(), {"kind": "ranking", "k": 4, "depth": 2}),
    "plackett_luce_choice": (L.PlackettLuce(), {"kind": "choice", "k": 3}),
    "ordinal": (L.Ordinal(), {"kind": "rating", "k": 1, "num_levels": 4}),
    "approval": (L.Approval(), {"kind": "approval", "k": 1}),
    "label_noise": (L.LabelNoise(L.BradleyTerry()), {}),
    "rater_reliability": (
        L.RaterReliability(L.LengthBias(L.Davidson())),
        {"rows": 80, "annotator": [f"rater {i % 8}" for i in range(80)]},
    ),
}


@pytest.fixture(params=list(CASES))
def simulated(request):
    """(model, data with simulated feedback) for every likelihood."""
    likelihood, design = CASES[request.param]
    model = brm.RewardModel(brm.rewards.Linear(), likelihood)
    return model, model.simulate(make_data(**design), seed=3).data
