"""Do fits on adapter weights need what docs/scale.md says, and what `fit` itself announces?

Tiny decoders (Llama's architecture, random weights and adapters) and synthetic comparisons, every sequence of the same
length, no training: what is counted is the work of the posterior alone. Each fit runs in a process of its own, whose
peak resident memory is set against that of the same process after a fit on 8 pairs. Counted or measured:

- bytes of the derivatives' file, planned coordinates, and sequences that go through the network: exact;
- peak memory over the plan's estimate, with what the structure check may take: in a range;
- CPU time of a pass as the items become four times as many;
- CPU time of a pass over that of the plain forward pass.

Usage: python benchmarks/scale_lora.py [--json FILE] [--quick]
"""

import dataclasses
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import Claim, main

import bayesrm as brm
from bayesrm.diagnostics import Estimate
from bayesrm.engines._derivatives import Derivatives
from bayesrm.engines._work import WorkPlan, plan_work
from bayesrm.rewards import LoRA, LoRANetwork

GIB = 2**30
WORDS = [f"w{i}" for i in range(40)]
#: Words of a prompt and of a response.
LENGTHS = (3, 8)
#: Most comparisons that the check of an approximate structure looks at, see bayesrm/engines/_structure_check.py.
CHECKED = 1024
#: Room in plans for buffers of a fixed size, see bayesrm/engines/_work.py.
BUFFERS_GIB = 0.25


@dataclasses.dataclass(frozen=True)
class Setting:
    """One fit.

    Attributes:
        structure: Structure of the posterior.
        pairs: Comparisons N, each of two responses of its own, so that M = 2 N.
        width: Hidden size of the decoder.
        layers: Its layers.
        rank: Rank of the adapters on query and value projections.
        sketch_rank: Directions on each side for `sketch`.
        stored: Where the derivatives must go: `"memory"`, `"disk"` or `"nowhere"`.
    """

    structure: str
    pairs: int
    width: int = 128
    layers: int = 4
    rank: int = 8
    sketch_rank: int = 16
    stored: str = "memory"

    @property
    def name(self) -> str:
        """The setting in words."""
        sketch = f" {self.sketch_rank}" if self.structure == "sketch" else ""
        return f"{self.structure}{sketch}, N {self.pairs:,}, width {self.width}, rank {self.rank}, {self.stored}"

    @property
    def num_parameters(self) -> int:
        """P by the formula of docs/scale.md: A and B of two square matrices a layer, and the head."""
        return self.width if self.structure == "last_layer" else 4 * self.layers * self.rank * self.width + self.width

    @property
    def num_coordinates(self) -> int:
        """R by the formula of docs/scale.md."""
        if self.structure == "sketch":
            s, r, w = self.sketch_rank, self.rank, self.width
            return 4 * self.layers * min(s, r) * min(s, w) + min(s * s, w)
        return self.num_parameters if self.structure == "last_layer" else min(self.pairs, self.num_parameters)

    def num_sequences(self, memory_gib: float) -> int:
        """Sequences through the network: passes, and the items of the check where derivatives are not kept."""
        if self.stored != "nowhere":
            return 2 * self.pairs
        if self.structure != "sketch":
            return 2 * self.pairs
        return 4 * self.pairs + 2 * self.num_checked(memory_gib)

    def num_checked(self, memory_gib: float) -> int:
        """Comparisons that the check of an approximate structure looks at."""
        if self.structure not in ("sketch", "kron", "diag"):
            return 0
        # Three copies in float64 of the derivatives of a comparison's two items.
        affordable = max(8, int(memory_gib * GIB / (3 * 8 * 2 * self.num_parameters)))
        return min(self.pairs, affordable, CHECKED)

    def check_gib(self, memory_gib: float) -> float:
        """Memory of the check, by the formula of docs/scale.md; the plan does not count it."""
        return 3 * 8 * 2 * self.num_checked(memory_gib) * self.num_parameters / GIB


SETTINGS = (
    Setting("full", 1000),
    Setting("full", 1500, rank=4),
    Setting("full", 1500, stored="disk"),
    Setting("full", 3000, width=64, layers=2, rank=4),
    Setting("sketch", 2000, stored="nowhere"),
    Setting("sketch", 2000, sketch_rank=8, stored="nowhere"),
    Setting("last_layer", 3000, stored="nowhere"),
    Setting("kron", 700),
    Setting("diag", 700),
)
QUICK = (
    Setting("full", 100, width=32, layers=2, stored="disk"),
    Setting("sketch", 100, width=32, layers=2, sketch_rank=4, stored="nowhere"),
    Setting("last_layer", 100, width=32, layers=2),
    Setting("kron", 100, width=32, layers=2),
)


