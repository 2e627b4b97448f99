"""Run the model on from x̂ in place of x, and compare what it says next: a pass of its own before the probes.

found = measure_downstream(plan, cells, saes, tokenised, sample, cores)
found[cell].delta_ce

Texts are drawn whole, by the seed and to about as many tokens of each dataset as `whole_tokens` says. x̂ stands at every
token that counts in the SAE's whole-text figures: BOS stays as it is where it does not count there. The mean that x is
compared with is over the same tokens of the dataset's drawn texts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from delta_selectivity.models.language_model import Site, WholeModel
from delta_selectivity.run.activations import SaeId
from delta_selectivity.run.downstream_figures import Downstream, TextSums, downstream_figures
from delta_selectivity.run.planning import Cell, Plan
from delta_selectivity.run.token_sample import TokenSample
from delta_selectivity.saes import Sae
from delta_selectivity.system.bars import open_bar
from delta_selectivity.system.cores import Cores
from delta_selectivity.system.out_of_memory import ERRORS, is_out_of_memory, release
from delta_selectivity.tasks import TokenBatch, TokenisedMentions, batches

log = logging.getLogger(__name__)

Ints = NDArray[np.int64]
T = TypeVar("T")

LOGITS = 2**26
"""Numbers that the logits of a pass may have on a CPU, where a batch keeps three such arrays."""
CHUNK = 2**22
"""Logits that are made into probabilities at a time."""


class Ablation(NamedTuple):
    """The mean of a dataset's x in place of x, or zeros, which are the same for all datasets."""

    dataset: int | None
    site: Site
    with_bos: bool


class Variant(NamedTuple):
    """An SAE's x̂ in place of x."""

    site: Site
    subject: SaeId


class Untouched(NamedTuple):
    """The model as it is."""

    with_bos: bool


Run = Ablation | Variant | Untouched


