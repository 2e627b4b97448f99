"""Streaming reconstruction figures: MSE, FVU, cosine, L0, L1, dead latents.

    sums = ReconstructionSums.empty(d, d_sae, device)              # d: width of the activations
    sums.probed.add(x, recon, latents)                             # the probed positions
    sums.whole[limit].add(x, recon, latents, tokens, n_counted)    # tokens of whole texts, batch by batch
    sums.figures(limit).fvu_whole

Adding does not wait for the device. `docs/numbers.md` defines every figure.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from delta_selectivity.probing.selectivity import OUTLIER

ALL = 2**64
"""The limit of a token sample that takes every token (see `token_sample`)."""


class Latents(Protocol):
    """The part of `saes.SparseRows` that is used here."""

    @property
    def crow(self) -> Tensor:
        """The start of each row's latents, and the end of the last ``[rows + 1]``."""
        ...

    @property
    def col(self) -> Tensor:
        """Latent indices ``[nnz]``."""
        ...

    @property
    def value(self) -> Tensor:
        """Latent activations ``[nnz]``; some may be zero."""
        ...


class SiteScale(NamedTuple):
    """Location and scale of a site's activations, from a few hundred tokens."""

    mean: Tensor  # float32 [d]
    norm_limit: float  # `OUTLIER` times the median of their Euclidean norms

    @classmethod
    def of(cls, x: Tensor) -> SiteScale:
        """Estimate the scale from x ``[tokens, d]``."""
        return cls(x.mean(dim=0), OUTLIER * float(torch.linalg.vector_norm(x, dim=1).median()))


class TokenFacts(NamedTuple):
    """Facts about tokens that do not depend on an SAE, on the device of the activations."""

    number: Tensor  # int64 [tokens], unique number of the token
    distance: Tensor  # float32 [tokens], squared distance of x from the approximate mean
    outlying: Tensor | None = None  # bool [tokens], whether the norm of x exceeds the limit; None: for no token

    @classmethod
    def of(cls, x: Tensor, number: Tensor, scale: SiteScale | None) -> TokenFacts:
        """Compute the facts of x ``[tokens, d]`` without waiting for the device.

        Without a scale, distances are from the mean of x, and there are no outliers.
        """
        centre = x.mean(dim=0) if scale is None else scale.mean
        distance = torch.linalg.vector_norm(x - centre, dim=1).square()
        if scale is None:
            return cls(number, distance)
        outlying = torch.linalg.vector_norm(x, dim=1) > scale.norm_limit
        has_none = x.device.type == "cpu" and not bool(outlying.any())
        return cls(number, distance, None if has_none else outlying)


@dataclass(frozen=True)
class Reconstruction:
    """The reconstruction figures of one SAE on one set of texts. None: no rows, or no variance to divide by."""

    mse_pos: float | None  # mean over probed rows and coordinates of the squared error
    mse_whole: float | None  # the same over the tokens of whole texts
    mse_whole_se: float | None  # its standard error as an estimate for all tokens of the texts; 0 where all were taken
    fvu_pos: float | None  # squared error over squared deviation from the mean of all probed rows
    fvu_whole: float | None  # the same over the tokens of whole texts
    fvu_whole_se: float | None  # its standard error, as for `mse_whole`
    fvu_ordinary: float | None  # `fvu_whole` without the tokens whose norm is above 10 times the median
    outliers: float | None  # share of those tokens
    cosine: float | None  # mean cosine of x and its reconstruction at probed positions
    l0: float | None  # mean number of non-zero latents at probed positions
    l1: float | None  # mean sum of absolute latents at probed positions
    dead: float | None  # share of latents that fired on none of the `n_tokens`
    dead_se: float | None  # its standard error over samples of `n_tokens` tokens; 0 where all were taken
    n_probed: int  # probed rows
    n_tokens: int  # tokens in the whole-text figures
    n_tokens_all: int  # tokens from which those were drawn


