"""Downstream evaluation: run the model with x̂ in place of x, and compare its predictions.

found = measure_downstream(plan, cells, saes, tokenised, sample, cores)
found[cell].delta_ce

This is a separate pass before the probes. Whole texts are drawn by seed, about `whole_tokens` tokens per dataset.
x̂ replaces x at every token of the SAE's whole-text figures; BOS is unchanged if the figures exclude it. Mean ablation
uses the mean over the same tokens of the dataset's drawn texts.
"""

from __future__ import annotations

import logging
import math
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
from delta_selectivity.run.planning import Cell, Plan, by_site
from delta_selectivity.run.row_store import NOT_FINITE
from delta_selectivity.run.token_sample import TokenSample
from delta_selectivity.saes import Sae
from delta_selectivity.system.bars import open_bar
from delta_selectivity.system.cores import Cores
from delta_selectivity.system.out_of_memory import ERRORS, is_out_of_memory, release
from delta_selectivity.tasks import TokenBatch, TokenisedMentions, batches

log = logging.getLogger(__name__)

Ints = NDArray[np.int64]
T = TypeVar("T")

LOGITS = 2**24
"""Maximum number of logits in a pass on a CPU; each core holds two such arrays. A pass has at least one text."""
CHUNK = 2**22
"""Logits to convert to probabilities at a time."""


class Ablation(NamedTuple):
    """The mean of x, or zeros, in place of x."""

    site: Site
    with_bos: bool
    is_mean: bool


class Substitution(NamedTuple):
    """An SAE's x̂ in place of x."""

    site: Site
    subject: SaeId


class Unmodified(NamedTuple):
    """The unmodified model."""

    with_bos: bool


Run = Ablation | Substitution | Unmodified