@dataclass(frozen=True)
class DownstreamPass:
    """What is run, over which texts."""

    model: WholeModel
    saes: Mapping[Site, Mapping[SaeId, Sae]]
    counts_bos: Mapping[SaeId, bool]
    tokenised: TokenisedMentions
    positions: str
    members: Mapping[int, Ints]  # of each dataset: the mentions whose texts were drawn, ascending
    cores: Cores
    limits: list[int] = field(default_factory=list)  # texts in a pass, once memory ran out

    @property
    def mentions(self) -> Ints:
        """Those whose texts were drawn for some dataset."""
        return np.unique(np.concatenate([np.empty(0, dtype=np.int64), *self.members.values()]))

    def run(self, cells: Sequence[Cell], on_texts: Callable[[int], None]) -> dict[Cell, Downstream]:
        """Return the figures of each cell whose subject reconstructs something."""
        wanted = [cell for cell in cells if cell.subject in self.saes.get(cell.site, {})]
        means = self._means(wanted)
        zeros = {Ablation(None, site, with_bos): torch.zeros_like(mean) for (_, site, with_bos), mean in means.items()}
        found: dict[int, dict[Run, list[float]]] = {}
        for batch, sums in self._in_batches(lambda batch: self._process(batch, zeros | means)):
            for run, by_text in sums.items():
                for mention, values in zip(batch.mentions.tolist(), by_text.tolist(), strict=True):
                    found.setdefault(mention, {})[run] = values
            on_texts(len(batch.mentions))
        return {cell: self._figures(cell, found) for cell in wanted}

    def _figures(self, cell: Cell, found: Mapping[int, Mapping[Run, list[float]]]) -> Downstream:
        mentions, with_bos = self.members[cell.dataset], self.counts_bos[cell.subject]
        ablations = [Ablation(dataset, cell.site, with_bos) for dataset in (cell.dataset, None)]
        runs: list[Run] = [Untouched(with_bos), Variant(cell.site, cell.subject), *ablations]
        width = len(TextSums._fields)
        columns = (np.array([found[m][run] for m in mentions.tolist()]).reshape(-1, width) for run in runs)
        sums = [TextSums(*of_run.T) for of_run in columns]
        first = {self.tokenised.ids[m].tobytes(): m for m in mentions[::-1].tolist()}
        texts = np.array([first[self.tokenised.ids[m].tobytes()] for m in mentions.tolist()], dtype=np.int64)
        model, sae, mean, zero = sums
        return downstream_figures(model, sae, mean, zero, texts)

    @torch.inference_mode()
    def _means(self, cells: Sequence[Cell]) -> dict[Ablation, Tensor]:
        """The mean of x [d] over the tokens that count, by dataset."""
        asked = sorted({Ablation(cell.dataset, cell.site, self.counts_bos[cell.subject]) for cell in cells})
        sums: dict[Ablation, tuple[Tensor, int]] = {}

        def add_up(batch: TokenBatch) -> dict[Ablation, tuple[Tensor, int]]:
            x, found = self.model.activations(batch.ids), {}
            for ablation in asked:
                assert ablation.dataset is not None
                members = torch.from_numpy(np.isin(batch.mentions, self.members[ablation.dataset]))
                place = _places(_counted(batch, ablation.with_bos) & members[:, None], self.model.device)
                rows = x[ablation.site].flatten(0, 1).index_select(0, place)
                found[ablation] = (rows.sum(0, dtype=torch.float32).cpu().double(), len(place))
            return found

        for _, by_ablation in self._in_batches(add_up):
            for ablation, (total, n) in by_ablation.items():
                before = sums.get(ablation, (torch.zeros_like(total), 0))
                sums[ablation] = (before[0] + total, before[1] + n)
        return {ablation: (total / max(n, 1)).float().to(self.model.device) for ablation, (total, n) in sums.items()}

    @torch.inference_mode()
    def _process(self, batch: TokenBatch, constants: Mapping[Ablation, Tensor]) -> dict[Run, NDArray[np.float64]]:
        """Sums by text, float64 [texts, columns of `TextSums`], of every run."""
        untouched, x = self.model.logits(batch.ids)
        places = {with_bos: _places(_counted(batch, with_bos), self.model.device) for with_bos in (False, True)}
        kinds = {self.counts_bos[i] for by_id in self.saes.values() for i in by_id}
        found: dict[Run, NDArray[np.float64]] = {
            Untouched(with_bos): self._sums(batch, untouched, untouched, with_bos) for with_bos in kinds
        }
        for site, saes in self.saes.items():
            for subject, sae in saes.items():
                with_bos = self.counts_bos[subject]
                place = places[with_bos]
                read = x[site.read_by(sae.input_hookpoint)].flatten(0, 1).index_select(0, place).float()
                recon = sae.decode(sae.encode(read), read)
                logits = self.model.logits_with(batch.ids, site, place, recon)
                found[Variant(site, subject)] = self._sums(batch, untouched, logits, with_bos)
        for ablation, value in constants.items():
            members = batch.mentions if ablation.dataset is None else self.members[ablation.dataset]
            if np.isin(batch.mentions, members).any():
                place = places[ablation.with_bos]
                logits = self.model.logits_with(batch.ids, ablation.site, place, value.expand(len(place), -1))
                found[ablation] = self._sums(batch, untouched, logits, ablation.with_bos)
        return found

    def _sums(self, batch: TokenBatch, untouched: Tensor, logits: Tensor, with_bos: bool) -> NDArray[np.float64]:
        counted = _counted(batch, with_bos)
        position = torch.arange(batch.ids.shape[1])
        follows = position < batch.lengths[:, None] - 1
        first = batch.last if self.positions == "last" else batch.first
        probed = (position >= first[:, None]) & (position <= batch.last[:, None])
        place = _places(counted | probed, self.model.device)
        next_ids = torch.roll(batch.ids, -1, dims=1).flatten().to(self.model.device).index_select(0, place)
        size = max(1, CHUNK // logits.shape[-1])
        before, after = untouched.flatten(0, 1), logits.flatten(0, 1)
        parts = [
            _kl_and_ce(before.index_select(0, some), after.index_select(0, some), ids)
            for some, ids in zip(place.split(size), next_ids.split(size), strict=True)
        ]
        by_token = torch.zeros(2, *counted.shape, dtype=torch.float64)
        by_token.flatten(1)[:, place.cpu()] = torch.cat(parts, dim=1).cpu()
        kl, ce = by_token
        columns = [
            counted, kl * counted, counted & follows, ce * (counted & follows),
            probed, kl * probed, probed & follows, ce * (probed & follows),
        ]  # fmt: skip
        return torch.stack([column.double().sum(1) for column in columns], dim=1).numpy()

    def _in_batches(self, work: Callable[[TokenBatch], T]) -> Iterator[tuple[TokenBatch, T]]:
        """Each batch of the drawn texts with its result; out of memory, its halves, and smaller batches then on."""
        size, max_tokens = max(len(self.mentions), 1), self._room() // self.model.n_vocabulary
        batched = batches(self.tokenised, self.mentions, batch_size=size, max_tokens=max_tokens)

        def within_memory(batch: TokenBatch) -> list[tuple[TokenBatch, T]]:
            n = len(batch.mentions)
            if n <= min(self.limits, default=n):
                try:
                    return [(batch, work(batch))]
                except ERRORS as error:
                    if not is_out_of_memory(error) or n == 1:
                        raise
                release()
                self.limits.append((n + 1) // 2)
                log.warning("out of memory: going on with at most %d texts in a downstream pass", min(self.limits))
            parts = batches(self.tokenised, batch.mentions, batch_size=min(self.limits))
            return [result for part in parts for result in within_memory(part)]

        with closing(self.cores.in_order(batched, within_memory, "downstream")) as done:
            for _, results in done:
                yield from results

    def _room(self) -> int:
        """Numbers that the logits of a pass may have."""
        if self.model.device.type != "cuda":
            return LOGITS
        free, _ = torch.cuda.mem_get_info(self.model.device)
        return max(LOGITS, free // 32)


def measure_downstream(
    plan: Plan,
    cells: Sequence[Cell],
    saes: Mapping[Site, Mapping[SaeId, Sae]],
    tokenised: TokenisedMentions,
    sample: TokenSample,
    cores: Cores,
    quiet: bool = True,  # no bar
) -> dict[Cell, Downstream]:
    """Return the figures of each cell whose subject reconstructs something. Raises `RequestError` as `load_whole`."""
    reads = {site.read_by(sae.input_hookpoint) for site, by_id in saes.items() for sae in by_id.values()}
    model = plan.info.load_whole({*saes, *reads}, plan.request.device1, plan.dtype)
    members = drawn_texts(plan, cells, sample)
    counts_bos = {i: subject.counts_bos for i, subject in enumerate(plan.subjects)}
    whole = DownstreamPass(model, saes, counts_bos, tokenised, plan.request.settings.positions, members, cores)
    with open_bar(len(whole.mentions), "downstream", "text", quiet=quiet) as bar:
        return whole.run(cells, bar.update)


def drawn_texts(plan: Plan, cells: Sequence[Cell], sample: TokenSample) -> dict[int, Ints]:
    """Of each dataset with cells: the mentions whose texts are run on, ascending."""
    found = {}
    for index in sorted({cell.dataset for cell in cells}):
        mentions = np.unique(np.concatenate([probe.mentions for probe in plan.texts.datasets[index].probes]))
        found[index] = sample.texts(mentions, index)
    return found


def _counted(batch: TokenBatch, with_bos: bool) -> Tensor:
    """Which tokens count, bool [texts, tokens]: the real ones, BOS if it does."""
    position = torch.arange(batch.ids.shape[1])
    return (position < batch.lengths[:, None]) & (position >= int(batch.has_bos and not with_bos))


def _places(mask: Tensor, device: torch.device) -> Tensor:
    """Where a mask [texts, tokens] is true: text x tokens + position, int64."""
    return mask.flatten().nonzero()[:, 0].to(device)


def _kl_and_ce(untouched: Tensor, logits: Tensor, next_ids: Tensor) -> Tensor:
    """KL of the first distribution from the second, and the second's cross-entropy of the next token: [2, rows]."""
    before, after = untouched.float().log_softmax(-1), logits.float().log_softmax(-1)
    kl = (before.exp() * (before - after)).sum(-1)
    return torch.stack([kl, -after.gather(1, next_ids[:, None])[:, 0]]).double()
