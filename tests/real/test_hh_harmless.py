import math

import numpy as np
import pytest

import bayesrm as brm

pytestmark = pytest.mark.slow

FILE = "hh_harmless_pairs.parquet"
# Read with pyarrow alone: the rows whose chosen reply, `row["chosen"][-1]["content"]`, is blank; no rejected one is.
EMPTY = (662, 1001, 1614, 1984)


def test_rows_without_a_reply_are_refused_by_index_and_reason(real_file):
    data = brm.Comparisons.load(real_file(FILE), on_bad_row="skip")
    assert tuple(row for row, _ in data.refused) == EMPTY
    assert all("`chosen` is empty" in reason for _, reason in data.refused)
    assert len(data) == 2007 - len(EMPTY)
    assert "refused: 4" in data.summary()


def test_the_first_such_row_stops_a_strict_load(real_file):
    with pytest.raises(brm.errors.DataError, match=rf"{FILE}, row {EMPTY[0]}: `chosen` is empty"):
        brm.Comparisons.load(real_file(FILE))


def test_fit_from_texts_to_beliefs(real_file, minilm):
    data = brm.Comparisons.load(real_file(FILE), on_bad_row="skip")
    rows = np.sort(np.random.default_rng(0).choice(len(data), size=240, replace=False))
    train, test = data.select(rows).split_by_prompt(1 / 6, seed=0)
    extractor = brm.rewards.FeatureExtractor(minilm, inputs=("response", "length"), normalize=True, max_length=64)
    model = brm.RewardModel(brm.rewards.Linear(features=extractor), brm.likelihoods.BradleyTerry())
    posterior = brm.fit(model, train, inference=brm.Laplace(prior_precision="marginal_likelihood"))
    report = posterior.report
    assert report.converged
    assert report.gradient_norm <= 1e-6  # the engine's default tolerance
    assert math.isfinite(report.log_evidence)
    prediction = posterior.predict_feedback(test)
    assert prediction.log_prob.isfinite().all()
    # The mode maximises log likelihood + log prior and the prior peaks at zero rewards, where each row has log 2.
    assert posterior.plug_in().predict_feedback(train).nll < math.log(2)
    # Data only shrink the prior's spread: no reward may be more uncertain than the prior makes it.
    belief = posterior.predict_items(test)
    prior_std = np.linalg.norm(extractor.extract_items(test), axis=1) * report.prior_precision**-0.5
    assert (belief.std[belief.mask].numpy() > 0).all()
    assert belief.std[belief.mask].max() <= prior_std.max() * (1 + 1e-6)