@dataclass(frozen=True)
class ReconstructionSums:
    """Numerators and denominators of `Reconstruction`, on one device, in float64."""

    probed: ProbedSums
    whole: Mapping[int, WholeSums]  # by the limit of their token sample

    @classmethod
    def empty(
        cls, d: int, d_sae: int, device: torch.device | str, limits: Collection[int] = (ALL,)
    ) -> ReconstructionSums:
        """Return sums over no rows; d: width of the activations."""
        return cls(ProbedSums.empty(d, device), {limit: WholeSums.empty(d, d_sae, device) for limit in limits})

    def merge(self, other: ReconstructionSums) -> ReconstructionSums:
        """Return the sums over both sets of rows, on this one's device. Both must have the same limits."""
        whole = {limit: sums.merge(other.whole[limit]) for limit, sums in self.whole.items()}
        return ReconstructionSums(self.probed.merge(other.probed), whole)

    def restricted_to(self, limit: int) -> ReconstructionSums:
        """Return the sums for one of the limits."""
        return ReconstructionSums(self.probed, {limit: self.whole[limit]})

    def to(self, device: torch.device | str) -> ReconstructionSums:
        """Return the sums on another device."""
        return ReconstructionSums(
            self.probed.to(device), {limit: sums.to(device) for limit, sums in self.whole.items()}
        )

    def figures(self, limit: int = ALL) -> Reconstruction:
        """Return the figures, as ratios of the sums. Waits for the device."""
        probed, whole = self.probed.to("cpu"), self.whole[limit].to("cpu")
        errors = whole.ordinary.merge(whole.outliers)
        n_probed, n_tokens = int(probed.errors.n), int(errors.n)
        mse, fvu = errors.mse(), errors.fvu()
        mse_se, fvu_se, dead_se = _standard_errors(whole, errors, mse, fvu)
        cosine, l0, l1 = probed.others.tolist()
        return Reconstruction(
            mse_pos=probed.errors.mse(),
            mse_whole=mse,
            mse_whole_se=mse_se,
            fvu_pos=probed.errors.fvu(),
            fvu_whole=fvu,
            fvu_whole_se=fvu_se,
            fvu_ordinary=whole.ordinary.fvu(),
            outliers=_ratio(float(whole.outliers.n), n_tokens),
            cosine=_ratio(cosine, n_probed),
            l0=_ratio(l0, n_probed),
            l1=_ratio(l1, n_probed),
            dead=float((whole.fired[0] == 0).double().mean()) if n_tokens else None,
            dead_se=dead_se,
            n_probed=n_probed,
            n_tokens=n_tokens,
            n_tokens_all=whole.n_all,
        )


@dataclass
class ProbedSums:
    """Sums over the probed positions."""

    errors: _ErrorSums
    others: Tensor  # float64 [3], sums of the cosines, the non-zero latents and the absolute latents

    @classmethod
    def empty(cls, d: int, device: torch.device | str) -> ProbedSums:
        """Return sums over no rows."""
        return cls(_ErrorSums.empty(d, device), _zeros(3, device=device))

    def add(self, x: Tensor, recon: Tensor, latents: Latents) -> None:
        """Add x and recon ``[rows, d]``, and their latents."""
        new, _ = _ErrorSums.of(x, recon)
        self.errors = self.errors.merge(new)
        cosine = F.cosine_similarity(x.float(), recon.float(), dim=1).sum(dtype=torch.float64)
        l1 = torch.linalg.vector_norm(latents.value, ord=1, dtype=torch.float64)
        self.others = self.others + torch.stack([cosine, latents.value.count_nonzero().double(), l1])

    def merge(self, other: ProbedSums) -> ProbedSums:
        """Return the sums over both sets of rows, on this one's device."""
        other = other.to(self.others.device)
        return ProbedSums(self.errors.merge(other.errors), self.others + other.others)

    def to(self, device: torch.device | str) -> ProbedSums:
        """Return the sums on another device."""
        return ProbedSums(self.errors.to(device), self.others.to(device))


