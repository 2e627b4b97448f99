"""Check on a few hundred tokens whether an SAE fits the hook point where it is used.

    model = info.load(alternative_sites(info.n_layers, widths, info.widths), device, dtype)
    check = Preflight.sample(model, info, tokenised, seed=0)
    check.examine(sae, site, counts_bos=False).problem()        # one line, or None

A wrong layer or hook point, a missing normalisation, scaled inputs, a transposed decoder, or texts without the BOS of
the training give plausible but wrong numbers. The preflight therefore also evaluates the SAE at other sites and with
other settings. If it explains far more variance there than as configured, it was probably trained there. The measure is
the fraction of variance unexplained (FVU) on the same tokens, without BOS and attention sinks: a few tokens with a
hundred times the usual norm would dominate the variance, and they differ from text to text.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from delta_selectivity.errors import RequestError
from delta_selectivity.models.checks import ADDED
from delta_selectivity.models.language_model import ActivationSource, ModelInfo, Site
from delta_selectivity.probing.selectivity import OUTLIER
from delta_selectivity.run.calibration import SiteSample, Tokens, calibrate, draw_tokens
from delta_selectivity.run.reconstruction import SiteScale
from delta_selectivity.run.token_sample import seed_key
from delta_selectivity.saes import InputNorm, LinearCoder, Sae
from delta_selectivity.tasks import TokenisedMentions

log = logging.getLogger(__name__)

N_TOKENS = 512
N_TEXTS = 64
"""Texts from which the tokens are drawn; fewer if they are long: as many as have `READ_TOKENS` tokens."""
READ_TOKENS = 4 * N_TOKENS
MIN_TOKENS = 100
"""Minimum sample for a verdict: a few short texts have too little variance."""

STOP_RATIO = 0.8
"""Stop the run if an alternative has less than this share of the FVU."""
WARN_RATIO = 0.95
"""Warn if an alternative has less than this share of the FVU."""
MAX_FVU = 0.5
"""Maximum FVU of an alternative: an SAE that fits nowhere still fits some sites slightly better than others."""
GOOD_FVU = 0.01
"""Do not try alternatives if the FVU is below this."""
L0_FACTOR = 2
"""Warn if the mean L0 differs from the config's by more than this."""
SAME_FVU = 1.02
"""Normalisations whose FVUs differ by less than this factor are reported together."""
MIN_ROWS = 128
"""Least tokens of each alternative that are evaluated before those that are already too bad are dropped."""
TOGETHER = 8
"""Alternatives that are evaluated together, so that memory does not grow with the layers of the model."""
BOS_ERROR = 3.0
"""BOS has the same vector in every text, so an SAE trained on it reconstructs it well. If its squared error there is
more than this many times that of an ordinary token, the SAE was trained without BOS."""

PLACES = ("resid_post", "mlp_out", "attn_out", "mlp_in", "attn_in")
"""Alternative sites of an SAE in its layer."""
NORMALIZED = {"mlp_in": "mlp_normalized", "attn_in": "attn_normalized"}
NORMALIZED |= {bare: full for full, bare in NORMALIZED.items()}
"""Inputs that SAEs at a site after a norm were trained on: without the norm's weight and bias, or with them."""
SETTINGS = {
    "none": "normalize_activations: none",
    "centre": "model_from_pretrained_kwargs: {center_writing_weights: true}",
}
"""SAE Lens config entry of an input norm, if it is not `normalize_activations: <norm>`."""
SCALES = (1 / 64, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 2.0, 4.0, 8.0, 16.0, 64.0)


@dataclass(frozen=True)
class Alternative:
    """The fit with a setting that differs from the SAE's config and the command line."""

    what: str  # "at layer 4", "with layer_norm inputs", ...
    fix: str  # the recommended action
    fvu: float
    configured_fvu: float  # FVU as configured, on the same tokens

    @property
    def ratio(self) -> float:
        """The alternative's FVU relative to the configured one; below 1, the alternative fits better."""
        return self.fvu / self.configured_fvu if self.configured_fvu > 0 else float("inf")


