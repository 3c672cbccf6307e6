"""`bayesrm propose`: responses drawn from a policy, with their log-probabilities."""

from collections.abc import Sequence
from typing import Any

import torch
from jsonargparse import Namespace

from . import _files, _parser
from ._console import Console, dump
from ._policy import add_policy, load_policy, read_prompts


def parse(arguments: Sequence[str]) -> Namespace:
    """The settings of the command."""
    parser = _parser.make_parser("propose", "Draws responses from a policy and writes them with log-probabilities.")
    add_policy(parser, trainable=False)
    parser.add_argument("prompts", metavar="PROMPTS", help="file with the column `prompt`")
    parser.add_argument("--num-candidates", type=int, default=8, help="responses to each prompt")
    parser.add_argument("--temperature", type=float, default=1.0, help="logits are divided by it")
    parser.add_argument("--batch-size", type=int, default=32, help="responses drawn side by side")
    parser.add_argument("--seed", type=_parser.Seed, default=0, help="seed of the draws")
    parser.add_argument("--on-bad-row", choices=("raise", "skip"), default="raise", help="what to do with a bad row")
    parser.add_argument("-o", "--output", metavar="FILE.jsonl", required=True, help="file for the responses")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there already")
    return _parser.parse(parser, arguments)


def run(settings: Namespace, console: Console) -> None:
    """Draws and writes; one line a prompt, in the form that `select` and `align --given` read."""
    target = _files.check_output_file(settings.output, ".jsonl", overwrite=settings.overwrite)
    prompts, refused = read_prompts(settings.prompts, on_bad_row=settings.on_bad_row)
    policy = load_policy(settings)
    drawn = policy.generate(
        prompts, settings.num_candidates, seed=settings.seed, temperature=settings.temperature,
        batch_size=settings.batch_size,
    )  # fmt: skip
    rows: list[dict[str, Any]] = [
        {
            "prompt": prompt,
            "responses": [response.text for response in group],
            "log_probs": [response.log_prob for response in group],
            "ended": [response.ended for response in group],
        }
        for prompt, group in zip(prompts, drawn, strict=True)
    ]
    kl = None
    if settings.reference is not None:
        with torch.no_grad(), policy.using(policy.reference):
            of_reference = policy.log_probs(policy.sequences(drawn)).double().cpu().reshape(len(rows), -1)
        for row, values in zip(rows, of_reference.tolist(), strict=True):
            row["reference_log_probs"] = values
        kl = float((torch.tensor([row["log_probs"] for row in rows]).double() - of_reference).mean())
    with _files.complete_files(target) as (file,):
        file.write_text("".join(f"{dump(row)}\n" for row in rows), encoding="utf-8")
    flat = [response for group in drawn for response in group]
    mean_length = sum(len(response.tokens) for response in flat) / len(flat)
    ended = sum(response.ended for response in flat) / len(flat)
    if refused:
        console.say(f"{len(refused)} rows refused; the first is row {refused[0][0]}: {refused[0][1]}")
    console.say(
        f"{len(flat)} responses to {len(prompts)} prompts, {mean_length:.1f} tokens on average, {ended:.0%} ended by "
        f"themselves\nwritten to {target}"
    )
    if kl is not None:
        console.say(f"KL(draws || reference) is {kl:.3f} nats, by the mean log-ratio of the draws")
    console.result(
        {
            "command": "propose",
            "policy": settings.policy_source,
            "output": str(target),
            "prompts": len(prompts),
            "responses": len(flat),
            "mean_length": mean_length,
            "ended": ended,
            "reference": settings.reference,
            "kl_to_reference": kl,
            "refused": [{"row": row, "reason": reason} for row, reason in refused],
        }
    )