@dataclass
class WholeSums:
    """Sums over tokens of whole texts.

    For a latent that fired once, `fired[1]` is the number of that token.
    """

    ordinary: _ErrorSums
    outliers: _ErrorSums  # tokens beyond the norm limit
    products: Tensor  # float64 [4], sums of s, ee, es and ss over tokens with squared error e and squared distance s
    fired: Tensor  # int64 [2, d_sae], per latent: the count of tokens on which it fired, and the sum of their numbers
    n_all: int  # tokens from which these were drawn

    @classmethod
    def empty(cls, d: int, d_sae: int, device: torch.device | str) -> WholeSums:
        """Return sums over no tokens."""
        errors, none = _ErrorSums.empty(d, device), torch.zeros(2, d_sae, dtype=torch.int64, device=device)
        return cls(errors, errors, _zeros(4, device=device), none, 0)

    def add(
        self,
        x: Tensor,
        recon: Tensor,
        latents: Latents,
        tokens: TokenFacts,
        n_counted: int,
        chosen: Tensor | None = None,
    ) -> Tensor:
        """Add x and recon ``[tokens, d]`` and their latents, or the chosen ones alone, of ``n_counted`` counted tokens.

        chosen: bool ``[tokens]``; None: all. Returns the squared error of each token, float32 ``[tokens]``: 0 for those
        that were not chosen, otherwise not finite if x or recon is not.
        """
        near, far = chosen, tokens.outlying
        if far is not None:
            near = far.logical_not()
            if chosen is not None:
                near, far = near & chosen, far & chosen
        new, errors = _ErrorSums.of(x, recon, near)
        self.ordinary = self.ordinary.merge(new)
        if far is not None:
            outliers, far_errors = _ErrorSums.of(x, recon, far)
            self.outliers, errors = self.outliers.merge(outliers), errors + far_errors
        e, s = errors.double(), tokens.distance.double()
        if chosen is not None:
            s = torch.where(chosen, s, 0)
        self.products = self.products + torch.stack([s.sum(), e @ e, e @ s, s @ s])
        _add_fired(tokens.number, latents, self.fired, chosen)
        self.n_all += n_counted
        return errors

    def merge(self, other: WholeSums) -> WholeSums:
        """Return the sums over both sets of tokens, on this one's device."""
        other = other.to(self.fired.device)
        return WholeSums(
            self.ordinary.merge(other.ordinary),
            self.outliers.merge(other.outliers),
            self.products + other.products,
            self.fired + other.fired,
            self.n_all + other.n_all,
        )

    def to(self, device: torch.device | str) -> WholeSums:
        """Return the sums on a device; `self` if they already are."""
        if self.fired.device == torch.device(device):
            return self
        return WholeSums(
            self.ordinary.to(device), self.outliers.to(device), self.products.to(device), self.fired.to(device),
            self.n_all,
        )  # fmt: skip


@dataclass(frozen=True)
class _ErrorSums:
    """Squared error and squared deviation of n rows; merged as in Chan, Golub & LeVeque (1983)."""

    n: Tensor  # float64 []
    mean: Tensor  # float64 [d], of x
    sums: Tensor  # float64 [2], squared errors, and squared distances of x from `mean`, over rows and coordinates

    @classmethod
    def empty(cls, d: int, device: torch.device | str) -> _ErrorSums:
        """Return sums over no rows."""
        zeros = _zeros(2, device=device)
        return cls(zeros[0], zeros[0].expand(d), zeros)

    @classmethod
    def of(cls, x: Tensor, recon: Tensor, chosen: Tensor | None = None) -> tuple[_ErrorSums, Tensor]:
        """Return the sums of x and recon ``[rows, d]``, or of their chosen rows (bool ``[rows]``).

        Also returns the squared error of each row, float32 ``[rows]``: 0 for rows that were not chosen.

        Residual streams have dimensions whose mean is 1e3 times their spread. Deviations are therefore computed from
        the float32 mean, which is close enough for the differences to be exact, and then corrected for its rounding.
        """
        x, recon = x.float(), recon.float()
        if len(x) == 0:
            return cls.empty(x.shape[1], x.device), x.new_empty(0)
        compare = _compare_on_cpu if x.device.type == "cpu" else _compare
        n, errors, mean, sums = compare(x, recon, chosen)
        return cls(n, mean, sums), errors

    def merge(self, other: _ErrorSums) -> _ErrorSums:
        """Return the sums over both sets of rows."""
        merge = _merge_on_cpu if self.mean.device.type == "cpu" else _merge
        return _ErrorSums(self.n + other.n, *merge(self, other))

    def to(self, device: torch.device | str) -> _ErrorSums:
        """Return the sums on another device."""
        return _ErrorSums(self.n.to(device), self.mean.to(device), self.sums.to(device))

    def mse(self) -> float | None:
        """Return the mean squared error over rows and coordinates."""
        return _ratio(self.sums[0].item(), self.n.item() * self.mean.numel())

    def fvu(self) -> float | None:
        """Return the fraction of variance unexplained."""
        return _ratio(*self.sums.tolist())


def _compare(x: Tensor, recon: Tensor, chosen: Tensor | None) -> tuple[Tensor, ...]:
    """Compute `_compare_on_cpu` in torch: sums along rows in float32, over rows in float64, with no float64 copy."""
    if chosen is None:
        chosen = torch.ones(len(x), dtype=torch.bool, device=x.device)
    n = chosen.sum(dtype=torch.float64)
    divisor = n.clamp(min=1)
    near_mean = torch.where(chosen[:, None], x, 0).sum(dim=0) / divisor.float()
    offsets = torch.where(chosen[:, None], x - near_mean, 0)
    rounding = offsets.sum(dim=0).double() / divisor
    squares = torch.linalg.vector_norm(offsets, dim=1).double().square()
    deviation = squares.sum() - n * rounding.square().sum()
    errors = torch.where(chosen, torch.linalg.vector_norm(x - recon, dim=1).square(), 0)
    sums = torch.stack([errors.sum(dtype=torch.float64), deviation.clamp(min=0)])
    return n, errors, near_mean.double() + rounding, sums


