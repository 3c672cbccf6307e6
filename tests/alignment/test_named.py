"""Ready methods by name."""

import pytest

from bayesrm.alignment import Method, available_methods, load_method, targets
from bayesrm.errors import ArgumentError


def test_every_ready_method_can_be_made():
    names = available_methods()
    assert {"brain", "bond", "j_bond", "nash_md", "mtpo"} <= set(names)
    assert all(isinstance(load_method(name), Method) for name in names)
    assert load_method("bond", n=6).target == targets.BestOfN(6)


def test_a_file_of_ones_own(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "import bayesrm as brm\ndef build(*, n: int = 3):\n    return brm.alignment.load_method('bond', n=n)\n"
    )
    assert load_method(str(path), n=5).target == targets.BestOfN(5)
    path.write_text("def build():\n    return 3\n")
    with pytest.raises(ArgumentError, match="returned int"):
        load_method(str(path))


def test_what_is_not_there_is_named():
    with pytest.raises(ArgumentError, match="brain"):
        load_method("no_such_method")
    with pytest.raises(ArgumentError, match="'gamma'"):
        load_method("brain", gamma=1.0)
