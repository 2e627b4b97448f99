"""Baselines, which are measured, stored and reported like SAEs.

========  ==========================================================================================
identity  x̂ = x: a perfect SAE (delta_sel is exactly 0)
random    random unit directions, TopK with the SAE's L0: an untrained SAE
pca       the first k principal components, where k is the SAE's L0: the best linear code of that rank
mean      x̂ = the mean: an SAE that preserves nothing (balanced accuracy 1/2)
shuffled  the SAE's codes, decoded with permuted decoder rows: the latents are unchanged, the reconstruction is
          wrong (FVU above 1, transfer_sel near 1/2). A probe that is fitted on it may still score well, because a
          random mixing of few latents into many dimensions preserves them
names     no reconstruction: a bag of the tokens of the person's name, to measure what the name alone predicts;
          -delta_sel is what the model knows beyond it
========  ==========================================================================================

Without baselines, `sae_sel` is easily overrated: in simulation a random SAE kept 0.81 of 0.95, and names alone predict
gender. Means, axes, gain and L0 come from the calibration sample (``calibration``).
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from delta_selectivity.models.language_model import Site
from delta_selectivity.run.calibration import SiteSample, principal_axes
from delta_selectivity.saes import (
    Coder,
    IdentityCoder,
    Sae,
    ShuffledDecoder,
    SparseRows,
    constant,
    principal_components,
    random_topk,
)
from delta_selectivity.tasks import TokenisedMentions

KINDS = ("identity", "random", "pca", "mean", "shuffled", "names")
PER_SAE = ("random", "pca", "shuffled")  # one for each SAE; of the others, one for each hook point
CALIBRATED = ("random", "pca", "mean")  # use the calibration sample


@dataclass(frozen=True)
class MeasuredSae:
    """The properties of a measured SAE that its baselines depend on."""

    slug: str  # its name, safe for a file name
    hookpoint: str
    counts_bos: bool
    layers: tuple[int, ...]


@dataclass(frozen=True)
class Baseline:
    """One baseline of a run."""

    kind: str
    sae_id: int | None  # index of its SAE in the run; None: a baseline of the hook point
    owner: str  # slug of that SAE, or the hook point
    hookpoint: str
    counts_bos: bool  # whether its whole-text figures, mean and axes include BOS
    layers: tuple[int, ...]

    @property
    def name(self) -> str:
        """Its name in tables."""
        return f"baseline: {self.kind} of {self.owner}"

    @property
    def slug(self) -> str:
        """The name of its folder."""
        return f"{self.owner}_{self.kind}"

    @property
    def reconstructs(self) -> bool:
        """Whether it has a reconstruction; `names` does not."""
        return self.kind != "names"

    @property
    def has_latents(self) -> bool:
        """Whether its codes are sparse latents that can be probed; other baselines have dense codes, or none."""
        return self.kind in {"random", "shuffled"}

    def key(self, sae: str | None, calibration: str) -> dict[str, Any]:
        """Return the baseline's entries of the key of its result files.

        sae: fingerprint of its SAE, None for a baseline of the hook point. calibration: fingerprint of the texts.
        """
        key: dict[str, Any] = {"baseline": self.kind, "hookpoint": self.hookpoint, "sae": sae}
        if self.reconstructs:
            key["counts_bos"] = self.counts_bos
        if self.kind in CALIBRATED:
            key["calibration"] = calibration
        return key


def plan_baselines(kinds: Collection[str], saes: Sequence[MeasuredSae]) -> list[Baseline]:
    """Return the baselines of these kinds for these SAEs, in the order of `KINDS`."""
    places: dict[tuple[str, bool], set[int]] = {}  # (hook point, counts BOS) -> layers
    for sae in saes:
        places.setdefault((sae.hookpoint, sae.counts_bos), set()).update(sae.layers)
    planned = []
    for kind in (kind for kind in KINDS if kind in kinds):
        if kind in PER_SAE:
            planned += [
                Baseline(kind, i, sae.slug, sae.hookpoint, sae.counts_bos, sae.layers) for i, sae in enumerate(saes)
            ]
            continue
        planned += [
            Baseline(kind, None, f"{place}_with_bos" if bos else place, place, bos, tuple(sorted(layers)))
            for (place, bos), layers in places.items()
        ]
    return planned


class SiteBuilder:
    """Builder of the baselines of one site as SAEs; shared quantities are computed once."""

    def __init__(
        self, site: Site, d: int, device: torch.device | str, samples: Mapping[Site, SiteSample], seed: int
    ) -> None:
        self.site, self.d, self.device, self.seed = site, d, torch.device(device), seed
        self._samples = samples  # of this site and of its SAEs' inputs; used by the `CALIBRATED` kinds only
        self._axes = functools.cache(lambda counts_bos: principal_axes(self._x(counts_bos)))

    def build(self, baseline: Baseline, sae: Sae | None) -> Sae:
        """Build a baseline; `sae` is its SAE at this site, None for a baseline of the hook point."""
        if baseline.kind == "identity":
            return self._sae(baseline, IdentityCoder(self.d, self.device), self.d)
        if baseline.kind == "mean":
            return self._sae(baseline, constant(self._x(baseline.counts_bos).double().mean(dim=0)), 1)
        assert sae is not None
        if baseline.kind == "shuffled":
            permutation = torch.randperm(sae.d_sae, generator=self._generator()).to(self.device)
            return replace(sae, name=baseline.name, coder=ShuffledDecoder(sae.coder, permutation))
        k = self._typical_l0(sae)
        if baseline.kind == "pca":
            mean, axes = self._axes(baseline.counts_bos)
            coder = principal_components(axes[:k], mean)
            return self._sae(baseline, coder, d_sae=len(coder.W_enc), k=len(coder.W_enc))
        assert baseline.kind == "random"
        return self._random(baseline, sae.d_sae, k)

    def _random(self, baseline: Baseline, d_sae: int, k: int) -> Sae:
        """Return an SAE of random directions, with its decoder scaled by the least-squares factor on the sample.

        The k random directions that fit x best are correlated, so their unscaled sum is too long, and the FVU would be
        far above 1. The factor has little effect on probes.
        """
        x = self._x(baseline.counts_bos)
        coder = random_topk(x.double().mean(dim=0), d_sae, k, self._generator())
        unit = self._sae(baseline, coder, d_sae, k)
        recon = (unit.decode(unit.encode(x)) - coder.b_dec).double()
        energy = recon.square().sum().clamp(min=torch.finfo(torch.float64).tiny)
        gain = ((x - coder.b_dec) * recon).sum() / energy
        return replace(unit, coder=replace(coder, W_dec=coder.W_dec * gain.float()))

    def _sae(self, baseline: Baseline, coder: Coder, d_sae: int, k: int | None = None) -> Sae:
        layer, hookpoint = self.site
        return Sae(baseline.name, layer, hookpoint, self.d, d_sae, k, baseline.kind, coder)

    def _typical_l0(self, sae: Sae) -> int:
        """Return the SAE's mean L0 at the probed tokens of the sample, rounded, at least 1."""
        read = self._samples[self.site.read_by(sae.input_hookpoint)].probed
        return max(1, round(float(sae.encode(read).l0().mean())))

    def _x(self, counts_bos: bool) -> Tensor:
        return self._samples[self.site].counted(counts_bos).to(self.device)

    def _generator(self) -> torch.Generator:
        """Return the site's random generator, on the CPU: the same draws for every device."""
        (state,) = np.random.SeedSequence([self.seed, self.site.layer]).generate_state(1)
        return torch.Generator().manual_seed(int(state))


def bag_of_names(tokenised: TokenisedMentions) -> SparseRows:
    """Return the token counts of each mention's name: `[mentions, distinct tokens of all names]`."""
    spans = [ids[a : b + 1] for ids, a, b in zip(tokenised.ids, tokenised.first, tokenised.last, strict=True)]
    mention = np.repeat(np.arange(len(spans)), [len(span) for span in spans])
    tokens, col = np.unique(np.concatenate(spans), return_inverse=True)
    cells, counts = np.unique(mention * len(tokens) + col, return_counts=True)
    crow = np.searchsorted(cells, np.arange(len(spans) + 1) * len(tokens))
    return SparseRows(
        crow=torch.from_numpy(crow),
        col=torch.from_numpy(cells % len(tokens)),
        value=torch.from_numpy(counts).float(),
        n_cols=len(tokens),
    )
