"""What `import bayesrm` costs and what it leaves alone, in fresh interpreters."""

import subprocess
import sys

HEAVY = ("transformers", "peft", "accelerate", "laplace", "curvlinops", "torchvision")
HEAVY += ("numpyro", "jax", "datasets", "arviz", "matplotlib")
EVERY_NAME = "import bayesrm\nfor name in bayesrm.__all__:\n    getattr(bayesrm, name)"


def run(code):
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_optional_and_heavy_packages_stay_out():
    found = run(f"{EVERY_NAME}\nimport sys\nprint([name for name in {HEAVY} if name in sys.modules])")
    assert found.strip() == "[]"


def test_the_check_of_loaded_packages_can_fail():
    assert run("import jax, sys\nprint('jax' in sys.modules)").strip() == "True"


def test_import_costs_little_beyond_torch_and_pyro():
    # Processor time, which other work on the machine does not count towards, and the least of three interleaved runs.
    clock = "import time; start = time.process_time()\n{}\nprint(time.process_time() - start)"
    base, ours = [], []
    for _ in range(3):
        base.append(float(run(clock.format("import torch, pyro"))))
        ours.append(float(run(clock.format("import bayesrm"))))
    assert min(ours) - min(base) <= 0.5
