"""`bayesrm align`: moves a policy towards the target of a method, with the reward of a saved posterior."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from .. import _ready_files
from ..alignment import Budget, Method, align
from ..alignment.monitor import RoundReport
from ..engines import training_settings
from ..errors import ArgumentError
from . import _parser
from ._console import Console
from ._policy import add_policy, load_policy, read_prompts, read_proposals
from ._runs import add_run, load_run

_KIND = "inference/alignment"
_SWITCHES = ("--json", "--given", "-h", "--help")
_NOT_TRAINING = ("latent_learning_rate", "max_steps", "output_dir", "keep_rows")
#: What flags of the optimiser mean here, where `training_settings` speaks of reward models.
_TRAINING_HELP = {
    "training.epochs": "passes over a round's candidates",
    "training.learning_rate": "peak learning rate",
    "training.batch_size": "prompts of a micro-batch on one device, with all their candidates",
    "training.save_steps": "steps between checkpoints; None for one after each round",
}


def parse(arguments: Sequence[str]) -> Namespace:
    """The settings of the command; the method named in it decides which flags there are."""
    method = (*_parser.positionals(arguments, _SWITCHES)[:1], None)[0]
    parser = _parser.make_parser(
        "align",
        "Aligns a policy. The same command goes on where an interrupted run stopped. With METHOD, --help shows its "
        "flags.",
    )
    names = ", ".join(_ready_files.names(_KIND))
    parser.add_argument("method_name", metavar="METHOD", help=f"one of {names}, or a path to a .py file with `build`")
    add_policy(parser, trainable=True)
    add_run(parser)
    parser.add_argument("prompts", metavar="PROMPTS", help="file with the column `prompt`")
    parser.add_argument(
        "--given",
        action="store_true",
        help="learn from the column `responses` of PROMPTS instead of drawing, as many as there are for each prompt",
    )
    parser.add_argument("--rounds", type=int, default=10, help="rounds of propose, score, weigh and project")
    parser.add_argument("--prompts-per-round", type=int, help="prompts of a round; all by default")
    parser.add_argument("--temperature", type=float, default=1.0, help="temperature at which candidates are drawn")
    parser.add_argument(
        "--keep-rounds", type=_kept, default=0, metavar="NUMBER",
        help="files with the candidates of rounds that stay in the folder at the end, the last ones, or 'all'",
    )  # fmt: skip
    parser.add_argument("--generation-batch", type=int, default=64, help="responses drawn side by side")
    parser.add_argument("--max-kl", type=float, help="stop when KL(policy || reference) exceeds it, in nats")
    parser.add_argument(
        "--max-reward-std", type=float, help="stop when the policy's rewards are believed less well than this"
    )
    parser.add_argument("--seed", type=_parser.Seed, default=0, help="seed of everything random in the run")
    parser.add_argument("--on-bad-row", choices=("raise", "skip"), default="raise", help="what to do with a bad row")
    parser.add_argument("-o", "--output", metavar="FOLDER", required=True, help="folder of the run and its policy")
    _parser.add_flags(parser, training_settings, "training", "flags of the optimiser", skip=_NOT_TRAINING)
    for action in parser._actions:
        action.help = _TRAINING_HELP.get(action.dest, action.help)
    parser.set_defaults({"training.epochs": 1.0, "training.batch_size": 4})
    build = _parser.load_build(_KIND, method)
    if build is not None:
        _parser.add_flags(parser, build, "method", _parser.heading("method", method, build))
    settings = _parser.parse(parser, arguments)
    settings.build = build
    return settings


def run(settings: Namespace, console: Console) -> None:
    """Aligns and saves."""
    target = Path(settings.output)
    if target.exists() and not target.is_dir():
        raise ArgumentError(f"`--output` {target} is a file; give the name of a folder")
    method: Method = _parser.built(
        settings.build, settings.get("method"), settings.method_name, "a bayesrm.alignment.Method", Method
    )
    if (target / "manifest.json").exists():
        raise ArgumentError(f"`--output` {target} is a saved posterior; give the folder of the alignment another name")
    given = None
    if settings.given:
        given = read_proposals(settings.prompts, on_bad_row=settings.on_bad_row)
        prompts, refused = given.prompts, given.refused
    else:
        prompts, refused = read_prompts(settings.prompts, on_bad_row=settings.on_bad_row)
    posterior = load_run(settings)
    policy = load_policy(settings)
    if refused:
        console.say(f"{len(refused)} rows refused; the first is row {refused[0][0]}: {refused[0][1]}")
    report = align(
        policy, posterior, prompts, method=method, rounds=settings.rounds,
        prompts_per_round=settings.prompts_per_round, candidates=None if given is None else given.responses,
        candidate_log_probs=None if given is None else given.log_probs, temperature=settings.temperature,
        generation_batch=settings.generation_batch, budget=Budget(settings.max_kl, settings.max_reward_std),
        keep_rounds=None if settings.keep_rounds == "all" else settings.keep_rounds,
        training=training_settings(**settings.training.as_dict(), output_dir=str(target)), seed=settings.seed,
        progress=True,
    )  # fmt: skip
    policy.save_pretrained(target / "policy")
    if given is not None and given.log_probs is None:
        console.say("the responses have no `log_probs` and count as draws of the reference policy")
    console.say(_table([*report.rounds, report.final]))
    if report.stopped is not None:
        console.say(f"stopped after {report.steps} steps: {report.stopped}")
    console.say(f"policy saved to {target / 'policy'}")
    console.result(
        {
            "command": "align",
            "method": settings.method_name,
            "policy": str(target / "policy"),
            "steps": report.steps,
            "stopped": report.stopped,
            "resumed_from": report.resumed_from,
            "rounds": [dataclasses.asdict(r) for r in report.rounds],
            "final": dataclasses.asdict(report.final),
            "refused": [{"row": row, "reason": reason} for row, reason in refused],
        }
    )


def _kept(text: str | int) -> str | int:
    """A number of files, or `"all"`."""
    if text == "all":
        return text
    if not str(text).isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of files nor 'all'")
    return int(text)


def _table(rounds: Sequence[RoundReport]) -> str:
    """A line for each round."""
    columns: dict[str, Any] = {
        "round": lambda r: f"{r.round}",
        "reward": lambda r: f"{r.reward:+.3f}",
        "std": lambda r: f"{r.reward_std:.3f}",
        "KL": lambda r: f"{r.kl_to_reference:.3f}",
        "ESS": lambda r: f"{r.target_ess:.1f}",
        "length": lambda r: f"{r.length:.1f}",
    }
    lines = ["  ".join(f"{name:>7}" for name in columns)]
    lines += ["  ".join(f"{show(r):>7}" for show in columns.values()) for r in rounds]
    return "\n".join(lines)
