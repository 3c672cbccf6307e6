"""Engines of other packages: the documented example is installed and run, and what is broken is refused by name."""

import dataclasses
import inspect
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

import bayesrm as brm
from bayesrm import _ready_files
from bayesrm.errors import ArgumentError, EngineError

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(__file__).resolve().parent / "third_party"


@pytest.fixture(scope="session")
def installed(tmp_path_factory):
    """A folder with the example package as its installer leaves it."""
    folder, source = tmp_path_factory.mktemp("installed"), tmp_path_factory.mktemp("source")
    for file in PACKAGE.iterdir():
        if file.is_file():
            (source / file.name).write_bytes(file.read_bytes())
    uv = Path(sys.executable).parent / "uv"
    installer = [str(uv), "pip", "install", "--offline"] if uv.exists() else [sys.executable, "-m", "pip", "install"]
    python = ["--python", sys.executable] if uv.exists() else []
    # The build tool comes from the environment, so that nothing is downloaded.
    command = [*installer, *python, "--no-deps", "--no-build-isolation", "--target", str(folder), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


SCRIPT = """
import json, sys
import numpy as np, torch
import bayesrm as brm

L = brm.likelihoods
rng = np.random.default_rng(0)
design = brm.Comparisons.from_arrays(
    rng.normal(size=(80, 3)), candidates=np.arange(80).reshape(40, 2), outcome=np.zeros(40, int),
    annotator=[f"rater {i % 4}" for i in range(40)],
)
new = [rng.normal(size=(4, 3))]
HeldOut = brm.engines.load("held_out")
state = torch.random.get_rng_state()
precisions = []
for likelihood, engine in (
    (L.BradleyTerry(), "held_out"),
    (L.RaterReliability(L.Davidson()), HeldOut(num_folds=2, factors=(1.0,))),
):
    model = brm.RewardModel(brm.rewards.Linear(), likelihood, brm.priors.Gaussian(100.0))
    data = model.simulate(design, seed=1, parameters={"weight": torch.tensor([3.0, -2.0, 1.0])}).data
    posterior = brm.fit(model, data, inference=engine, seed=2)
    belief = posterior.predict(candidates=new)
    assert torch.linalg.eigvalsh(belief.covariance[0]).min() > -1e-12
    posterior.save_pretrained(sys.argv[1])
    saved = brm.Posterior.from_pretrained(sys.argv[1])
    torch.testing.assert_close(saved.predict(candidates=new).mean, belief.mean)
    assert saved.report.engine["name"] == "HeldOut"
    precisions.append(saved.program.prior.precision)
again = brm.fit(model, data, inference=engine, seed=2).predict(candidates=new)
assert torch.equal(belief.covariance, again.covariance)
assert torch.equal(torch.random.get_rng_state(), state)
engines = [[e.name, e.target, e.distribution] for e in brm.engines.available()]
print(json.dumps({"engines": engines, "precisions": precisions}))

from bayesrm.cli import main
sys.exit(main(sys.argv[2:]))
"""


def test_the_installed_example_fits_by_name_and_from_the_command_line(installed, tmp_path):
    rows = [
        {
            "prompt": f"q{i}",
            "response_a": "word " * (1 + i % 5),
            "response_b": "word " * (7 + i % 3),
            "winner": "ab"[i % 2],
        }
        for i in range(12)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["fit", "bradley_terry", "held_out", str(tmp_path / "pairs.jsonl"), "-o", str(tmp_path / "cli"), "--json"]
    command += ["--program.encoder", "any/model", "--program.inputs", "length"]
    command += ["--engine.num-folds", "3", "--engine.factors", "0.5,2"]
    environment = os.environ | {"PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, str(tmp_path / "run"), *command],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    found, record = (json.loads(line) for line in done.stdout.splitlines())
    assert ["held_out", "bayesrm_held_out:HeldOut", "bayesrm-held-out"] in found["engines"]
    assert ["laplace", "bayesrm.engines:Laplace", "bayesrm"] in found["engines"]
    # Weights of size 3 under a declared deviation of 0.1: held-out prompts call for a much wider prior.
    assert found["precisions"][0] <= 10.0
    assert found["precisions"][1] == 100.0
    assert record["engine"] == "held_out"
    assert record["report"]["engine"]["settings"] == {"num_folds": 3, "factors": [0.5, 2.0]}
    assert record["report"]["prior_precision"] in (0.5, 2.0)


def test_the_page_shows_the_files_that_are_installed():
    page = (ROOT / "docs" / "third_party_engines.md").read_text()
    blocks = re.findall(r"```(python|toml)\n(.*?)```", page, re.DOTALL)
    assert ("python", (PACKAGE / "bayesrm_held_out.py").read_text()) in blocks
    assert ("toml", (PACKAGE / "pyproject.toml").read_text()) in blocks


@pytest.fixture
def register(tmp_path, monkeypatch):
    """Puts a distribution with an engine on the path, as an installer would: its module and its metadata."""

    def add(distribution, name, code, attribute="Mine"):
        folder = tmp_path / distribution
        module = distribution.replace("-", "_")
        metadata = folder / f"{module}-1.0.dist-info"
        metadata.mkdir(parents=True)
        (folder / f"{module}.py").write_text(textwrap.dedent(code))
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text(f"[bayesrm.engines]\n{name} = {module}:{attribute}\n")
        monkeypatch.syspath_prepend(folder)
        monkeypatch.delitem(sys.modules, module, raising=False)

    return add


GOOD = """
    import dataclasses, enum
    from pathlib import Path
    import bayesrm as brm

    class Colour(enum.StrEnum):
        RED = "red"

    @dataclasses.dataclass(frozen=True)
    class Mine:
        '''Maximum a posteriori with settings of every kind.

        Attributes:
            steps: How many.
            tolerance: How close.
        '''
        steps: int = 3
        tolerance: float | None = None
        colours: tuple[Colour, ...] = (Colour.RED,)
        folder: Path | None = None
        inner: brm.Laplace = dataclasses.field(default_factory=brm.Laplace)

        def fit(self, program, data, *, seed, progress):
            return brm.MAP(max_iterations=self.steps).fit(program, data, seed=seed, progress=progress)
"""


def make_data():
    features = np.random.default_rng(0).normal(size=(12, 2))
    return brm.Comparisons.from_arrays(features, candidates=np.arange(12).reshape(6, 2), outcome=[0, 1, 0, 0, 1, 0])


MODEL = brm.RewardModel(brm.rewards.Linear(), brm.likelihoods.BradleyTerry())


def test_every_engine_of_the_package_has_a_name():
    built_in = {e.name: e.load() for e in brm.engines.available() if e.distribution == "bayesrm"}
    classes = [getattr(brm.engines, name) for name in brm.engines.__all__]
    assert set(built_in.values()) == {c for c in classes if dataclasses.is_dataclass(c) and hasattr(c, "fit")}
    assert built_in["laplace"] is brm.Laplace
    assert built_in["map"] is brm.MAP
    assert brm.fit(MODEL, make_data(), inference="map").report.engine["name"] == "MAP"


def test_a_registered_name_makes_the_engine(register):
    register("good-engine", "mine", GOOD)
    cls = brm.engines.load("mine")
    assert cls.__module__ == "good_engine"
    assert brm.fit(MODEL, make_data(), inference="mine").report.engine["settings"]["max_iterations"] == 3
    assert "mine" in _ready_files.registered()


def test_fields_of_plain_types_become_arguments(register):
    register("good-engine", "mine", GOOD)
    build = _ready_files.load_build("inference", "mine")
    assert list(inspect.signature(build).parameters) == ["steps", "tolerance", "colours", "folder"]
    assert "Args:\n    steps: How many." in inspect.getdoc(build)
    assert build(steps=7).steps == 7
    assert build().inner == brm.Laplace()


def test_unknown_names_list_the_known(register):
    register("good-engine", "mine", GOOD)
    with pytest.raises(ArgumentError, match=r"no engine `magic`; it is one of .*laplace, map, mine.*, or install"):
        brm.fit(MODEL, make_data(), inference="magic")
    with pytest.raises(
        ArgumentError, match=r"no engine `magic`; it is one of .*laplace_diag, .*, map, .*mine, or a path"
    ):
        _ready_files.load_build("inference", "magic")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import absent_module", r"cannot be imported: ModuleNotFoundError: No module named 'absent_module'"),
        ("1 / 0", r"cannot be imported: ZeroDivisionError: division by zero"),
        ("def f(:", r"cannot be imported: SyntaxError"),
        ("", r"cannot be imported: AttributeError: .* no attribute 'Mine'"),
        ("class Mine:\n    def fit(self): ...", r"is no dataclass with a method `fit"),
        ("import dataclasses\n@dataclasses.dataclass\nclass Mine: ...", r"is no dataclass with a method `fit"),
        ("Mine = 3", r"is no dataclass with a method `fit"),
    ],
)
def test_a_broken_engine_names_its_distribution_and_disturbs_no_other(register, code, message):
    register("broken-engine", "broken", code)
    assert "broken" in [e.name for e in brm.engines.available()]
    assert brm.fit(MODEL, make_data(), inference="map").report.converged
    with pytest.raises(EngineError, match=r"engine `broken` of the distribution broken-engine .*" + message):
        brm.fit(MODEL, make_data(), inference="broken")


def test_one_name_of_two_distributions_is_refused(register):
    register("engine-a", "same", GOOD)
    register("engine-b", "same", GOOD)
    with pytest.raises(
        EngineError, match=r"engine_a:Mine of the distribution engine-a and engine_b:Mine of the distribution engine-b"
    ):
        brm.engines.load("same")
    register("engine-c", "laplace", GOOD)
    with pytest.raises(EngineError, match=r"bayesrm.engines:Laplace of the distribution bayesrm and engine_c:Mine"):
        brm.fit(MODEL, make_data(), inference="laplace")
    register("engine-d", "laplace_full", GOOD)
    with pytest.raises(EngineError, match=r"`laplace_full` is that of .*laplace_full\.py and of a registered engine"):
        _ready_files.load_build("inference", "laplace_full")


def test_an_engine_without_defaults_is_made_by_its_class(register):
    register("strict-engine", "strict", GOOD.replace("steps: int = 3", "steps: int"))
    with pytest.raises(ArgumentError, match=r"no default for steps; make it by bayesrm.engines.load\('strict'\)"):
        brm.fit(MODEL, make_data(), inference="strict")
