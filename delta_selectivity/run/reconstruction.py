"""Streaming reconstruction figures: MSE, FVU, cosine, L0, L1, dead latents.

    sums = ReconstructionSums.empty(d, d_sae, device)      # d: width of the activations
    sums.add_whole(x, recon, latents)        # every real token of the texts, batch by batch
    sums.add_probed(x, recon, latents)       # the probed positions
    sums.figures().fvu_whole

Nothing that adds waits for the device. `docs/numbers.md` defines every figure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Latents(Protocol):
    """What is needed of sparse codes; ``saes.SparseRows`` has it."""

    @property
    def col(self) -> Tensor:
        """Latent numbers ``[nnz]``."""
        ...

    @property
    def value(self) -> Tensor:
        """Latent activations ``[nnz]``, some may be zero."""
        ...


@dataclass(frozen=True)
class Reconstruction:
    """The figures of one SAE on one set of texts. None: no rows, or no variance to divide by."""

    mse_pos: float | None
    """Mean over probed rows and coordinates of the squared error."""
    mse_whole: float | None
    """The same over every token of the texts."""
    fvu_pos: float | None
    """Squared error over squared deviation from the mean of all probed rows."""
    fvu_whole: float | None
    """The same over every token of the texts."""
    cosine: float | None
    """Mean cosine of x and its reconstruction at probed positions."""
    l0: float | None
    """Mean number of non-zero latents at probed positions."""
    l1: float | None
    """Mean sum of absolute latents at probed positions."""
    dead: float | None
    """Share of latents that fired on no token of the texts."""
    n_probed: int
    n_tokens: int


@dataclass
class ReconstructionSums:
    """Numerators and denominators of `Reconstruction`, on one device, in float64."""

    whole: _ErrorSums
    probed: _ErrorSums
    others: Tensor
    """Of probed rows the cosines, the latents that are not zero, and the absolute latents, summed. float64 ``[3]``."""
    fired: Tensor
    """Tokens on which each latent fired. int64 ``[d_sae]``."""

    @classmethod
    def empty(cls, d: int, d_sae: int, device: torch.device | str) -> ReconstructionSums:
        """No rows; d: width of the activations."""
        fired, others = torch.zeros(d_sae, dtype=torch.int64, device=device), _zeros(3, device)
        return cls(_ErrorSums.empty(d, device), _ErrorSums.empty(d, device), others, fired)

    def add_whole(self, x: Tensor, recon: Tensor, latents: Latents) -> Tensor:
        """Every real token of some texts: x and recon ``[tokens, d]``, and the tokens' latents.

        Returns the squared error of each token, float32 ``[tokens]``: not finite where one of the two is not.
        """
        new, errors = _ErrorSums.of(x, recon)
        self.whole = self.whole.merge(new)
        _count_fired(latents, self.fired)
        return errors

    def add_probed(self, x: Tensor, recon: Tensor, latents: Latents) -> None:
        """Probed positions: x and recon ``[rows, d]``, and their latents."""
        new, _ = _ErrorSums.of(x, recon)
        self.probed = self.probed.merge(new)
        cosine = F.cosine_similarity(x.float(), recon.float(), dim=1).sum(dtype=torch.float64)
        l1 = torch.linalg.vector_norm(latents.value, ord=1, dtype=torch.float64)
        self.others = self.others + torch.stack([cosine, latents.value.count_nonzero().double(), l1])

    def merge(self, other: ReconstructionSums) -> ReconstructionSums:
        """The sums over both sets of rows, on this one's device."""
        other = other.to(self.fired.device)
        return ReconstructionSums(
            whole=self.whole.merge(other.whole),
            probed=self.probed.merge(other.probed),
            others=self.others + other.others,
            fired=self.fired + other.fired,
        )

    def to(self, device: torch.device | str) -> ReconstructionSums:
        """The same sums on another device; these if it is theirs."""
        if self.fired.device == torch.device(device):
            return self
        others, fired = self.others.to(device), self.fired.to(device)
        return ReconstructionSums(self.whole.to(device), self.probed.to(device), others, fired)

    def figures(self) -> Reconstruction:
        """Divide. This waits for the device."""
        n_probed, n_tokens = self.probed.n, self.whole.n
        n_dead = int((self.fired == 0).sum())
        cosine, l0, l1 = self.others.tolist()
        return Reconstruction(
            mse_pos=self.probed.mse(),
            mse_whole=self.whole.mse(),
            fvu_pos=self.probed.fvu(),
            fvu_whole=self.whole.fvu(),
            cosine=_ratio(cosine, n_probed),
            l0=_ratio(l0, n_probed),
            l1=_ratio(l1, n_probed),
            dead=n_dead / self.fired.numel() if n_tokens else None,
            n_probed=n_probed,
            n_tokens=n_tokens,
        )


