"""`bayesrm simulate`: feedback drawn from a declared program, with the truth beside it."""

from collections.abc import Sequence

import torch
from jsonargparse import Namespace
from torch import Tensor

from ..engines._pairwise import bound_pairs
from ..programs import RewardModel
from ..programs.reward_model import Simulation
from ..rewards import PairwisePreference
from . import _files, _parser
from ._console import Console, dump
from .fit import add_data, add_program, add_program_flags, build_program, check_encoder, describe, load_data

_SWITCHES = ("--json", "--overwrite", "-h", "--help")


def parse(arguments: Sequence[str]) -> Namespace:
    """The settings of the command; the program named in it decides which flags there are."""
    program = (*_parser.positionals(arguments, _SWITCHES)[:1], None)[0]
    parser = _parser.make_parser(
        "simulate",
        "Draws the truth from the prior of a program, and feedback from its likelihood, for the comparisons of a file "
        "whose own answers are ignored. With PROGRAM, --help shows its flags too.",
    )
    add_program(parser)
    add_data(parser)
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE.parquet",
        required=True,
        help="file for the feedback; the truth goes to FILE.truth.json",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there already")
    parser.add_argument("--seed", type=_parser.Seed, default=0, help="seed of the draw")
    build = add_program_flags(parser, program)
    settings = _parser.parse(parser, arguments)
    settings.build = build
    return settings


def _scores(simulation: Simulation) -> Tensor:
    """Score of each row's first response against its second, shape `(rows,)`."""
    scores = torch.zeros(len(simulation.data), dtype=torch.float64)
    for group in simulation.data.groups():
        scores[group.rows] = simulation.rewards[group.items[:, 0]] - simulation.rewards[group.items[:, 1]]
    return scores


def run(settings: Namespace, console: Console) -> None:
    """Draws and writes."""
    target = _files.check_output_file(settings.output, ".parquet", overwrite=settings.overwrite)
    truth = _files.check_output_file(str(target.with_suffix(".truth.json")), ".json", overwrite=settings.overwrite)
    model = build_program(settings.build, settings, RewardModel)
    data = load_data(settings)
    console.say(f"{data.summary()}\n")
    check_encoder(model, data, settings.data_source)
    featured = data.with_features(model.encode(data, progress=True).numpy())
    pairwise = isinstance(model.reward, PairwisePreference)
    if pairwise:
        model, featured = bound_pairs(model, featured, progress=True)
    simulation = model.simulate(featured, seed=settings.seed)
    # The texts are written as they came: features belong to the encoder that the next fit names.
    drawn = data.with_outcomes([group.outcome for group in simulation.data.groups()])
    record = {
        "program": settings.program_name,
        "settings": settings.program.as_dict(),
        "seed": settings.seed,
        "parameters": simulation.parameters,
        "latents": simulation.latents,
    }
    if pairwise:
        # Of the first response against the second: no response has a reward.
        record["scores"] = _scores(simulation)
    else:
        record["rewards"] = simulation.rewards
    with _files.complete_files(target, truth) as (feedback_file, truth_file):
        drawn.to_parquet(feedback_file)
        truth_file.write_text(dump(record, indent=1) + "\n", encoding="utf-8")
    console.say(f"{len(drawn)} rows of feedback in {target}, the truth in {truth}")
    console.result(
        {
            "command": "simulate",
            "program": settings.program_name,
            "output": str(target),
            "truth": str(truth),
            "data": describe(drawn),
            "latents": simulation.latents,
        }
    )