@dataclass(frozen=True)
class DownstreamPass:
    """The forward passes over the drawn texts of one dataset."""

    model: WholeModel
    saes: Mapping[Site, Mapping[SaeId, Sae]]
    counts_bos: Mapping[SaeId, bool]
    tokenised: TokenisedMentions
    positions: str
    mentions: Ints  # mentions whose texts are drawn, ascending
    cores: Cores
    limits: list[int] = field(default_factory=list)  # of texts in a pass; one is added whenever memory runs out

    def run(self, on_texts: Callable[[int], None]) -> dict[Substitution, Downstream]:
        """Return the figures of each SAE."""
        constants = self._constants()
        found: dict[int, dict[Run, list[float]]] = {}
        for batch, sums in self._in_batches(lambda batch: self._process(batch, constants)):
            for run, by_text in sums.items():
                for mention, values in zip(batch.mentions.tolist(), by_text.tolist(), strict=True):
                    found.setdefault(mention, {})[run] = values
            on_texts(len(batch.mentions))
        substitutions = [Substitution(site, subject) for site, by_id in self.saes.items() for subject in by_id]
        return {substitution: self._figures(substitution, found) for substitution in substitutions}

    def _figures(self, substitution: Substitution, found: Mapping[int, Mapping[Run, list[float]]]) -> Downstream:
        mentions, with_bos = self.mentions.tolist(), self.counts_bos[substitution.subject]
        ablations = [Ablation(substitution.site, with_bos, is_mean) for is_mean in (True, False)]
        runs: list[Run] = [Unmodified(with_bos), substitution, *ablations]
        width = len(TextSums._fields)
        columns = (np.array([found[m][run] for m in mentions]).reshape(-1, width) for run in runs)
        model, sae, mean, zero = (TextSums(*of_run.T) for of_run in columns)
        first = {self.tokenised.ids[m].tobytes(): m for m in reversed(mentions)}
        texts = np.array([first[self.tokenised.ids[m].tobytes()] for m in mentions], dtype=np.int64)
        return downstream_figures(model, sae, mean, zero, texts)

    @torch.inference_mode()
    def _constants(self) -> dict[Ablation, Tensor]:
        """Return the ablation vectors [d]: the mean of x over the counted tokens, and zeros."""
        kinds = sorted({(site, self.counts_bos[i]) for site, by_id in self.saes.items() for i in by_id})

        def sum_activations(batch: TokenBatch) -> list[tuple[Tensor, int]]:
            x, found = self.model.activations(batch.ids), []
            for site, with_bos in kinds:
                place = _places(_counted(batch, with_bos), self.model.device)
                rows = x[site].flatten(0, 1).index_select(0, place)
                found.append((_on_cpu(rows.sum(0, dtype=torch.float32)), len(place)))
            return found

        batched = [sums for _, sums in self._in_batches(sum_activations)]
        constants = {}
        for (site, with_bos), sums in zip(kinds, zip(*batched, strict=True), strict=False):
            total, n = torch.stack([part for part, _ in sums]).sum(0), sum(n for _, n in sums)
            mean = (total / max(n, 1)).float().to(self.model.device)
            constants[Ablation(site, with_bos, True)] = mean
            constants[Ablation(site, with_bos, False)] = torch.zeros_like(mean)
        return constants

    @torch.inference_mode()
    def _process(self, batch: TokenBatch, constants: Mapping[Ablation, Tensor]) -> dict[Run, NDArray[np.float64]]:
        """Return the sums of every run: float64 [texts, columns of `TextSums`]."""
        unmodified, x = self.model.logits(batch.ids)
        places = {with_bos: _places(_counted(batch, with_bos), self.model.device) for with_bos in (False, True)}
        kinds = {self.counts_bos[i] for by_id in self.saes.values() for i in by_id}
        found: dict[Run, NDArray[np.float64]] = {
            Unmodified(with_bos): self._sums(batch, unmodified, unmodified, with_bos) for with_bos in kinds
        }
        for site, saes in self.saes.items():
            for subject, sae in saes.items():
                with_bos = self.counts_bos[subject]
                place = places[with_bos]
                read = x[site.read_by(sae.input_hookpoint)].flatten(0, 1).index_select(0, place).float()
                recon = sae.decode(sae.encode(read), read)
                logits = self.model.logits_with(batch.ids, site, place, recon)
                found[Substitution(site, subject)] = self._sums(batch, unmodified, logits, with_bos)
        for ablation, value in constants.items():
            place = places[ablation.with_bos]
            logits = self.model.logits_with(batch.ids, ablation.site, place, value.expand(len(place), -1))
            found[ablation] = self._sums(batch, unmodified, logits, ablation.with_bos)
        return found

    def _sums(self, batch: TokenBatch, unmodified: Tensor, logits: Tensor, with_bos: bool) -> NDArray[np.float64]:
        counted = _counted(batch, with_bos)
        position = torch.arange(batch.ids.shape[1])
        follows = position < batch.lengths[:, None] - 1
        first = batch.last if self.positions == "last" else batch.first
        probed = (position >= first[:, None]) & (position <= batch.last[:, None])
        home = _places(counted | probed, torch.device("cpu"))
        next_ids = torch.roll(batch.ids, -1, dims=1).flatten().index_select(0, home).to(self.model.device)
        place, size = home.to(self.model.device), max(1, CHUNK // logits.shape[-1])
        before, after = unmodified.flatten(0, 1), logits.flatten(0, 1)
        parts = [
            _kl_and_ce(before.index_select(0, some), after.index_select(0, some), ids)
            for some, ids in zip(place.split(size), next_ids.split(size), strict=True)
        ]
        by_token = torch.zeros(2, *counted.shape, dtype=torch.float64)
        by_token.flatten(1)[:, home] = _on_cpu(torch.cat(parts, dim=1))
        kl, ce = by_token
        columns = [
            counted, kl * counted, counted & follows, ce * (counted & follows),
            probed, kl * probed, probed & follows, ce * (probed & follows),
        ]  # fmt: skip
        return torch.stack([column.double().sum(1) for column in columns], dim=1).numpy()

    def _in_batches(self, work: Callable[[TokenBatch], T]) -> Iterator[tuple[TokenBatch, T]]:
        """Yield batches of the drawn texts with their results; if memory runs out, use smaller batches from then on."""
        size, max_tokens = max(len(self.mentions), 1), self._max_logits() // self.model.n_vocabulary
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
                log.warning("out of memory: continuing with at most %d texts in a downstream pass", min(self.limits))
            parts = batches(self.tokenised, batch.mentions, batch_size=min(self.limits))
            return [result for part in parts for result in within_memory(part)]

        with closing(self.cores.map_in_order(batched, within_memory, "downstream")) as done:
            for _, results in done:
                yield from results

    def _max_logits(self) -> int:
        """Return the maximum number of logits in a pass."""
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
    quiet: bool = True,  # without a progress bar
) -> dict[Cell, Downstream]:
    """Return the figures of each cell whose subject has a reconstruction. Raises `RequestError` as `load_whole`."""
    reads = {site.read_by(sae.input_hookpoint) for site, by_id in saes.items() for sae in by_id.values()}
    model = plan.info.load_whole({*saes, *reads}, plan.request.device1, plan.dtype)
    counts_bos = {i: subject.counts_bos for i, subject in enumerate(plan.subjects)}
    wanted = [cell for cell in cells if cell.subject in saes.get(cell.site, {})]
    drawn = {index: _drawn_texts(plan, index, sample) for index in sorted({cell.dataset for cell in wanted})}
    positions, found = plan.request.settings.positions, dict[Cell, Downstream]()
    with open_bar(sum(map(len, drawn.values())), "downstream", "text", quiet=quiet) as bar:
        for index, mentions in drawn.items():
            subjects_at = by_site(cell for cell in wanted if cell.dataset == index)
            chosen = {site: {i: saes[site][i] for i in subjects} for site, subjects in subjects_at.items()}
            figures = DownstreamPass(model, chosen, counts_bos, tokenised, positions, mentions, cores).run(bar.update)
            for substitution, of_one in figures.items():
                _refuse_broken(of_one, substitution.site, plan.subjects[substitution.subject].name)
                found[Cell(index, *substitution)] = of_one
    return found


