"""The producer: runs the model and the SAEs over texts and yields rows of activations and reconstructions.

One forward pass serves every site, every SAE and every dataset; each distinct text is run once. Texts are grouped
into blocks, one for each set of datasets that need them, so the streaming reconstruction sums of a dataset are
the merged sums of its blocks, and a dataset can be probed as soon as its last block is done.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from delta_selectivity.models.language_model import ActivationSource, Site
from delta_selectivity.run.reconstruction import ALL, ReconstructionSums, SiteScale, TokenFacts
from delta_selectivity.run.rows import RowTable
from delta_selectivity.run.token_index import Encoded, TokenIndex
from delta_selectivity.run.token_sample import TokenSample
from delta_selectivity.saes import Sae, SparseRows
from delta_selectivity.system.cores import Cores
from delta_selectivity.system.out_of_memory import ERRORS, is_out_of_memory
from delta_selectivity.system.stopwatch import Stopwatch
from delta_selectivity.tasks import ProbeTexts, TokenBatch, TokenisedMentions, batches

log = logging.getLogger(__name__)

CPU_TOKENS = 2048  # padded tokens in a forward pass on the CPU
CPU_BATCH = 4 * CPU_TOKENS  # padded tokens of a batch on a CPU: four forward passes, so that SAEs get more rows
CPU_BATCH_BYTES = 2**28  # maximum size of its activations in float32, where that allows more than one forward pass
MIN_SHARE = 1 / 16  # least share of tokens that is assumed to be needed, for `tokens_in_memory`

NO_MENTION = torch.iinfo(torch.int64).max  # the value of `LayerRows.broken` if no mention is broken

SaeId = int  # index into the run's list of SAEs


@dataclass(frozen=True)
class Block:
    """Texts that are needed by the same datasets."""

    mentions: np.ndarray  # int64
    datasets: frozenset[int]  # indices into ProbeTexts.datasets


@dataclass(frozen=True)
class LayerRows:
    """The probed rows of one batch at one site, on the model's device."""

    site: Site
    row_ids: Tensor  # int64 [rows], on the CPU
    x: Tensor  # float32 [rows, d]
    recons: Mapping[SaeId, Tensor]  # float32 [rows, d] each
    broken: Mapping[SaeId | None, Tensor]  # int64 [], first mention with NaN or Inf in x (None) or x̂, at needed tokens
    latents: Mapping[SaeId, SparseRows] = field(default_factory=dict)  # [rows, d_sae], of the requested SAEs

    @property
    def nbytes(self) -> int:
        """Memory that the rows take in a queue."""
        dense = sum(t.nbytes for t in (self.row_ids, self.x, *self.recons.values()))
        return dense + sum(codes.nbytes for codes in self.latents.values())


@dataclass(frozen=True)
class BlockDone:
    """The reconstruction sums of a block whose rows are all in the queue."""

    block: Block
    sums: Mapping[tuple[Site, SaeId], ReconstructionSums]
    nbytes: int = 0  # negligible in a queue


Item = LayerRows | BlockDone  # items of the queue


BatchResults: TypeAlias = list[tuple[LayerRows, dict[SaeId, ReconstructionSums]]]  # one entry per site


def plan_blocks(texts: ProbeTexts) -> list[Block]:
    """Return blocks that cover all mentions of the datasets, beginning with those of the first dataset.

    Blocks do not depend on the results on disk, so a resumed run has the same batches and the same numbers.
    """
    members: dict[int, set[int]] = {}
    for index, dataset in enumerate(texts.datasets):
        for probe in dataset.probes:
            for mention in probe.mentions.tolist():
                members.setdefault(mention, set()).add(index)
    groups: dict[frozenset[int], list[int]] = {}
    for mention in sorted(members):
        groups.setdefault(frozenset(members[mention]), []).append(mention)
    order = sorted(groups, key=sorted)
    return [Block(np.array(groups[datasets], dtype=np.int64), datasets) for datasets in order]


class _EncodedTokens(NamedTuple):
    """The tokens of a batch that are encoded at a site."""

    encoded: Encoded
    x: Tensor  # float32 [encoded, d]
    mention: Tensor  # int64 [encoded], the token's mention
    facts: TokenFacts

    @classmethod
    def of(cls, x: Tensor, tokens: TokenIndex, encoded: Encoded, scale: SiteScale | None) -> _EncodedTokens:
        """Select the encoded tokens of x [needed tokens, d], of any precision."""
        x, mention, number = (_select_rows(rows, encoded.rows) for rows in (x, tokens.mention, tokens.number))
        x = x.float()
        return cls(encoded, x, mention, TokenFacts.of(x, number, scale))

    def select(self, rows: Tensor) -> Tensor:
        """Select the encoded tokens of rows [needed tokens, d] in float32."""
        return _select_rows(rows, self.encoded.rows).float()


def _select_rows(rows: Tensor, chosen: Tensor | None) -> Tensor:
    return rows if chosen is None else rows.index_select(0, chosen)