@dataclass(frozen=True)
class _ErrorSums:
    """Squared error and squared deviation of n rows; sets of rows merge as in Chan, Golub & LeVeque (1983)."""

    n: int
    mean: Tensor
    """Of x. float64 ``[d]``."""
    sums: Tensor
    """Squared errors, and squared distances of x from ``mean``, over rows and coordinates. float64 ``[2]``."""

    @classmethod
    def empty(cls, d: int, device: torch.device | str) -> _ErrorSums:
        """No rows."""
        zeros = _zeros(2, device)
        return cls(0, zeros[0].expand(d), zeros)

    @classmethod
    def of(cls, x: Tensor, recon: Tensor) -> tuple[_ErrorSums, Tensor]:
        """x and recon ``[rows, d]``; also each row's squared error, float32 ``[rows]``.

        Residual streams have dimensions whose mean is 1e3 times their spread, so deviations are taken from the
        float32 mean, which is near enough for the differences to be exact, and corrected for its rounding.
        """
        x, recon = x.float(), recon.float()
        if len(x) == 0:
            return cls.empty(x.shape[1], x.device), x.new_empty(0)
        errors, mean, sums = _compare_on_cpu(x, recon) if x.device.type == "cpu" else _compare(x, recon)
        return cls(len(x), mean, sums), errors

    def merge(self, other: _ErrorSums) -> _ErrorSums:
        """Both sets of rows."""
        if 0 in (self.n, other.n):
            return self if other.n == 0 else other
        merge = _merge_on_cpu if self.mean.device.type == "cpu" else _merge
        return _ErrorSums(self.n + other.n, *merge(self, other))

    def to(self, device: torch.device | str) -> _ErrorSums:
        """The same sums on another device."""
        return _ErrorSums(self.n, self.mean.to(device), self.sums.to(device))

    def mse(self) -> float | None:
        """Mean over rows and coordinates."""
        return _ratio(self.sums[0].item(), self.n * self.mean.numel())

    def fvu(self) -> float | None:
        """Fraction of variance unexplained."""
        return _ratio(*self.sums.tolist())


def _compare(x: Tensor, recon: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `error_kernels.compare`. Float32 along each row, float64 over the rows: no float64 copy of the matrix."""
    near_mean = x.mean(dim=0)
    offsets = x - near_mean
    rounding = offsets.mean(dim=0).double()
    squares = torch.linalg.vector_norm(offsets, dim=1).double().square()
    deviation = squares.sum() - len(x) * rounding.square().sum()
    errors = torch.linalg.vector_norm(x - recon, dim=1).square()
    sums = torch.stack([errors.sum(dtype=torch.float64), deviation.clamp(min=0)])
    return errors, near_mean.double() + rounding, sums


def _compare_on_cpu(x: Tensor, recon: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    from delta_selectivity.run.error_kernels import compare  # here: Numba takes a while to load

    errors, mean, sums = map(torch.from_numpy, compare(x.contiguous().numpy(), recon.contiguous().numpy()))
    return errors, mean, sums


def _merge(ours: _ErrorSums, theirs: _ErrorSums) -> tuple[Tensor, Tensor]:
    """As `error_kernels.merge`."""
    apart, share = theirs.mean - ours.mean, theirs.n / (ours.n + theirs.n)
    sums = ours.sums + theirs.sums
    sums[1] += apart.square().sum() * (ours.n * share)
    return ours.mean + apart * share, sums


def _merge_on_cpu(ours: _ErrorSums, theirs: _ErrorSums) -> tuple[Tensor, Tensor]:
    from delta_selectivity.run.error_kernels import merge

    both = [(part.n, part.mean.numpy(), part.sums.numpy()) for part in (ours, theirs)]
    mean, sums = map(torch.from_numpy, merge(*both[0], *both[1]))
    return mean, sums


def _count_fired(latents: Latents, fired: Tensor) -> None:
    """Add to each latent's count its entries that are not zero."""
    if fired.device.type == "cpu":
        from delta_selectivity.run.error_kernels import count_fired

        count_fired(latents.col.contiguous().numpy(), latents.value.contiguous().numpy(), fired.numpy())
    else:
        fired.index_add_(0, latents.col, (latents.value != 0).to(fired.dtype))


def _zeros(n: int, device: torch.device | str) -> Tensor:
    return torch.zeros(n, dtype=torch.float64, device=device)


def _ratio(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator else None
