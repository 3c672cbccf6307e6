import importlib.metadata
import json
import subprocess
import sys
import time
import types
import warnings

import pytest

from bayesrm.cli import COMMANDS, main


def run_python(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120)


def test_help_loads_no_torch():
    code = (
        "import sys; from bayesrm.cli import main; code = main(['--help']); "
        "heavy = ('torch', 'pyro', 'numpy', 'transformers', 'jsonargparse'); "
        "print([m for m in heavy if m in sys.modules], file=sys.stderr); sys.exit(code)"
    )
    result = run_python("-c", code)
    assert result.returncode == 0
    assert result.stderr.strip() == "[]"
    assert all(f"\n  {name} " in result.stdout for name in COMMANDS)


def test_help_is_fast():
    def once():
        begin = time.perf_counter()
        assert run_python("-m", "bayesrm", "--help").returncode == 0
        return time.perf_counter() - begin

    # The smallest of several: what else runs on the machine only ever adds.
    assert min(once() for _ in range(3)) < 2.0


def test_version_is_that_of_the_distribution():
    result = run_python("-m", "bayesrm", "--version")
    assert (result.returncode, result.stdout) == (0, f"bayesrm {importlib.metadata.version('bayesrm')}\n")


def test_entry_point_is_main():
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="bayesrm")
    assert entry.load() is main


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["--nonsense"],
        ["fit"],
        ["fit", "davidson"],
        ["fit", "davidson", "map", "data.jsonl"],
        ["fit", "davidson", "map", "data.jsonl", "-o", "run", "--nonsense"],
        ["fit", "davidson", "map", "data.jsonl", "-o", "run", "--seed", "-1"],
        ["fit", "davidson", "map", "data.jsonl", "-o", "run", "--program.max_length", "many"],
        ["fit", "davidson", "map", "data.jsonl", "-o", "run", "--program.noise", "1"],
        ["fit", "davidson", "map", "data.jsonl", "-o", "run", "--engine.structure", "full"],
        ["predict", "run"],
        ["select", "run", "data.jsonl", "--rule", "best"],
        ["simulate", "davidson", "data.jsonl"],
    ],
)
def test_wrong_usage_exits_with_2(arguments, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "error: " in captured.err
    assert "Traceback" not in captured.err


def test_missing_arguments_are_named_as_in_the_help(capsys):
    main(["fit", "davidson"])
    assert "ENGINE, DATA" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    assert main([command, "--help"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"usage: bayesrm {command} ")
    assert captured.err == ""


def test_error_is_one_line_without_traceback_in_a_process_of_its_own(tmp_path):
    result = run_python("-m", "bayesrm", "fit", "nonsense", "map", "x.jsonl", "-o", str(tmp_path / "run"), "--json")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: there is no program `nonsense`; it is one of approval, ava, avril, ")
    assert result.stderr.count("\n") == 1


def test_demo_is_called_with_its_settings(monkeypatch, tmp_path, capsys):
    def run(output, json):
        print("the report")
        return 7 if json else 0

    demo = types.ModuleType("bayesrm.cli.demo")
    demo.run = run
    monkeypatch.setitem(sys.modules, "bayesrm.cli.demo", demo)
    assert main(["demo", "--output", str(tmp_path / "r.html")]) == 0
    assert capsys.readouterr().out == "the report\n"
    assert main(["demo", "--json"]) == 7


def test_what_a_program_prints_stays_off_stdout(tmp_path, write, capsys):
    program = tmp_path / "loud.py"
    program.write_text("print('loud import')\ndef build():\n    print('loud build')\n    return 1\n")
    assert main(["fit", str(program), "map", "x.jsonl", "-o", str(tmp_path / "run"), "--json"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "loud import\nloud build\n" in captured.err
    assert "must return a program such as bayesrm.RewardModel" in captured.err


def test_warnings_are_lines_on_stderr(encoder, pairs, tmp_path, capsys):
    arguments = ["fit", "davidson", "map", pairs, "-o", str(tmp_path / "run"), "--program.encoder", encoder, "--json"]
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main([*arguments, "--engine.max-iterations", "1", "--engine.prior_precision", "given"]) == 0
    captured = capsys.readouterr()
    assert "warning: Newton stopped after 1 steps" in captured.err
    assert json.loads(captured.out)["report"]["converged"] is False


def test_bugs_keep_their_traceback(monkeypatch, tmp_path):
    demo = types.ModuleType("bayesrm.cli.demo")
    demo.run = lambda output, json: 1 / 0
    monkeypatch.setitem(sys.modules, "bayesrm.cli.demo", demo)
    with pytest.raises(ZeroDivisionError):
        main(["demo"])