def decoder(folder: Path, width: int, layers: int) -> str:
    """Saves a decoder with random weights and a tokenizer of whole words; returns its folder."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {token: i for i, token in enumerate(["<pad>", "<unk>", "<eos>", "\n\n", *WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n\n", "isolated"), pre_tokenizers.Split(" ", "removed")]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>"
    )
    tokenizer.save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=width, num_hidden_layers=layers, num_attention_heads=4,
        intermediate_size=2 * width, max_position_embeddings=32, initializer_range=0.1, bos_token_id=None,
        eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.utils.logging.disable_progress_bar()
    transformers.LlamaModel(config).save_pretrained(folder)
    return str(folder)


def trained(lora: LoRA, folder: Path) -> LoRA:
    """Settings that start from random adapters and a random head: at the usual start adapters have no derivative."""
    network = lora.load(0)
    drawn = torch.randn(network.num_parameters, generator=torch.Generator().manual_seed(0))
    network.set_theta(network.theta() + 0.1 * drawn)
    network.save_adapter(folder)
    return dataclasses.replace(lora, adapter=str(folder))


def comparisons(pairs: int) -> brm.Comparisons:
    """Pairs under distinct prompts, all items different, every sequence of the same length."""
    rng = np.random.default_rng(0)

    def words(number: int, length: int) -> str:
        digits = [WORDS[(number // len(WORDS) ** place) % len(WORDS)] for place in range(3)]
        return " ".join([*digits, *rng.choice(WORDS, size=length)][:length])

    prompts = [words(i, LENGTHS[0]) for i in range(pairs)]
    first, second = ([words(2 * i + side, LENGTHS[1]) for i in range(pairs)] for side in (0, 1))
    return brm.Comparisons.from_pairs(prompts, first, second)


def planned(setting: Setting, network: LoRANetwork, memory_gib: float) -> WorkPlan:
    """What `fit` announces for the setting."""
    sites = network.last_layer_sites if setting.structure == "last_layer" else tuple(network.sites)
    shapes = {site: tuple(network.sites[site].shape) for site in sites}
    return plan_work(
        setting.structure, shapes, items=2 * setting.pairs, contrasts=setting.pairs, memory_gib=memory_gib,
        disk_gib=1e9, sketch_rank=setting.sketch_rank,
    )  # fmt: skip


def measure(setting: Setting) -> dict[str, Any]:
    """Runs one fit, in this process, and counts."""
    counted = 0

    def count(module: torch.nn.Module, arguments: Any, output: Any) -> None:
        nonlocal counted
        if isinstance(module, LoRANetwork):
            counted += len(output)

    with tempfile.TemporaryDirectory() as place:
        model = decoder(Path(place) / "model", setting.width, setting.layers)
        lora = LoRA(model, rank=setting.rank, target_modules=("q_proj", "v_proj"), max_length=32, device="cpu")
        lora = trained(lora, Path(place) / "adapter")
        network = lora.load(0)
        roomy = planned(setting, network, 1e9)
        # Room for the algebra, and not for the derivatives as well.
        need = roomy.memory_gib - 2 * setting.pairs * roomy.parameters * 4 / GIB
        memory = 64.0 if setting.stored == "memory" else need * 1.0001
        plan = planned(setting, network, memory)
        del network
        program = brm.RewardModel(lora, brm.likelihoods.BradleyTerry(), brm.priors.Gaussian(1.0))

        def place_of(name: str) -> str:
            return str(Path(place) / name)

        def fit(pairs: int, name: str, memory_gib: float) -> Any:
            inference = brm.Laplace(
                structure=setting.structure, sketch_rank=setting.sketch_rank, memory_gib=memory_gib, disk_gib=1e9,
                # With a folder, derivatives go to a file whatever the plan says.
                training=brm.Training(epochs=0.0, output_dir=place_of(name) if setting.stored == "disk" else None),
            )  # fmt: skip
            return brm.fit(program, comparisons(pairs), inference=inference, seed=0)

        fit(8, "warm", 64.0)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        hook = torch.nn.modules.module.register_module_forward_hook(count)
        posterior = fit(setting.pairs, "run", memory)
        hook.remove()
        peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        file = Path(place_of("run")) / "derivatives.bin"
        return {
            "sequences": counted,
            "memory_gib": memory,
            "peak_gib": peak / GIB,
            "plan": dataclasses.asdict(plan),
            "file_bytes": file.stat().st_size if file.exists() else 0,
            "num_parameters": posterior.report.num_parameters,
            "num_coordinates": posterior.report.num_coordinates,
            "structure_check": posterior.report.structure_check,
        }


def in_child(setting: Setting) -> dict[str, Any]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--child", json.dumps(dataclasses.asdict(setting))]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def times(quick: bool) -> tuple[dict[str, float], dict[str, Any]]:
    """CPU time of passes: four times the items, and a pass over a forward pass; medians of interleaved runs."""
    small, repeats = (60, 1) if quick else (400, 3)
    seconds: dict[str, list[float]] = {"forward": [], "pass": [], "pass, 4 M": []}
    with tempfile.TemporaryDirectory() as place:
        lora = LoRA(decoder(Path(place), 128, 4), rank=8, target_modules=("q_proj", "v_proj"), max_length=32)
        network = lora.load(0)
        for repeat in range(repeats + 1):
            for name, pairs in (("forward", small), ("pass", small), ("pass, 4 M", 4 * small)):
                data = comparisons(pairs)
                sequences = network.tokenize_items(data)
                prompt = torch.as_tensor(np.asarray(data.prompt_of_item))
                begin = time.process_time()
                if name == "forward":
                    with torch.inference_mode():
                        for start in range(0, len(sequences), 16):
                            network(**network.collate(sequences[start : start + 16]))
                else:
                    Derivatives(network, list(network.sites), sequences, prompt, batch_size=16)
                # The first round warms up.
                if repeat:
                    seconds[name].append(time.process_time() - begin)
    median = {name: float(np.median(values)) for name, values in seconds.items()}
    found = {
        "CPU time of a pass, 4 M over M": median["pass, 4 M"] / median["pass"],
        "CPU time of a pass over the plain forward pass": median["pass"] / median["forward"],
    }
    return found, {"seconds": seconds}


def exactly(name: str, found: float, expected: float) -> Claim:
    """A claim that two counts agree: their ratio is one."""
    ratio = found / expected
    return Claim(f"{name}, over the formula's", Estimate(ratio, ratio, ratio, 1.0), 1.0, 1.0)


def run(quick: bool) -> tuple[list[Claim], dict[str, Any]]:
    claims, details = [], []
    for setting in QUICK if quick else SETTINGS:
        print(setting.name, file=sys.stderr)
        found = in_child(setting)
        plan = found["plan"]
        details.append({"setting": dataclasses.asdict(setting)} | found)
        claims.append(exactly(f"{setting.name}: weights P", plan["parameters"], setting.num_parameters))
        claims.append(exactly(f"{setting.name}: R of the plan", plan["coordinates"], setting.num_coordinates))
        # A posterior works in the row space where comparisons are fewer, and leaves out nearly dependent derivatives.
        share = found["num_coordinates"] / min(setting.num_coordinates, setting.pairs)
        claims.append(Claim(f"{setting.name}: R of the posterior", Estimate(share, share, share, 1.0), 0.95, 1.0))
        claims.append(
            exactly(f"{setting.name}: sequences", found["sequences"], setting.num_sequences(found["memory_gib"]))
        )
        if setting.stored == "disk":
            size = 4 * 2 * setting.pairs * setting.num_parameters
            claims.append(exactly(f"{setting.name}: bytes on disk", found["file_bytes"], size))
            claims.append(exactly(f"{setting.name}: GiB on disk in the plan", plan["disk_gib"], size / GIB))
        # Resident pages of the mapped file count, though the system may drop them at any time.
        expected = plan["memory_gib"] + plan["disk_gib"] + setting.check_gib(found["memory_gib"])
        share = found["peak_gib"] / expected
        # A part of the plan is room for buffers of a fixed size, which runs this small do not fill.
        low = 0.3 if expected > 2 * BUFFERS_GIB else None
        high = 1.3 if expected > 0.2 else None
        name = f"{setting.name}: peak memory over the expected {expected:.2f} GiB"
        claims.append(Claim(name, Estimate(share, share, share, 1.0), low, high))
        details[-1] |= {"expected_gib": expected}
    ratios, seconds = times(quick)
    bounds = {"CPU time of a pass, 4 M over M": (3.2, 4.8)}
    for name, value in ratios.items():
        low, high = bounds.get(name, (None, 4.0))
        claims.append(Claim(name, Estimate(value, value, value, 1.0), low, high))
    return claims, {"fits": details} | seconds


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(measure(Setting(**json.loads(sys.argv[2])))))
        sys.exit(0)
    sys.exit(main(__doc__.splitlines()[0], run))