def _compare_on_cpu(x: Tensor, recon: Tensor, chosen: Tensor | None) -> tuple[Tensor, ...]:
    """Return the number of rows and the results of `error_kernels.compare`."""
    from delta_selectivity.run.error_kernels import compare  # imported here: Numba is slow to load

    rows = _rows(len(x), chosen)
    found = compare(x.contiguous().numpy(), recon.contiguous().numpy(), rows)
    return (torch.tensor(float(len(rows)), dtype=torch.float64), *map(torch.from_numpy, found))


def _rows(n: int, chosen: Tensor | None) -> NDArray[np.int64]:
    """Return the indices of the chosen ones of n rows, of all for None."""
    return np.arange(n) if chosen is None else chosen.numpy().nonzero()[0]


def _merge(ours: _ErrorSums, theirs: _ErrorSums) -> tuple[Tensor, Tensor]:
    """Compute `error_kernels.merge` in torch."""
    difference, share = theirs.mean - ours.mean, theirs.n / (ours.n + theirs.n).clamp(min=1)
    between = difference.square().sum() * (ours.n * share)
    return ours.mean + difference * share, ours.sums + theirs.sums + torch.stack([torch.zeros_like(between), between])


def _merge_on_cpu(ours: _ErrorSums, theirs: _ErrorSums) -> tuple[Tensor, Tensor]:
    if not theirs.n or not ours.n:
        return (theirs.mean, theirs.sums) if theirs.n else (ours.mean, ours.sums)
    from delta_selectivity.run.error_kernels import merge

    both = [(part.n.item(), part.mean.numpy(), part.sums.numpy()) for part in (ours, theirs)]
    mean, sums = map(torch.from_numpy, merge(*both[0], *both[1]))
    return mean, sums


def _add_fired(number: Tensor, latents: Latents, fired: Tensor, chosen: Tensor | None) -> None:
    """Add tokens, or the chosen ones alone, to the counts and sums of the latents that fired on them."""
    if fired.device.type == "cpu":
        from delta_selectivity.run.error_kernels import add_fired

        given = (number, latents.crow, latents.col, latents.value)
        add_fired(_rows(len(number), chosen), *(part.contiguous().numpy() for part in given), fired.numpy())
        return
    counts, size = latents.crow.diff(), len(latents.col)
    fires = (latents.value != 0).long()
    if chosen is not None:
        fires *= chosen.repeat_interleave(counts, output_size=size)
    of_entry = number.repeat_interleave(counts, output_size=size)
    fired.index_add_(1, latents.col, torch.stack([fires, fires * of_entry]))


def _standard_errors(
    whole: WholeSums, errors: _ErrorSums, mse: float | None, fvu: float | None
) -> tuple[float | None, float | None, float | None]:
    """Return standard errors of mse, fvu and the share of dead latents as estimates for all tokens.

    Tokens are sampled independently. The ratios are linearised, with the finite-population correction for the sampled
    share (Cochran 1977, 2.11 and 6.4). For dead latents it is the jackknife: a latent that fired on one token only is
    dead without that token. The jackknife is rather too large than too small (Efron & Stein 1981).
    """
    n, sampled = float(errors.n), 1.0 if not whole.n_all else float(errors.n) / whole.n_all
    if n < 2:
        return None, None, None
    correction = 1 - sampled
    distances, ee, es, ss = whole.products.tolist()

    def of_ratio(ratio: float | None, squares: float, denominator: float) -> float | None:
        """Return a ratio's standard error; squares: sum over tokens of (numerator - ratio x denominator)^2."""
        return None if ratio is None else math.sqrt(correction * n / (n - 1) * max(squares, 0.0)) / denominator

    width = errors.mean.numel()
    variance = float(errors.sums[1])
    scale = variance / distances if distances else 0.0  # distances are from an approximate mean
    mse_se = of_ratio(mse, ee - n * ((mse or 0) * width) ** 2, n * width)
    slope = (fvu or 0) * scale
    fvu_se = of_ratio(fvu, ee - 2 * slope * es + slope**2 * ss, variance)
    once = whole.fired[1][whole.fired[0] == 1].numpy()
    by_token = np.unique_counts(once).counts
    dead_se = math.sqrt(correction * max(np.square(by_token).sum() - len(once) ** 2 / n, 0.0)) / max(
        whole.fired.shape[1], 1
    )
    return mse_se, fvu_se, dead_se


def _zeros(*shape: int, device: torch.device | str) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64, device=device)


def _ratio(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator else None
