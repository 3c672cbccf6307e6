"""`bayesrm fit`: a program, an engine and data make a posterior on disk."""

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from jsonargparse import Namespace

from .. import _ready_files
from ..data import Comparisons, Trajectories
from ..data.records import Records
from ..engines import Engine, Posterior, Program, fit, training_settings
from ..errors import ArgumentError, DataError
from ..likelihoods.base import to_config
from ..programs import RewardModel
from ..rewards import LoRA, text_head
from . import _files, _parser
from ._console import Console
from ._own_likelihood import keep_settings, own_likelihoods

_SWITCHES = ("--json", "--overwrite", "-h", "--help")


def parse(arguments: Sequence[str]) -> Namespace:
    """The settings of the command; the program and the engine named in it decide which flags there are."""
    program, engine = (*_parser.positionals(arguments, _SWITCHES)[:2], None, None)[:2]
    parser = _parser.make_parser(
        "fit",
        "Fits a program to feedback or trajectories and saves its posterior. With PROGRAM and ENGINE, --help shows "
        "their flags.",
    )
    add_program(parser)
    names = ", ".join([*_ready_files.names("inference"), *_ready_files.registered()])
    parser.add_argument("engine_name", metavar="ENGINE", help=f"one of {names}, or a path to a .py file with `build`")
    add_data(parser)
    parser.add_argument("-o", "--output", metavar="RUN", required=True, help="folder to save the posterior to")
    parser.add_argument("--overwrite", action="store_true", help="replace a posterior that is there already")
    parser.add_argument("--seed", type=_parser.Seed, default=0, help="seed of everything random in the fit")
    builds = add_program_flags(parser, program), _parser.load_build("inference", engine)
    if builds[1] is not None:
        _parser.add_flags(
            parser, builds[1], "engine", _parser.heading("engine", engine, builds[1]), also=training_settings
        )
    settings = _parser.parse(parser, arguments)
    settings.builds = builds
    return settings


def run(settings: Namespace, console: Console) -> None:
    """Fits and saves."""
    target = _files.check_output_run(settings.output, overwrite=settings.overwrite)
    model = build_program(settings.builds[0], settings)
    engine = _parser.built(
        settings.builds[1], settings.get("engine"), settings.engine_name, "an engine such as Laplace", Engine
    )
    data = load_data(settings, model.data_type)
    console.say(f"{data.summary()}\n")
    if isinstance(model, RewardModel) and isinstance(data, Comparisons):
        check_encoder(model, data, settings.data_source)
    posterior = fit(model, data, inference=engine, seed=settings.seed, progress=True)
    posterior.save_pretrained(target)
    own = own_likelihoods(posterior.program.likelihood)
    if any(to_config(likelihood)["name"] is None for likelihood in own):
        keep_settings(target, settings.program_name, settings.builds[0], settings.get("program"))
    console.say(f"{posterior.summary()}\nsaved to {target}")
    if own:
        console.say(
            f"its likelihood is your own: pass --program {settings.program_name} to commands that read {target}"
        )
    console.result(
        {
            "command": "fit",
            "run": str(target),
            "program": settings.program_name,
            "engine": settings.engine_name,
            "data": describe(data),
            "report": dataclasses.asdict(posterior.report),
            "needs_program": settings.program_name if own else None,
            "latents": latent_intervals(posterior),
        }
    )


def add_program(parser: Any) -> None:
    """Adds the argument PROGRAM."""
    names = ", ".join(_ready_files.names("models"))
    parser.add_argument("program_name", metavar="PROGRAM", help=f"one of {names}, or a path to a .py file with `build`")


def add_program_flags(parser: Any, program: str | None) -> Any:
    """Loads the program, adds its flags, and returns its `build`; `None` where none is named."""
    build = _parser.load_build("models", program)
    if build is not None:
        _parser.add_flags(parser, build, "program", _parser.heading("program", program, build), also=text_head)
    return build


def add_data(parser: Any) -> None:
    """Adds the argument DATA and the flags of the reader."""
    parser.add_argument(
        "data_source",
        metavar="DATA",
        help="file (.parquet, .jsonl, .json, .csv) or hub id with feedback, or with trajectories for a program of them",
    )
    unused = ("source", "in_memory_limit", "cache_dir")
    _parser.add_flags(parser, Comparisons.load, "data", "flags of the reader", skip=unused)


def build_program(build: Any, settings: Namespace, accepted: Any = Program) -> Any:
    """The program with its flags applied."""
    expected = "a program such as bayesrm.RewardModel" if accepted is Program else f"a bayesrm.{accepted.__name__}"
    return _parser.built(build, settings.get("program"), settings.program_name, expected, accepted)


def load_data(settings: Namespace, kinds: Any = Comparisons) -> Any:
    """What the command line names, see `read_data`."""
    return read_data(settings.data_source, settings.data.as_dict(), kinds)


def read_data(source: str, given: dict[str, Any], kinds: Any = Comparisons) -> Any:
    """A source as the first of the types of data whose reader knows its columns, with the flags that were given.

    Raises:
        DataError: It can be read as none of them.
    """
    defaults = {name: value.default for name, value in inspect.signature(Comparisons.load).parameters.items()}
    refused: list[DataError] = []
    for kind in kinds if isinstance(kinds, tuple) else (kinds,):
        if not hasattr(kind, "load"):
            raise ArgumentError(f"{kind.__name__} have no format of files; fit this program from Python")
        known = inspect.signature(kind.load).parameters
        try:
            data = kind.load(source, **{k: v for k, v in given.items() if k in known})
        except DataError as error:
            refused.append(error)
            continue
        unused = [f"--data.{k}" for k, v in given.items() if k not in known and v != defaults.get(k)]
        if unused:
            raise ArgumentError(f"{', '.join(unused)} cannot be used: {source} holds {kind.__name__}")
        return data
    # A row that cannot be read says more than columns that another reader does not know.
    rows = [error for error in refused if error.row is not None]
    raise rows[0] if rows else DataError("; or ".join(dict.fromkeys(map(str, refused))))


def check_encoder(model: RewardModel, data: Comparisons, source: str) -> None:
    """Refuses texts that nothing turns into features.

    Raises:
        ArgumentError: The data carry no features and the program has no encoder.
    """
    if data.features is None and not isinstance(model.reward, LoRA) and model.head.features is None:
        raise ArgumentError(
            f"{source} holds texts without features, and the program has no encoder; "
            "pass --program.encoder with the folder or hub id of a language model"
        )


def describe(data: Comparisons | Records | Trajectories) -> dict[str, Any]:
    """What was read, as JSON values."""
    found: dict[str, Any] = {"rows": len(data)}
    if isinstance(data, Comparisons):
        found |= {"items": data.num_items, "prompts": data.num_prompts, "kinds": list(data.kinds)}
    elif isinstance(data, Trajectories):
        demonstrations = int(data.demonstrated.sum())
        found |= {"steps": len(data.actions), "demonstrations": demonstrations, "preferences": len(data.preferences)}
    else:
        found |= {"items": len(data), "prompts": data.num_prompts, "kinds": [type(data).__name__.lower()]}
    return found | {"refused": [{"row": row, "reason": reason} for row, reason in data.refused]}


def latent_intervals(posterior: Posterior) -> dict[str, Any]:
    """Median and central 90% interval of each latent of the likelihood."""
    levels = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)
    found = {}
    for name, draws in posterior.latents(2000).items():
        low, median, high = torch.quantile(draws.double(), levels, dim=0)
        found[name] = {"median": median, "low": low, "high": high, "level": 0.9}
    return found
