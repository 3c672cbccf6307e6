"""Rewards of tokens from one or more correctors on one backbone."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from tqdm import tqdm

from .._typing import Tensor
from ..data.rendering import Content
from ..errors import ArgumentError, PersistenceError
from ._corrector_scores import ScoreRule
from ._tokens import token_spans
from .corrector import Corrector
from .corrector_network import CorrectorNetwork
from .token_head import TokenScores

_LOG = logging.getLogger(__name__)

_ADAPTER, _DRAWS = "adapter", "corrector.safetensors"


@dataclasses.dataclass(frozen=True, eq=False)
class CorrectorScorer:
    """A `TokenScorer`: scores under each of S draws of a corrector's weights, which all tokens share.

    Attributes:
        network: The corrector; its own weights do not count.
        draws: Weights in the order of `network.theta()`, shape `(S, P)`.
        rule: From predictions to scores.
        batch_size: Responses that go through the corrector together.

    Raises:
        ArgumentError: The draws are not of the network's weights.
    """

    network: CorrectorNetwork
    draws: Tensor
    rule: ScoreRule = dataclasses.field(default_factory=ScoreRule)
    batch_size: int = 16

    #: What it is, as summaries call it.
    title = "LanguageFeedback"

    def __post_init__(self) -> None:
        if self.draws.dim() != 2 or self.draws.shape[1] != self.network.num_parameters or not len(self.draws):
            raise ArgumentError(
                f"`draws` has shape {tuple(self.draws.shape)}; give at least one row of the corrector's "
                f"{self.network.num_parameters} weights"
            )

    @property
    def num_draws(self) -> int:
        """S."""
        return len(self.draws)

    @property
    def num_parameters(self) -> int:
        """Trained numbers of one draw."""
        return self.network.num_parameters

    def score(
        self, prompts: Sequence[Content], responses: Sequence[Content], *, start: int = 0, progress: bool = False
    ) -> list[TokenScores]:
        """Scores of the tokens of responses; the end-of-sequence token of one that was not cut is its last.

        Raises:
            DataError: A text cannot be used; the message names the item.
        """
        network = self.network
        readings = network.encode(prompts, responses, start=start)
        if cut := sum(not reading.ended for reading in readings):
            _LOG.warning(
                "%d of %d responses have more than %d tokens: what comes after has no scores; raise "
                "`max_response_tokens`, or refuse them by on_long='raise'",
                cut, len(readings), network.settings.max_response_tokens,
            )  # fmt: skip
        scores = [torch.zeros(self.num_draws, len(reading.response), dtype=torch.float64) for reading in readings]
        order = sorted(range(len(readings)), key=lambda item: -len(readings[item].tokens))
        batches = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        total = len(order) * self.num_draws
        with torch.no_grad(), tqdm(total=total, unit="response", disable=not progress) as bar:
            for draw, weights in enumerate(self.draws):
                with network.weights(weights.to(network.device)):
                    for items in batches:
                        found = self._predictions([readings[item] for item in items])
                        for item, (matches, ratios) in zip(items, found, strict=True):
                            scores[item][draw] = self.rule.scores(matches, ratios)
                        bar.update(len(items))
        return [
            TokenScores(
                reading.before,
                reading.response,
                reading.text,
                token_spans(network.codec.tokenizer, reading.text, len(reading.response)),
                own,
                torch.zeros(own.shape[1], dtype=torch.float64),
            )
            for reading, own in zip(readings, scores, strict=True)
        ]

    def _predictions(self, readings: Sequence[Any]) -> list[tuple[Tensor, Tensor]]:
        """Of each response, which tokens the corrector would write, and how much less probable they are."""
        responses = [reading.response for reading in readings]
        batch = self.network.collate(readings, responses)
        logits = self.network.logits(batch)
        best, place = logits.max(-1)
        ratios = (logits.gather(-1, batch["targets"][:, None])[:, 0] - best).cpu()
        matches = (place == batch["targets"]).cpu()
        sizes = [len(response) for response in responses]
        return list(zip(matches.split(sizes), ratios.split(sizes), strict=True))

    def save(self, folder: Path) -> dict[str, Any]:
        """Writes draws and prior mean, and where there are adapters those of the first draw in peft's format."""
        network = self.network
        if network.settings.rank:
            with network.weights(self.draws[0].to(network.device)):
                network.save_adapter(folder / _ADAPTER)
        members = [network.split(draw.cpu()) for draw in self.draws]
        tensors = {f"draws.{site}": torch.stack([member[site] for member in members]) for site in network.sites}
        tensors |= {f"initial.{site}": value.cpu().contiguous() for site, value in network.initial.items()}
        safetensors.torch.save_file(tensors, folder / _DRAWS)
        return {
            # The network is loaded onto what the machine at hand has.
            "corrector": network.settings.to_config() | {"device": None},
            "rule": dataclasses.asdict(self.rule),
            "batch_size": self.batch_size,
        }

    @classmethod
    def restore(cls, config: Mapping[str, Any], folder: Path) -> "CorrectorScorer":
        """The scorer that `save` wrote.

        Raises:
            PersistenceError: The weights are those of another model.
        """
        settings = Corrector.from_config(config["corrector"])
        if settings.rank:
            settings = dataclasses.replace(settings, adapter=str(folder / _ADAPTER))
        network = settings.load()
        tensors = safetensors.torch.load_file(folder / _DRAWS)
        shapes = {f"initial.{site}": tuple(p.shape) for site, p in network.sites.items()}
        if {name: tuple(t.shape) for name, t in tensors.items() if name.startswith("initial.")} != shapes:
            raise PersistenceError(
                f"{folder / _DRAWS} does not hold the weights of {settings.model!r} with these settings; has the model "
                "changed?"
            )
        network.set_initial(torch.cat([tensors[f"initial.{site}"].reshape(-1) for site in network.sites]))
        draws = torch.cat([tensors[f"draws.{site}"].flatten(1) for site in network.sites], dim=1)
        network.set_theta(draws[0].to(network.device))
        return cls(network, draws, ScoreRule(**config["rule"]), config["batch_size"])