@dataclass(frozen=True)
class Fit:
    """How well an SAE fits its site."""

    name: str
    site: Site
    n_tokens: int
    fvu: float
    l0: float  # mean latents per token
    promised_l0: float | None  # from its config, if given
    norm: float  # mean Euclidean norm of its input
    alternatives: tuple[Alternative, ...]  # those that may fit better, best first

    @property
    def best(self) -> Alternative | None:
        """The best alternative, if it is better than the configuration and has a low FVU."""
        first = self.alternatives[0] if self.alternatives else None
        return first if first is not None and first.ratio < WARN_RATIO and first.fvu < MAX_FVU else None

    @property
    def is_misfit(self) -> bool:
        """Whether an alternative fits so much better that the run must stop."""
        return self.n_tokens >= MIN_TOKENS and self.best is not None and self.best.ratio < STOP_RATIO

    def problem(self) -> str | None:
        """Return a one-line warning for the user, or None. The run itself warns of a high FVU."""
        if self.n_tokens < MIN_TOKENS:
            return None
        where = f"{self.name}, layer {self.site.layer}, {self.site.hookpoint}"
        if self.best is not None:
            far = " far" if self.is_misfit else ""
            fvus = f"FVU {self.best.fvu:.3g} instead of {self.best.configured_fvu:.3g}"
            return f"{where}: fits{far} better {self.best.what} ({fvus}): {self.best.fix}"
        if self.promised_l0 is not None and not 1 / L0_FACTOR < self.l0 / self.promised_l0 < L0_FACTOR:
            return f"{where}: mean L0 is {self.l0:.1f}, but its config says {self.promised_l0:g}"
        return None


def alternative_sites(
    n_layers: int,
    widths: Mapping[Site, int],
    find_widths: Callable[[Collection[Site]], Mapping[Site, int]],
    everywhere: bool = False,
    modules: Mapping[str, str] | None = None,
    sums: bool = True,
) -> set[Site]:
    """Return the sites in `widths` and alternative sites of their SAEs.

    Alternatives are the same hook point in other layers, up to one beyond the last, and other hook points in the same
    layers; with `everywhere`, all hook points of all layers. If the model lacks one of them, there are no alternatives.

    modules: from `ModelInfo.names_of_modules`. In some models, the output of an MLP is not what it adds to the stream.
    sums: whether to include `mlp_out` and `attn_out`, which models that scale them do not have.
    """
    places = [place for place in PLACES if sums or place not in ADDED]
    places += [path for path, name in (modules or {}).items() if path == name]
    n_tried = n_layers if everywhere else min(max(site.layer for site in widths) + 2, n_layers)
    tried = {Site(layer, site.hookpoint) for site in widths for layer in range(n_tried)}
    own_layers = range(n_tried) if everywhere else {site.layer for site in widths}
    tried |= {Site(layer, place) for layer in own_layers for place in places}
    tried |= {Site(site.layer, NORMALIZED[site.hookpoint]) for site in widths if site.hookpoint in NORMALIZED}
    try:
        found = find_widths(tried)
    except RequestError as error:
        log.info("other sites are not tried: %s", error)
        return set(widths)
    return {site for site in tried if found[site] in set(widths.values())} | widths.keys()


@dataclass(frozen=True)
class Preflight:
    """Activations of a few texts, for checking SAEs on them."""

    samples: Mapping[Site, SiteSample]  # the same tokens at every site
    other_bos: Mapping[Site, SiteSample]  # the same tokens in texts with BOS if `samples` are without, and the reverse

    @classmethod
    def sample(
        cls,
        model: ActivationSource,
        info: ModelInfo,
        tokenised: TokenisedMentions,
        seed: int,
    ) -> Preflight:
        """Sample activations of texts drawn by seed. Raises ArithmeticError if an activation is NaN or Inf."""
        texts = tokenised.select(_draw(tokenised, seed))
        drawn = draw_tokens(texts, seed, N_TOKENS)
        samples = calibrate(model, texts, "last", drawn)
        bos = info.opening_token_id
        if bos is None or (info.n_embeddings is not None and bos >= info.n_embeddings):
            return cls(samples, {})
        other = texts.with_other_bos(bos, info.max_length)
        return cls(samples, calibrate(model, other, "last", _same_tokens(drawn, texts, other)))

    def scales(self) -> dict[Site, SiteScale]:
        """Return the scale of the activations at each site."""
        rows = {site: sample.counted(False) for site, sample in self.samples.items()}
        return {site: SiteScale.of(x) for site, x in rows.items() if len(x)}

    def examine(self, sae: Sae, site: Site, counts_bos: bool) -> Fit:
        """Evaluate an SAE at its site, at other sites and with other settings.

        counts_bos: whether BOS counts in its whole-text figures.
        """
        read, x = _ordinary_tokens(sae, site, self.samples)
        codes = sae.encode(read)
        fvu = _fvu(x, sae.decode(codes, read))
        found: list[Alternative] = []
        if fvu > GOOD_FVU:
            most = SAME_FVU * min(WARN_RATIO * fvu, MAX_FVU)  # normalisations that fit as well as the best count too
            ways = itertools.chain(
                _at_other_sites(sae, site, self.samples),
                _with_other_scales(sae, read, x),
                _transposed(sae, read, x),
                _with_other_bos(sae, site, self),
            )
            while some := list(itertools.islice(ways, TOGETHER)):
                fvus = _fvus([way.use for way in some], most)
                found += [Alternative(way.what, way.fix, tried, fvu) for way, tried in zip(some, fvus, strict=True)]
            found += _with_another_norm(sae, read, x, fvu, most)
        if counts_bos:
            found += _without_bos(sae, site, self.samples)
        l0, norm = float(codes.l0().mean()), float(read.norm(dim=1).mean())
        found = [alternative for alternative in found if alternative.fvu < math.inf]
        best_first = tuple(sorted(found, key=lambda alternative: alternative.ratio))
        return Fit(sae.name, site, len(x), fvu, l0, sae.promised_l0, norm, best_first)

    def fvu(self, sae: Sae, site: Site) -> float | None:
        """Return an SAE's FVU at any site, without BOS; None if the widths differ or the site was not sampled."""
        use = _use_at(sae, site, self.samples)
        return None if use is None else _fvus([use])[0]


