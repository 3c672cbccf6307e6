"""Collects the Python blocks of the README and the docs as tests; shapes and types are checked at run time."""

import os
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from jaxtyping import install_import_hook

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    # torch announces the retirement of its own JIT when pyro and torchvision import it.
    import pyro  # noqa: F401

hook = install_import_hook("bayesrm", "beartype.beartype")

from sybil import Sybil  # noqa: E402  (the hook must be installed first)
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser  # noqa: E402  (the hook must be installed first)

pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), SkipParser()], patterns=["README.md", "docs/*.md", "CONTRIBUTING.md"]
).pytest()