def _refuse_broken(figures: Downstream, site: Site, name: str) -> None:
    """Raise ArithmeticError for figures that are not finite: the model or x̂ is broken."""
    if all(value is None or math.isfinite(value) for value in vars(figures).values()):
        return
    what = "" if not math.isfinite(figures.ce_model or 0.0) else f" with the reconstruction by {name}"
    raise ArithmeticError(f"layer {site.layer}: {NOT_FINITE} in the model's predictions{what}")


def _drawn_texts(plan: Plan, index: int, sample: TokenSample) -> Ints:
    """Return the mentions of a dataset whose texts are drawn, ascending."""
    mentions = np.unique(np.concatenate([probe.mentions for probe in plan.texts.datasets[index].probes]))
    return sample.texts(mentions, index)


def _counted(batch: TokenBatch, with_bos: bool) -> Tensor:
    """Return the mask of counted tokens, bool [texts, tokens]: the real ones, with BOS only if `with_bos`."""
    position = torch.arange(batch.ids.shape[1])
    return (position < batch.lengths[:, None]) & (position >= int(batch.has_bos and not with_bos))


def _places(mask: Tensor, device: torch.device) -> Tensor:
    """Return the flat indices of a mask [texts, tokens]: text x tokens + position, int64."""
    return mask.flatten().nonzero()[:, 0].to(device)


def _kl_and_ce(unmodified: Tensor, logits: Tensor, next_ids: Tensor) -> Tensor:
    """Return KL(unmodified || modified), and the next-token cross-entropy of the modified logits: [2, rows]."""
    before, after = unmodified.float().log_softmax(-1), logits.float().log_softmax(-1)
    kl = (before.exp() * (before - after)).sum(-1)
    return torch.stack([kl, -after.gather(1, next_ids[:, None])[:, 0]])


def _on_cpu(sums: Tensor) -> Tensor:
    """Move to the CPU in float64; only this waits for a GPU."""
    return sums.cpu().double()