def _draw(tokenised: TokenisedMentions, seed: int) -> npt.NDArray[np.int64]:
    """Draw texts by the hash of seed and ids; if texts are added, most draws stay the same, so the cache applies."""
    hashes = [blake2b(ids.tobytes(), key=seed_key(seed)).digest() for ids in tokenised.ids]
    drawn = sorted(range(len(hashes)), key=hashes.__getitem__)[:N_TEXTS]
    n_tokens = np.cumsum([len(tokenised.ids[i]) for i in drawn])
    return np.array(drawn[: np.searchsorted(n_tokens, READ_TOKENS) + 1], dtype=np.int64)


def _same_tokens(drawn: Tokens, texts: TokenisedMentions, other: TokenisedMentions) -> Tokens:
    """Return the drawn tokens in `other`, the same texts with another beginning; without BOS and what it lacks."""
    shift = np.array([len(after) - len(before) for before, after in zip(texts.ids, other.ids, strict=True)])
    place = drawn.place + shift[drawn.text]
    there = place >= int(other.has_bos)
    return Tokens(drawn.text[there], place[there])


class _Use(NamedTuple):
    """An SAE and tokens to evaluate it on, on its device."""

    sae: Sae
    read: Tensor  # [tokens, d_in], its input
    x: Tensor  # [tokens, d_out], what it is to reconstruct


class _Way(NamedTuple):
    """An alternative that is not evaluated yet."""

    what: str
    fix: str
    use: _Use


def _use_at(sae: Sae, site: Site, samples: Mapping[Site, SiteSample]) -> _Use | None:
    """Return the SAE with a site's ordinary tokens; None if the site was not sampled or has another width."""
    read_at = site.read_by(sae.input_hookpoint)
    if not {site, read_at} <= samples.keys():
        return None
    if samples[read_at].x.shape[1] != sae.d_in or samples[site].x.shape[1] != sae.d_out:
        return None
    return _Use(sae, *_ordinary_tokens(sae, site, samples))


def _at_other_sites(sae: Sae, site: Site, samples: Mapping[Site, SiteSample]) -> Iterator[_Way]:
    """Yield other layers and other hook points; for a transcoder, other hook points of its input."""
    for other in samples:
        if other.hookpoint == site.hookpoint and other != site:
            what, tried, at = f"layer {other.layer}", sae, other
        elif other.layer == site.layer and other != site.read_by(sae.input_hookpoint):
            transcodes = sae.input_hookpoint is not None
            what, at = other.hookpoint, site if transcodes else other
            tried = replace(sae, input_hookpoint=other.hookpoint) if transcodes else sae
        else:
            continue
        use = _use_at(tried, at, samples)
        if use is not None:
            yield _Way(f"at {what}", f"does it belong to {what}?", use)


def _with_other_scales(sae: Sae, read: Tensor, x: Tensor) -> Iterator[_Way]:
    """Yield other input scales at the same site."""
    if sae.input_norm not in ("none", "centre") or sae.input_hookpoint is not None:
        return
    for scale in (*SCALES, sae.d_in**0.5 / float(read.norm(dim=1).mean())):
        what = f"with inputs multiplied by {scale:.4g}"
        fix = "its config should say normalize_activations: 'expected_average_only_in', with this scaling_factor"
        yield _Way(what, fix, _Use(sae, read * scale, x * scale))  # the FVU of x, since both are scaled


def _transposed(sae: Sae, read: Tensor, x: Tensor) -> Iterator[_Way]:
    """Yield transposed weights at the same site, if they are square."""
    if isinstance(sae.coder, LinearCoder) and sae.d_in == sae.d_sae and sae.input_hookpoint is None:
        for name in ("W_dec", "W_enc"):
            coder = replace(sae.coder, **{name: getattr(sae.coder, name).T.contiguous()})
            yield _Way(f"with {name} transposed", f"store {name} transposed", _Use(replace(sae, coder=coder), read, x))


