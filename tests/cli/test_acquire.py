import dataclasses
import json
from pathlib import Path

import pytest

import bayesrm as brm
from bayesrm.cli import main
from bayesrm.selection import (
    BALD,
    BestOptionUtility,
    DoubleThompson,
    Infomax,
    Pool,
    PredictiveEntropy,
    PromptEntropy,
    Random,
    acquire,
    unlabelled_pairs,
)

RESPONSES = ["clear kind exact", "vague rude wrong", "vague kind", "clear wrong"]
CANDIDATES = [{"prompt": f"q{i} ?", "responses": RESPONSES[: 2 + i % 3]} for i in range(6)]


@pytest.fixture
def pool(write):
    return write("pool.jsonl", CANDIDATES)


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def chosen(capsys, *arguments):
    assert main(["acquire", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)["chosen"]


@pytest.mark.parametrize(
    ("flags", "strategy", "seed"),
    [
        ([], BALD(), 0),
        (["--strategy", "infomax", "--seed", "3"], Infomax(), 3),
        (["--strategy", "predictive_entropy"], PredictiveEntropy(), 0),
        (["--strategy", "best_option_utility", "--num-draws", "50"], BestOptionUtility(), 0),
        (["--strategy", "double_thompson", "--seed", "1"], DoubleThompson(), 1),
        (["--strategy", "random", "--seed", "2"], Random(), 2),
    ],
)
def test_choices_are_those_of_the_library(flags, strategy, seed, run_folder, pool, capsys):
    found = chosen(capsys, run_folder, pool, "-n", "5", *flags)
    posterior = brm.Posterior.from_pretrained(run_folder)
    data = unlabelled_pairs([row["prompt"] for row in CANDIDATES], [row["responses"] for row in CANDIDATES])
    draws = 50 if "--num-draws" in flags else None
    expected = acquire(Pool.of(posterior, data, num_draws=draws, seed=seed), strategy, 5, seed=seed)
    texts = [[data.text(item)[1] for item in data.groups()[0].items[row].tolist()] for row in expected.rows.tolist()]
    assert [[line["response_a"], line["response_b"]] for line in found] == texts
    for line, score in zip(found, expected.scores.tolist(), strict=True):
        assert line["score"] == pytest.approx(score, rel=1e-6) if score == score else line["score"] is None
        source = CANDIDATES[line["row"]]
        assert line["prompt"] == source["prompt"]
        assert [source["responses"][i] for i in line["indices"]] == [line["response_a"], line["response_b"]]
    assert len({(line["row"], *line["indices"]) for line in found}) == 5


def test_the_file_waits_for_one_column(run_folder, pool, tmp_path, capsys):
    output = tmp_path / "ask.jsonl"
    assert main(["acquire", run_folder, pool, "-n", "4", "-o", str(output)]) == 0
    shown = capsys.readouterr().out.splitlines()
    rows = lines(output)
    first = rows[0]
    i, j = first["indices"]
    start = f"row {first['row']}: [{i}] against [{j}], score {first['score']:.4f}  {first['prompt']}"
    assert shown[0] == start
    assert shown[-2:] == ["4 of 20 comparisons chosen by bald", f"written to {output}"]
    labelled = brm.Comparisons.load([row | {"winner": "tie"} for row in rows])
    assert len(labelled) == 4
    assert labelled.kinds == ("choice",)
    assert main(["acquire", run_folder, pool, "-n", "4", "-o", str(output)]) == 2
    assert "exists; pass --overwrite" in capsys.readouterr().err


def test_pairs_that_are_given(run_folder, write, capsys):
    pairs = [(f"q{i} ?", RESPONSES[i % 4], RESPONSES[(i + 1) % 4]) for i in range(6)]
    plain = write("ab.jsonl", [{"prompt": p, "response_a": a, "response_b": b} for p, a, b in pairs])
    judged = write("cr.jsonl", [{"prompt": p, "chosen": a, "rejected": b} for p, a, b in pairs])
    mirrored = write("rc.jsonl", [{"prompt": p, "chosen": b, "rejected": a} for p, a, b in pairs])
    found = [chosen(capsys, run_folder, path, "-n", "3") for path in (plain, judged, mirrored)]
    assert found[0] == found[1]
    assert [line["row"] for line in found[2]] == [line["row"] for line in found[0]]
    for line in found[0]:
        assert (line["prompt"], line["response_a"], line["response_b"]) == pairs[line["row"]]
        assert line["indices"] == [0, 1]


def test_conversations_without_a_prompt_of_their_own(run_folder, write, capsys):
    def conversation(text):
        return [{"role": "user", "content": "q1 ?"}, {"role": "assistant", "content": text}]

    rows = [{"chosen": conversation(RESPONSES[0]), "rejected": conversation(RESPONSES[i])} for i in (1, 2)]
    found = chosen(capsys, run_folder, write("chat.jsonl", rows), "-n", "2")
    assert {line["row"] for line in found} == {0, 1}
    assert found[0]["prompt"] == [{"role": "user", "content": "q1 ?"}]
    assert found[0]["response_a"] == [{"role": "assistant", "content": RESPONSES[0]}]


def test_labelled_comparisons_are_not_chosen_again(run_folder, pool, write, capsys):
    first = chosen(capsys, run_folder, pool, "-n", "12")
    # In either order of the responses.
    done = [
        {"prompt": line["prompt"], "chosen": line[a], "rejected": line[b]}
        for place, line in enumerate(first)
        for a, b in [("response_a", "response_b") if place % 2 else ("response_b", "response_a")]
    ]
    labelled = write("done.jsonl", done)
    rest = chosen(capsys, run_folder, pool, "-n", "8", "--labelled", labelled)
    every = [(line["row"], *line["indices"]) for line in first + rest]
    assert len(every) == len(set(every)) == 20
    assert main(["acquire", run_folder, pool, "-n", "9", "--labelled", labelled]) == 2
    assert "`-n` is 9, and 8 comparisons of" in capsys.readouterr().err


def test_prompt_entropy(run_folder, pool, write, capsys):
    flags = ["--strategy", "prompt_entropy", "--beta", "0.5", "--num-neighbors", "2"]
    done = write("done.jsonl", [{"prompt": "q0 ?", "chosen": "clear", "rejected": "rude"}] * 3)
    found = chosen(capsys, run_folder, pool, "-n", "6", *flags, "--labelled", done)
    posterior = brm.Posterior.from_pretrained(run_folder)
    data = unlabelled_pairs([row["prompt"] for row in CANDIDATES], [row["responses"] for row in CANDIDATES])
    extractor = dataclasses.replace(posterior.program.reward.features, inputs=("prompt",))
    features = extractor.extract([row["prompt"] for row in CANDIDATES], ["clear"] * 6)
    known = Pool.of(posterior, data, prompt_features=features, labelled_features=features[[0, 0, 0]])
    expected = acquire(known, PromptEntropy(beta=0.5, num_neighbors=2), 6)
    assert [line["row"] for line in found] == data.prompt_of_row[expected.rows.numpy()].tolist()
    assert [line["score"] for line in found] == pytest.approx(expected.scores.tolist(), rel=1e-6)


def test_who_will_answer(decided, encoder, pool, tmp_path, capsys):
    run = str(tmp_path / "raters")
    fit = ["fit", "rater_reliability", "laplace_full", decided, "-o", run, "--program.encoder", encoder]
    assert main([*fit, "--engine.prior-precision", "given"]) == 0
    assert main(["acquire", run, pool, "-n", "2"]) == 1
    assert "needs the annotator of every row" in capsys.readouterr().err
    assert len(chosen(capsys, run, pool, "-n", "2", "--annotator", "rater 1")) == 2
    assert main(["acquire", run, pool, "-n", "2", "--annotator", "nobody"]) == 1
    assert "annotator 'nobody'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["-n", "0"], "`-n` is 0, and 20 comparisons of"),
        (["-n", "21"], "`-n` is 21, and 20 comparisons of"),
        (["-n", "1", "--beta", "2"], "`--beta` is 2.0, but the strategy is bald; it is a setting of --strategy prompt"),
        (["-n", "1", "--strategy", "prompt_entropy"], "`num_neighbors` is 13, and the pool has 6 prompts"),
        (["-n", "1", "--num-draws", "1"], "`num_draws` is 1; at least 2 draws are needed"),
    ],
)
def test_settings_that_do_not_fit(flags, reason, run_folder, pool, capsys):
    assert main(["acquire", run_folder, pool, *flags]) == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["run", "pool.jsonl"], ["run", "p.jsonl", "-n", "1", "--strategy", "best"]])
