"""How well an SAE reconstructs activations: sums and counts that stream, divided once at the end.

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
    """What is needed of sparse codes; ``sae_loader.SparseRows`` has it."""

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
    cosine: Tensor
    l0: Tensor
    l1: Tensor
    fired: Tensor
    """Tokens on which each latent fired. int64 ``[d_sae]``."""

    @classmethod
    def empty(cls, d: int, d_sae: int, device: torch.device | str) -> ReconstructionSums:
        """No rows; d: width of the activations."""
        fired = torch.zeros(d_sae, dtype=torch.int64, device=device)
        cosine, l0, l1 = _zeros(3, device)
        return cls(_ErrorSums.empty(d, device), _ErrorSums.empty(d, device), cosine, l0, l1, fired)

    def add_whole(self, x: Tensor, recon: Tensor, latents: Latents) -> Tensor:
        """Every real token of some texts: x and recon ``[tokens, d]``, and the tokens' latents.

        Returns the squared error of each token, float32 ``[tokens]``: not finite where one of the two is not.
        """
        new, errors = _ErrorSums.of(x, recon)
        self.whole = self.whole.merge(new)
        self.fired.index_add_(0, latents.col, (latents.value != 0).to(self.fired.dtype))
        return errors

    def add_probed(self, x: Tensor, recon: Tensor, latents: Latents) -> None:
        """Probed positions: x and recon ``[rows, d]``, and their latents."""
        new, _ = _ErrorSums.of(x, recon)
        self.probed = self.probed.merge(new)
        self.cosine = self.cosine + F.cosine_similarity(x.float(), recon.float(), dim=1).sum(dtype=torch.float64)
        self.l0 = self.l0 + (latents.value != 0).sum()
        self.l1 = self.l1 + latents.value.abs().sum(dtype=torch.float64)

    def merge(self, other: ReconstructionSums) -> ReconstructionSums:
        """The sums over both sets of rows, on this one's device."""
        other = other.to(self.fired.device)
        return ReconstructionSums(
            whole=self.whole.merge(other.whole),
            probed=self.probed.merge(other.probed),
            cosine=self.cosine + other.cosine,
            l0=self.l0 + other.l0,
            l1=self.l1 + other.l1,
            fired=self.fired + other.fired,
        )

    def to(self, device: torch.device | str) -> ReconstructionSums:
        """The same sums on another device; these if it is theirs."""
        moved = (tensor.to(device) for tensor in (self.cosine, self.l0, self.l1, self.fired))
        return ReconstructionSums(self.whole.to(device), self.probed.to(device), *moved)

    def figures(self) -> Reconstruction:
        """Divide. This waits for the device."""
        n_probed, n_tokens = self.probed.n, self.whole.n
        n_dead = int((self.fired == 0).sum())
        return Reconstruction(
            mse_pos=self.probed.mse(),
            mse_whole=self.whole.mse(),
            fvu_pos=self.probed.fvu(),
            fvu_whole=self.whole.fvu(),
            cosine=_ratio(self.cosine, n_probed),
            l0=_ratio(self.l0, n_probed),
            l1=_ratio(self.l1, n_probed),
            dead=n_dead / self.fired.numel() if n_tokens else None,
            n_probed=n_probed,
            n_tokens=n_tokens,
        )


@dataclass(frozen=True)
class _ErrorSums:
    """Squared error and squared deviation of n rows; sets of rows merge as in Chan, Golub & LeVeque (1983)."""

    n: int
    squared_error: Tensor
    """Summed over rows and coordinates. float64 ``[]``."""
    mean: Tensor
    """Of x. float64 ``[d]``."""
    deviation: Tensor
    """Squared distance of x from ``mean``, summed over rows and coordinates. float64 ``[]``."""

    @classmethod
    def empty(cls, d: int, device: torch.device | str) -> _ErrorSums:
        """No rows."""
        error, deviation = _zeros(2, device)
        return cls(0, error, torch.zeros(d, dtype=torch.float64, device=device), deviation)

    @classmethod
    def of(cls, x: Tensor, recon: Tensor) -> tuple[_ErrorSums, Tensor]:
        """x and recon ``[rows, d]``; also each row's squared error, float32 ``[rows]``.

        Residual streams have dimensions whose mean is 1e3 times their spread, so deviations are taken from the
        float32 mean, which is near enough for the differences to be exact, and corrected for its rounding.
        """
        x, recon = x.float(), recon.float()
        if len(x) == 0:
            return cls.empty(x.shape[1], x.device), x.new_empty(0)
        errors, mean, deviation = _compare_on_cpu(x, recon) if x.device.type == "cpu" else _compare(x, recon)
        return cls(len(x), errors.sum(dtype=torch.float64), mean, deviation), errors

    def merge(self, other: _ErrorSums) -> _ErrorSums:
        """Both sets of rows."""
        if 0 in (self.n, other.n):
            return self if other.n == 0 else other
        n = self.n + other.n
        apart = other.mean - self.mean
        return _ErrorSums(
            n=n,
            squared_error=self.squared_error + other.squared_error,
            mean=self.mean + apart * (other.n / n),
            deviation=self.deviation + other.deviation + apart.square().sum() * (self.n * other.n / n),
        )

    def to(self, device: torch.device | str) -> _ErrorSums:
        """The same sums on another device."""
        return _ErrorSums(self.n, self.squared_error.to(device), self.mean.to(device), self.deviation.to(device))

    def mse(self) -> float | None:
        """Mean over rows and coordinates."""
        return _ratio(self.squared_error, self.n * self.mean.numel())

    def fvu(self) -> float | None:
        """Fraction of variance unexplained."""
        return _ratio(self.squared_error, self.deviation.item())


def _compare(x: Tensor, recon: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `error_kernels.compare`. Float32 along each row, float64 over the rows: no float64 copy of the matrix."""
    near_mean = x.mean(dim=0)
    offsets = x - near_mean
    rounding = offsets.mean(dim=0).double()
    squares = torch.linalg.vector_norm(offsets, dim=1).double().square()
    deviation = squares.sum() - len(x) * rounding.square().sum()
    errors = torch.linalg.vector_norm(x - recon, dim=1).square()
    return errors, near_mean.double() + rounding, deviation.clamp(min=0)


def _compare_on_cpu(x: Tensor, recon: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    from error_kernels import compare  # here: Numba takes a while to load

    errors, mean, deviation = compare(x.contiguous().numpy(), recon.contiguous().numpy())
    return torch.from_numpy(errors), torch.from_numpy(mean), torch.tensor(deviation, dtype=torch.float64)


def _zeros(n: int, device: torch.device | str) -> tuple[Tensor, ...]:
    return torch.zeros(n, dtype=torch.float64, device=device).unbind()


def _ratio(numerator: Tensor, denominator: float) -> float | None:
    return numerator.item() / denominator if denominator else None