class Producer:
    """The worker that runs the model and the SAEs over blocks of texts, batch by batch."""

    def __init__(
        self,
        model: ActivationSource,
        saes: Mapping[Site, Mapping[SaeId, Sae]],
        counts_bos: Mapping[SaeId, bool],  # whether an SAE's whole-text figures include BOS tokens
        tokenised: TokenisedMentions,
        rows: RowTable,
        batch_size: int | None,  # most texts in a batch; None: limited by tokens alone
        cores: Cores,  # each runs one forward pass; 1 on a GPU
        clock: Stopwatch,
        sample: TokenSample,  # of the tokens that count in whole-text figures
        scales: Mapping[Site, SiteScale],  # of the activations, where they are known
        latents_of: Collection[SaeId] = (),  # the SAEs whose codes are put into the queue too
        max_tokens: int | None = None,  # padded tokens in a batch; None: `tokens_in_memory`, if batch_size is None
    ) -> None:
        self.model, self.saes, self.counts_bos = model, saes, counts_bos
        self.latents_of, self.sample = latents_of, sample
        self._sums_device = torch.device("cpu") if model.device.type == "mps" else model.device  # MPS lacks float64
        self.scales = {site: scale._replace(mean=scale.mean.to(self._sums_device)) for site, scale in scales.items()}
        self.tokenised, self.rows, self.clock = tokenised, rows, clock
        if batch_size is None and max_tokens is None:
            max_tokens = tokens_in_memory(model.device, saes, max(sample.limits) / ALL)
        self.batch_size, self.max_tokens = batch_size or len(tokenised.ids), max_tokens
        self.cores = cores
        reading = {(site, site.read_by(sae.input_hookpoint)) for site, by_id in saes.items() for sae in by_id.values()}
        self._also_read = {place for site, place in reading if place != site}  # by a transcoder of another site

    def run(self, blocks: Sequence[Block], put: Callable[[Item], None], on_texts: Callable[[int], None]) -> None:
        """Put the rows and then the sums of each block into the queue; call `on_texts(n)` after every n texts."""
        limits = {id(block): self.sample.limits_of(block.datasets) for block in blocks}
        work = ((limits[id(block)], batch) for block in blocks for batch in self._batches(block.mentions))
        with closing(self.cores.map_in_order(work, self._within_memory, "forward")) as done:
            for block in blocks:
                sums = {
                    (site, i): self._no_sums(sae, limits[id(block)])
                    for site, saes in self.saes.items()
                    for i, sae in saes.items()
                }
                remaining = len(block.mentions)
                while remaining:
                    (_, batch), results = next(done)
                    for layer_rows, batch_sums in results:
                        for sae_id, new in batch_sums.items():
                            sums[layer_rows.site, sae_id] = sums[layer_rows.site, sae_id].merge(new)
                        with self.clock.stage("queue_wait"):
                            put(layer_rows)
                    on_texts(len(batch.mentions))
                    remaining -= len(batch.mentions)
                put(BlockDone(block, {key: value.to("cpu") for key, value in sums.items()}))

    def _batches(self, mentions: np.ndarray) -> Iterator[TokenBatch]:
        return batches(self.tokenised, mentions, batch_size=self.batch_size, max_tokens=self.max_tokens)

    def _within_memory(self, limits_and_batch: tuple[tuple[int, ...], TokenBatch]) -> BatchResults:
        """Return the batch's results; if memory runs out, split the batch and use smaller batches from then on."""
        limits, batch = limits_and_batch
        n = len(batch.mentions)
        if n <= self.batch_size:  # the limit may have shrunk since this batch was made
            try:
                return self._process(batch, limits)
            except ERRORS as error:
                if not is_out_of_memory(error) or n == 1:
                    raise
            if self.model.device.type == "cuda":
                torch.cuda.empty_cache()
            self.batch_size = min(self.batch_size, (n + 1) // 2)
            log.warning("out of memory: continuing with at most %d texts in a batch", self.batch_size)
        return [result for part in self._batches(batch.mentions) for result in self._within_memory((limits, part))]

    @torch.inference_mode()
    def _process(self, batch: TokenBatch, limits: tuple[int, ...]) -> BatchResults:
        counts_bos = set(self.counts_bos.values()) or {False}  # without an SAE, what the next one will need
        tokens = TokenIndex.build(batch, self.rows, counts_bos, self.sample, limits).to(self._sums_device)
        with self.clock.stage("forward"):
            activations = self._token_rows(batch, tokens.wanted)
        results = []
        for site, saes in self.saes.items():
            with self.clock.stage("sae"):
                x = activations[site] if site in self._also_read else activations.pop(site)
                x = x.to(self._sums_device)  # in the model's precision: float32 only for the rows that are needed
                probed = x.index_select(0, tokens.probed).float()
                recons, sums, codes = {}, {}, {}
                needed: dict[bool, _EncodedTokens] = {}  # by whether BOS counts; shared by all SAEs
                broken: dict[SaeId | None, Tensor] = {None: _first_broken(_row_sums(x), tokens.mention)}
                for sae_id, sae in saes.items():
                    place = site.read_by(sae.input_hookpoint)
                    with_bos = self.counts_bos[sae_id]
                    if with_bos not in needed:
                        needed[with_bos] = _EncodedTokens.of(x, tokens, tokens.encoded[with_bos], self.scales.get(site))
                    tokens_of_sae = needed[with_bos]
                    read = tokens_of_sae.x
                    if place != site:
                        read = tokens_of_sae.select(activations[place].to(self._sums_device))
                    recon, latents, broken[sae_id], sums[sae_id] = self._reconstruct(sae, read, probed, tokens_of_sae)
                    recons[sae_id] = tokens.pool(recon)
                    if sae_id in self.latents_of:
                        codes[sae_id] = tokens.pool_codes(latents)
                results.append((LayerRows(site, tokens.row_ids, tokens.pool(probed), recons, broken, codes), sums))
        return results

    def _token_rows(self, batch: TokenBatch, wanted: Tensor) -> dict[Site, Tensor]:
        """Return the wanted rows of the batch; on a CPU by several forward passes, since more tokens exceed its cache.

        wanted: bool [texts, tokens].
        """
        if self.model.device.type != "cpu" or batch.ids.numel() <= CPU_TOKENS:
            return self.model.token_rows(batch.ids, batch.lengths, wanted)
        n = len(batch.mentions)
        found, begin = [], 0
        for part in batches(self.tokenised, batch.mentions, batch_size=n, max_tokens=CPU_TOKENS):  # in the same order
            end = begin + len(part.mentions)
            found.append(self.model.token_rows(part.ids, part.lengths, wanted[begin:end, : part.ids.shape[1]]))
            begin = end
        return {site: torch.cat([rows.pop(site) for rows in found]) for site in list(found[0])}

    def _reconstruct(
        self, sae: Sae, read: Tensor, probed: Tensor, needed: _EncodedTokens
    ) -> tuple[Tensor, SparseRows, Tensor, ReconstructionSums]:
        """Return x̂ and the codes at the name tokens, the first broken mention, and the sums.

        Each token in `needed` is encoded once, from the SAE's input `read`, which is not x for a transcoder. `probed`
        is x at the name tokens.
        """
        encoded, x, mention, facts = needed
        latents = sae.encode(read)
        recon, latents = sae.decode(latents, read).to(self._sums_device), latents.to(self._sums_device)
        sums, errors = self._no_sums(sae, encoded.whole), None
        for limit, chosen in encoded.whole.items():
            of_limit = sums.whole[limit].add(x, recon, latents, facts, encoded.n_counted, chosen)
            errors = of_limit if chosen is None else errors
        broken = _first_broken(recon.sum(dim=1) if errors is None else errors, mention)
        recon, latents = recon.index_select(0, encoded.probed), latents.select(encoded.probed)
        sums.probed.add(probed, recon, latents)
        return recon, latents, broken, sums

    def _no_sums(self, sae: Sae, limits: Collection[int]) -> ReconstructionSums:
        return ReconstructionSums.empty(sae.d_out, sae.d_sae, self._sums_device, limits)


def _row_sums(x: Tensor) -> Tensor:
    """Return sums of the rows of x [rows, d], which are finite unless x is not. Those of float16 exceed its range."""
    return (x.float() if x.dtype == torch.float16 else x).sum(dim=1)


def _first_broken(sums: Tensor, mention: Tensor) -> Tensor:
    """Return the smallest `mention` [rows] whose row sum [rows] is not finite, else `NO_MENTION`.

    A sum overflows only if activations are near the float32 limit and unusable. Does not wait for a GPU.
    """
    if sums.device.type == "cpu" and math.isfinite(sums.sum()):
        return torch.tensor(NO_MENTION)
    none = torch.full_like(mention, NO_MENTION)
    return torch.where(sums.isfinite(), none, mention).amin()


def tokens_in_memory(device: torch.device, saes: Mapping[Site, Mapping[SaeId, Sae]], share: float = 1) -> int:
    """Return how many padded tokens of a batch fit safely in the free memory; share: of tokens that are needed.

    Each needed token needs memory for its activations at every site, one layer's inner activations, and the
    pre-activations and reconstructions of one SAE. On a CPU, a batch has tokens for several forward passes.
    """
    all_saes = [sae for site in saes.values() for sae in site.values()]
    d = max((max(sae.d_in, sae.d_out) for sae in all_saes), default=1)
    if device.type != "cuda":
        rows = CPU_BATCH_BYTES // (4 * d * len(saes))
        return min(max(int(rows / max(share, MIN_SHARE)), CPU_TOKENS), CPU_BATCH)
    if not all_saes:  # a baseline without a reconstruction needs activations only
        return CPU_TOKENS
    d_sae = max(sae.d_sae for sae in all_saes)
    per_token = 4 * (d * (len(saes) + 24) + 2 * d_sae)
    free, _ = torch.cuda.mem_get_info(device)
    return int(min(max(free // 4 // per_token, CPU_TOKENS), 128 * CPU_TOKENS))