def test_wrong_usage(arguments, capsys):
    assert main(["acquire", *arguments]) == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"prompt": "q ?", "response_a": "clear", "response_b": "clear"},
            "row 1: `response_a` and `response_b` are th",
        ),
        ({"prompt": "q ?", "response_a": "clear", "response_b": ""}, "row 1: `response_b` is empty"),
        ({"prompt": "q ?", "response_a": "clear"}, "row 1: `response_b`"),
    ],
)
def test_bad_row(row, reason, run_folder, write, tmp_path, capsys):
    good = {"prompt": "q1 ?", "response_a": "clear", "response_b": "vague"}
    path = write("p.jsonl", [good, row])
    output = tmp_path / "ask.jsonl"
    assert main(["acquire", run_folder, path, "-n", "1", "-o", str(output)]) == 1
    assert f"{path}, {reason}" in capsys.readouterr().err
    assert not output.exists()
    assert main(["acquire", run_folder, path, "-n", "1", "--on-bad-row", "skip"]) == 0
    assert "1 rows refused; the first is row 1: " in capsys.readouterr().out
    assert main(["acquire", run_folder, write("q.jsonl", [row]), "-n", "1", "--on-bad-row", "skip"]) == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_files_without_comparisons(run_folder, pairs, write, capsys):
    feedback = write("f.jsonl", [{"prompt": "q ?", "responses": ["a", "b"], "choice": 0}])
    assert main(["acquire", run_folder, feedback, "-n", "1"]) == 1
    assert "hold no comparisons; accepted are `prompt` and `responses`" in capsys.readouterr().err
    single = write("s.jsonl", [{"prompt": "q ?", "responses": ["clear"]}])
    assert main(["acquire", run_folder, single, "-n", "1"]) == 1
    assert "no prompt has two candidates" in capsys.readouterr().err
    # Feedback in pairs may be asked again.
    assert main(["acquire", run_folder, pairs, "-n", "1"]) == 0
