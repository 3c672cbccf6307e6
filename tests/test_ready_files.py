"""The ready programs and engine settings: short, documented, the library's defaults, and packed into the wheel."""

import ast
import inspect
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import bayesrm as brm
from bayesrm import _ready_files
from bayesrm.errors import ArgumentError

ROOT = Path(__file__).resolve().parent.parent
FILES = [(kind, name) for kind in ("models", "inference") for name in _ready_files.names(kind)]
LIKELIHOODS = {
    "approval": brm.likelihoods.Approval(),
    "bradley_terry": brm.likelihoods.BradleyTerry(),
    "davidson": brm.likelihoods.Davidson(),
    "label_noise": brm.likelihoods.LabelNoise(brm.likelihoods.BradleyTerry()),
    "length_bias": brm.likelihoods.LengthBias(brm.likelihoods.BradleyTerry()),
    "plackett_luce": brm.likelihoods.PlackettLuce(),
    "rao_kupper": brm.likelihoods.RaoKupper(),
    "rater_reliability": brm.likelihoods.RaterReliability(brm.likelihoods.BradleyTerry()),
    "ratings": brm.likelihoods.Ordinal(),
    "thurstone": brm.likelihoods.Thurstone(),
}


def test_names():
    others = ["ava", "avril", "gaussian_process", "language_feedback", "lora_bradley_terry"]
    assert _ready_files.names("models") == sorted([*LIKELIHOODS, *others])
    structures = ["laplace_diag", "laplace_full", "laplace_kron", "laplace_last_layer", "laplace_sketch"]
    assert _ready_files.names("inference") == sorted(
        ["ava", "avril", "corrected_laplace", "ensemble", *structures, "map", "nuts", "svi"]
    )


@pytest.mark.parametrize("name", sorted(LIKELIHOODS))
def test_program_declares_the_likelihood_with_its_defaults(name):
    model = _ready_files.load_build("models", name)()
    assert model == brm.RewardModel(brm.rewards.Linear(), LIKELIHOODS[name], brm.priors.Gaussian(1.0))


def test_adapters_have_the_settings_of_the_paper_and_every_program_takes_them():
    model = _ready_files.load_build("models", "lora_bradley_terry")(encoder="any/model")
    assert model.reward == brm.rewards.LoRA("any/model", rank=8, alpha=16.0, dropout=0.1)
    for name, likelihood in LIKELIHOODS.items():
        model = _ready_files.load_build("models", name)(encoder="any/model", lora_rank=4, lora_targets=["q", "v"])
        assert model.likelihood == likelihood
        assert model.reward == brm.rewards.LoRA("any/model", rank=4, target_modules=("q", "v"))


def test_adapters_need_an_encoder_and_no_settings_of_features():
    with pytest.raises(ArgumentError, match="`lora_rank` needs an `encoder`"):
        brm.rewards.text_head(lora_rank=4)
    with pytest.raises(ArgumentError, match="`hidden` is a setting of frozen features"):
        brm.rewards.text_head(encoder="any/model", lora_rank=4, hidden=(8,))


def test_gaussian_process_has_its_defaults_and_no_settings_of_other_heads():
    build = _ready_files.load_build("models", "gaussian_process")
    assert build() == brm.RewardModel(brm.rewards.GaussianProcess(), brm.likelihoods.BradleyTerry())
    expected = brm.rewards.GaussianProcess(kernel="matern52", lengthscale=2.0)
    assert build(kernel="matern52", lengthscale=2.0).reward == expected
    for wrong in ({"hidden": (3,)}, {"encoder": "any/model", "lora_rank": 4}):
        with pytest.raises(ArgumentError, match="settings of other rewards"):
            build(**wrong)


@pytest.mark.parametrize("name", ["label_noise", "length_bias", "rater_reliability"])
def test_ties_are_optional(name):
    assert _ready_files.load_build("models", name)(ties=True).likelihood.base == brm.likelihoods.Davidson()


