import json

import pytest

pytest.importorskip("transformers")

import bayesrm as brm
from bayesrm.cli import main
from bayesrm.diagnostics.label_audit import audit_labels

from .conftest import BAD, GOOD, write_jsonl

# Responses of GOOD words win, but for row 5.
WRONG = 5
ROWS = [
    {
        "prompt": f"q{i} ?",
        "response_a": GOOD,
        "response_b": f"{BAD} q{i}",
        "winner": "b" if i == WRONG else "a",
        "annotator": f"rater {i % 2}",
    }
    for i in range(12)
]


def fit(folder, encoder, program, *flags):
    data = write_jsonl(folder / "rows.jsonl", ROWS)
    out = str(folder / program)
    arguments = ["fit", program, "laplace_full", data, "-o", out, "--program.encoder", encoder, *flags]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BAYESRM_CACHE", str(folder / "cache"))
        assert main([*arguments, "--engine.prior-precision", "given"]) == 0
    return out, data


@pytest.fixture(scope="session")
def noisy(tmp_path_factory, encoder):
    return fit(tmp_path_factory.mktemp("noisy"), encoder, "label_noise")


@pytest.fixture(scope="session")
def rated(tmp_path_factory, encoder):
    return fit(tmp_path_factory.mktemp("rated"), encoder, "rater_reliability")


@pytest.fixture(scope="session")
def plain(tmp_path_factory, encoder):
    return fit(tmp_path_factory.mktemp("plain"), encoder, "bradley_terry")


def test_ranked_table_and_files(noisy, tmp_path, capsys):
    run, data = noisy
    out, clean = tmp_path / "audit.jsonl", tmp_path / "clean.parquet"
    expected = audit_labels(brm.Posterior.from_pretrained(run), brm.Comparisons.load(data))
    threshold = float(expected.prob_flipped.max())
    arguments = ["audit-labels", run, data, "-o", str(out), "--clean", str(clean), "--threshold", repr(threshold)]
    assert main([*arguments, "--limit", "2"]) == 0
    shown = capsys.readouterr().out
    assert f"{threshold:.3f}  row {WRONG} rater 1: choice on 'q5 ?'" in shown
    assert f"answers that are wrong with a probability of at least {threshold:g}: 1\n" in shown
    assert "answers are expected to be wrong (90%: " in shown
    assert shown.count("  row ") == 2
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["row"] for r in records] == expected.ranked.tolist()
    assert records[0]["prob_flipped"] == pytest.approx(threshold)
    assert records[0]["responses"] == [GOOD, f"{BAD} q5"]
    kept = brm.Comparisons.load(str(clean))
    assert len(kept) == 11
    assert "q5 ?" not in [kept.text(i)[0] for i in range(kept.num_items)]
    assert main(arguments) == 2
    assert "exists; pass --overwrite" in capsys.readouterr().err
    assert main([*arguments, "--overwrite", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["suspicious"], result["fitted"], result["rows"][0]["row"]) == (1, True, WRONG)
    assert result["expected_wrong"] == pytest.approx(expected.expected_wrong)


def test_raters(rated, capsys):
    run, data = rated
    assert main(["audit-labels", run, data]) == 0
    shown = capsys.readouterr().out
    lines = shown[shown.index("raters, the least reliable first:") :].splitlines()
    assert lines[1].startswith("  rater 1: reliability 0.")
    assert "of 6 answers expected to be wrong" in lines[1]


def test_program_without_noise_needs_a_rate(plain, capsys):
    run, data = plain
    assert main(["audit-labels", run, data]) == 2
    assert "give `flip_rate`" in capsys.readouterr().err
    assert main(["audit-labels", run, data, "--flip-rate", "0.1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["rows"][0]["row"] == WRONG
    assert result["rows"][0]["k_hat"] is not None
    assert result["wrong_interval"] is None


def test_other_data_and_bad_arguments(noisy, write, tmp_path, capsys):
    run, _ = noisy
    other = write("other.jsonl", ROWS[:3])
    assert main(["audit-labels", run, other]) == 0
    assert "not the data of the fit" in capsys.readouterr().out
    assert main(["audit-labels", run, other, "--clean", str(tmp_path / "clean.jsonl")]) == 2
    assert "`--clean` is" in capsys.readouterr().err
    assert main(["audit-labels", run, other, "--limit", "-1"]) == 2
    assert "`--limit` is -1" in capsys.readouterr().err
    assert main(["audit-labels", run, other, "--threshold", "7"]) == 2
    assert "`--threshold` is 7.0; a probability" in capsys.readouterr().err
    clean = tmp_path / "clean.parquet"
    assert main(["audit-labels", run, other, "--clean", str(clean), "--threshold", "0"]) == 2
    assert "all 3 answers" in capsys.readouterr().err
    assert not clean.exists()