def _with_other_bos(sae: Sae, site: Site, check: Preflight) -> Iterator[_Way]:
    use = _use_at(sae, site, check.other_bos)
    if use is None:
        return
    if bool(check.samples[site].bos.any()):
        yield _Way("on texts without BOS", "set `bos` none", use)
    else:
        yield _Way("on texts that begin with BOS", "set `bos` excluded", use)


def _with_another_norm(sae: Sae, read: Tensor, x: Tensor, fvu: float, most: float) -> Iterator[Alternative]:
    """Yield the input normalisations that fit best at the same site, as one alternative."""
    kinds = [kind for kind in get_args(InputNorm) if kind != sae.input_norm]
    fvus = _fvus([_Use(replace(sae, input_norm=kind), read, x) for kind in kinds], most)
    best = min(fvus)
    equal = [kind for kind, found in zip(kinds, fvus, strict=True) if found <= SAME_FVU * best]
    simplest = [kind for kind in equal if "," not in kind] or equal  # without combinations, if possible
    entries = " or ".join(" and ".join(map(_config_entry, kind.split(", "))) for kind in simplest)
    yield Alternative("with another input normalisation", f"its config should say {entries}", best, fvu)


def _config_entry(norm: str) -> str:
    return SETTINGS.get(norm, f"normalize_activations: {norm}")


def _without_bos(sae: Sae, site: Site, samples: Mapping[Site, SiteSample]) -> Iterator[Alternative]:
    """Yield an alternative if BOS counts in the figures but the SAE was trained without it."""
    sample, read = samples[site], samples[site.read_by(sae.input_hookpoint)]
    if not bool(sample.bos.any()):
        return
    recon = _reconstruct(sae, read.x.to(sae.device))
    x = sample.x.double()
    error, ordinary = (x - recon.cpu()).square().sum(dim=1), x[~sample.bos]
    variance = (ordinary - ordinary.mean(dim=0)).square().sum(dim=1).mean()
    at_bos, elsewhere = (float(error[which].mean() / variance) for which in (sample.bos, ~sample.bos))
    if at_bos > BOS_ERROR * elsewhere:
        yield Alternative("without BOS, on which it was not trained", "set `bos` excluded", elsewhere, at_bos)


def _ordinary_tokens(sae: Sae, site: Site, samples: Mapping[Site, SiteSample]) -> tuple[Tensor, Tensor]:
    """Return the SAE's input and target at ordinary tokens, not BOS or attention sinks: `[tokens, d]` on its device.

    A sink's norm is above `OUTLIER` times the median, at the SAE's input or at the site.
    """
    places = [samples[place].counted(False) for place in (site.read_by(sae.input_hookpoint), site)]
    if len(places[0]):
        norms = torch.stack([torch.linalg.vector_norm(x, dim=1) for x in places])
        ordinary = (norms <= OUTLIER * norms.median(dim=1, keepdim=True).values).all(dim=0)
        places = [x[ordinary] for x in places]
    read, x = (x.to(sae.device) for x in places)
    return read, x


def _reconstruct(sae: Sae, read: Tensor) -> Tensor:
    return sae.decode(sae.encode(read), read)


def _fvus(uses: Sequence[_Use], most: float = math.inf) -> list[float]:
    """Return the FVU of each use; inf where it exceeds `most`, without reading all of its tokens if few show it.

    Neighbours with the same SAE are encoded together.
    """
    found: list[float] = []
    for _, same in itertools.groupby(uses, key=lambda use: id(use.sae)):
        found += _fvus_of_one(list(same), most)
    return found


def _fvus_of_one(uses: Sequence[_Use], most: float) -> list[float]:
    xs = [use.x.cpu().double() for use in uses]
    deviations, errors = [_deviation(x) for x in xs], [0.0] * len(uses)
    left, done = list(range(len(uses))), 0
    while any(len(xs[i]) > done for i in left):
        rows = slice(done, done + max(MIN_ROWS, N_TOKENS // len(left)))
        reads = [uses[i].read[rows] for i in left]
        recons = _reconstruct(uses[0].sae, torch.cat(reads)).split([len(read) for read in reads])
        for i, recon in zip(left, recons, strict=True):
            errors[i] += _error(xs[i][rows], recon)
        left, done = [i for i in left if errors[i] <= most * deviations[i]], rows.stop
    return [errors[i] / deviations[i] if i in left else math.inf for i in range(len(uses))]


def _fvu(x: Tensor, recon: Tensor) -> float:
    """Return squared error over squared deviation from the mean; 0 if both are 0."""
    x = x.cpu().double()  # MPS lacks float64
    return _error(x, recon) / _deviation(x)


def _error(x: Tensor, recon: Tensor) -> float:
    return float((x - recon.cpu().double()).square().sum())


def _deviation(x: Tensor) -> float:
    return max(float((x - x.mean(dim=0)).square().sum()), torch.finfo(torch.float64).tiny)