@pytest.mark.parametrize(
    ("name", "engine"),
    [
        ("laplace_full", brm.Laplace(prior_precision="marginal_likelihood")),
        *(
            (f"laplace_{structure}", brm.Laplace(structure=structure, prior_precision="marginal_likelihood"))
            for structure in ("diag", "kron", "last_layer", "sketch")
        ),
        ("map", brm.MAP(prior_precision="marginal_likelihood")),
        ("corrected_laplace", brm.ImportanceSampling(brm.Laplace(prior_precision="marginal_likelihood"))),
        ("ensemble", brm.Ensemble()),
        ("nuts", brm.NUTS()),
        ("svi", brm.SVI()),
    ],
)
def test_engine_has_its_defaults(name, engine):
    assert _ready_files.load_build("inference", name)() == engine


@pytest.mark.parametrize(("kind", "name"), FILES)
def test_file_is_short_cited_and_documented(kind, name):
    path = _ready_files.locate(kind, name)
    text = path.read_text()
    assert len(text.splitlines()) <= 40
    # A source: a year of print, or an arXiv number.
    assert re.search(r"\b(19|20)\d\d\b|\b\d{4}\.\d{5}\b", ast.get_docstring(ast.parse(text)))
    build = _ready_files.load_build(kind, name)
    documentation = inspect.getdoc(build)
    for argument in inspect.signature(build).parameters.values():
        assert argument.annotation is not argument.empty
        assert f"\n    {argument.name}: " in documentation
        assert argument.default is not argument.empty or argument.kind is argument.VAR_KEYWORD
    assert inspect.signature(build).return_annotation is not inspect.Signature.empty


def test_unknown_name_lists_the_known():
    with pytest.raises(
        ArgumentError, match=r"no engine `magic`; it is one of .*laplace_diag, laplace_full, .*, map, .*or"
    ):
        _ready_files.locate("inference", "magic")
    with pytest.raises(ArgumentError, match=r"no program file absent\.py"):
        _ready_files.locate("models", "absent.py")


def test_packed_files_come_first(tmp_path, monkeypatch):
    packed = tmp_path / "bayesrm" / "_shipped" / "models"
    packed.mkdir(parents=True)
    (packed / "only.py").write_text("def build():\n    return 1\n")
    (tmp_path / "models").mkdir()
    (tmp_path / "inference").mkdir()
    (tmp_path / "inference" / "root.py").touch()
    monkeypatch.setattr(_ready_files, "_PACKAGE", tmp_path / "bayesrm")
    assert _ready_files.names("models") == ["only"]
    assert _ready_files.names("inference") == ["root"]
    (tmp_path / "inference" / "root.py").unlink()
    (tmp_path / "inference").rmdir()
    with pytest.raises(ArgumentError, match="no folder `inference`"):
        _ready_files.names("inference")


def test_text_head_makes_both_heads():
    head = brm.rewards.text_head(encoder="org/model", inputs=("joint",), pooling="last", max_length=7, standardize=True)
    extractor = brm.rewards.FeatureExtractor(
        "org/model", inputs=("joint",), pooling="last", max_length=7, normalize=True
    )
    assert head == brm.rewards.Linear(extractor, standardize=True)
    assert brm.rewards.text_head(hidden=[3, 2], activation="relu") == brm.rewards.MLP(hidden=(3, 2), activation="relu")


def test_wheel_packs_the_files(tmp_path):
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    # A folder inside another is packed with it.
    assert settings["force-include"] == {k: f"bayesrm/_shipped/{k}" for k in _ready_files.KINDS if "/" not in k}
    uv = Path(sys.executable).parent / "uv"
    if not uv.exists():
        pytest.skip("uv, which builds the wheel, is not installed")
    command = [
        str(uv),
        "build",
        "--wheel",
        "--offline",
        "--python",
        sys.executable,
        "--out-dir",
        str(tmp_path),
        str(ROOT),
    ]
    built = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if built.returncode and ("Failed to resolve requirements from `build-system.requires`" in built.stderr):
        pytest.skip("hatchling is not in uv's cache, and the build is offline")
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    packed = zipfile.ZipFile(wheel).namelist()
    for kind, name in FILES:
        assert f"bayesrm/_shipped/{kind}/{name}.py" in packed
    assert "bayesrm/cli/fit.py" in packed
    assert "bayesrm/py.typed" in packed
    assert not [name for name in packed if name.startswith(("models/", "inference/", "tests/"))]
