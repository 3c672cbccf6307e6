"""`bayesrm select`: one response for each prompt, or one trajectory of each group."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jsonargparse import Namespace
from torch import Tensor

from ..beliefs import RewardBelief
from ..data import Trajectories
from ..engines import TrajectoryPosterior
from ..selection import select
from . import _files, _parser
from ._candidates import Candidates, read_candidates
from ._console import Console, dump
from ._rules import SETTINGS, add_rule, make_rule
from ._runs import add_run, load_run
from ._trajectories import picked_trajectories, show_pick


def parse(arguments: Sequence[str]) -> Namespace:
    """The settings of the command."""
    parser = _parser.make_parser(
        "select",
        "Picks one of the candidate responses of each prompt; with a run on trajectories, one of each group of them.",
    )
    add_run(parser)
    parser.add_argument(
        "candidates",
        metavar="CANDIDATES",
        help="file with the columns `prompt` and `responses`, or for trajectories `states`, `actions` and `group`",
    )
    add_rule(parser)
    parser.add_argument("--on-bad-row", choices=("raise", "skip"), default="raise", help="what to do with a bad row")
    parser.add_argument("-o", "--output", metavar="FILE.jsonl", help="file for the picks, one a line")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there already")
    return _parser.parse(parser, arguments)


def run(settings: Namespace, console: Console) -> None:
    """Selects, shows and writes."""
    rule = make_rule(settings.rule, **{name: settings[name] for name in SETTINGS})
    if settings.output is not None:
        _files.check_output_file(settings.output, ".jsonl", overwrite=settings.overwrite)
    posterior = load_run(settings)
    if isinstance(posterior, TrajectoryPosterior):
        data = Trajectories.load(settings.candidates, on_bad_row=settings.on_bad_row)
        belief, refused = posterior.predict_items(data), list(data.refused)
        picks = list(picked_trajectories(data, rule(belief), select(belief, rule), belief))
    else:
        candidates, refused = read_candidates(settings.candidates, on_bad_row=settings.on_bad_row)
        belief = posterior.predict(candidates.prompts, candidates.responses, progress=True)
        picks = list(picked(candidates, rule(belief), select(belief, rule), belief))
    if settings.output is not None:
        with _files.complete_files(_files.check_output_file(settings.output, ".jsonl", overwrite=True)) as (file,):
            file.write_text("".join(f"{dump(pick)}\n" for pick in picks), encoding="utf-8")
    for pick in picks:
        console.say(show_pick(pick) if isinstance(posterior, TrajectoryPosterior) else _show(pick))
    if refused:
        console.say(f"{len(refused)} rows refused; the first is row {refused[0][0]}: {refused[0][1]}")
    if settings.output is not None:
        console.say(f"written to {settings.output}")
    console.result(
        {
            "command": "select",
            "run": settings.run,
            "rule": settings.rule,
            "output": settings.output,
            "refused": [{"row": row, "reason": reason} for row, reason in refused],
            "picks": picks,
        }
    )


def picked(candidates: Candidates, scores: Tensor, indices: Tensor, belief: RewardBelief) -> Iterator[dict[str, Any]]:
    """The pick of each prompt: its index, text and score, and what is believed about it."""
    deviations = belief.differences("mean")
    for place, index in enumerate(indices.tolist()):
        yield {
            "row": candidates.rows[place],
            "index": index,
            "prompt": candidates.prompts[place],
            "response": candidates.responses[place][index],
            "score": float(scores[place, index]),
            "deviation": float(deviations.mean[place, index]),
            "std": float(deviations.std[place, index]),
        }


def _show(pick: Mapping[str, Any]) -> str:
    response = pick["response"] if isinstance(pick["response"], str) else pick["response"][-1]["content"]
    return f"row {pick['row']}: [{pick['index']}] score {pick['score']:+.3f}  {' '.join(response.split())[:80]}"
