"""The L-BFGS history (Nocedal 1980) of many columns side by side."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass
class History:
    """The last `memory` steps s and changes of gradient y, with the preconditioned changes P y.

    P is linear, so storing P y saves a product: the two-loop recursion only adds vectors.
    """

    memory: int
    n: int = 0  # steps so far; step i is at i % memory
    _pairs: tuple[Tensor, ...] = ()  # s, y, P y [memory, columns, p]; 1 / s.y [memory, columns]
    _gamma: Tensor = field(
        default_factory=lambda: torch.ones(0)
    )  # [columns], size of the inverse Hessian relative to P

    def select(self, chosen: Tensor) -> History:
        """Return the columns at int64 `chosen`."""
        if not self.n:
            return History(self.memory)
        return History(self.memory, self.n, tuple(pairs[:, chosen] for pairs in self._pairs), self._gamma[chosen])

    def step(self, gradient: Tensor, newton: Tensor) -> Tensor:
        """Return the quasi-Newton step: minus the inverse Hessian's estimate times the gradient, [columns, p].

        Args:
            gradient: [columns, p].
            newton: The preconditioner times the gradient, [columns, p].
        """
        if not self.n:
            return -newton
        step = _step_on_cpu if gradient.device.type == "cpu" else _step
        return step(gradient, newton, self._pairs, self._gamma, self.n)

    def push(self, s: Tensor, y: Tensor, py: Tensor) -> None:
        """Store a step; columns without positive curvature (those that did not move) keep their `_gamma`."""
        if not self.n:
            self._pairs = (*(s.new_empty(self.memory, *s.shape) for _ in range(3)), s.new_empty(self.memory, len(s)))
            self._gamma = s.new_ones(len(s))
        store_pair = _store_pair_on_cpu if s.device.type == "cpu" else _store_pair
        store_pair(s, y, py, self._pairs, self._gamma, self.n % self.memory)
        self.n += 1


@dataclass
class CompiledHistory:
    """The history for `descent_kernels.descend`. It counts steps by column: columns stop at different iterations."""

    memory: int
    _arrays: tuple[NDArray[Any], ...] = ()  # what `arrays` returns; empty before the first call

    def arrays(self, theta: Tensor) -> tuple[NDArray[Any], ...]:
        """Return s, y, P y [memory, columns, p], 1 / s.y [memory, columns], gamma and the numbers of steps [columns].

        The first call takes the shape and dtype of theta [columns, p]. The kernel writes into the arrays.
        """
        if not self._arrays:
            like = theta.numpy()
            columns, dtype = len(like), like.dtype
            pairs = tuple(np.zeros((self.memory, *like.shape), dtype) for _ in range(3))
            rho, gamma = np.zeros((self.memory, columns), dtype), np.ones(columns, dtype)
            self._arrays = (*pairs, rho, gamma, np.zeros(columns, np.int64))
        return self._arrays


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Return inner products by column, [columns, 1]."""
    return (a * b).sum(dim=1, keepdim=True)


def _step(gradient: Tensor, newton: Tensor, pairs: tuple[Tensor, ...], gamma: Tensor, n_steps: int) -> Tensor:
    """Compute `history_kernels.two_loops` in torch."""
    memory = len(pairs[0])
    slots = [step % memory for step in range(max(n_steps - memory, 0), n_steps)]
    all_s, all_y, all_py, all_rho = pairs
    q, r, weights = gradient, newton, {}
    for slot in reversed(slots):
        weights[slot] = all_rho[slot][:, None] * dot(all_s[slot], q)
        q, r = q - weights[slot] * all_y[slot], r - weights[slot] * all_py[slot]
    r = gamma[:, None] * r
    for slot in slots:
        r = r + all_s[slot] * (weights[slot] - all_rho[slot][:, None] * dot(all_y[slot], r))
    return -r


def _step_on_cpu(gradient: Tensor, newton: Tensor, pairs: tuple[Tensor, ...], gamma: Tensor, n_steps: int) -> Tensor:
    from delta_selectivity.probing.backends.history_kernels import two_loops  # imported here: Numba is slow to load

    vectors = gradient.contiguous().numpy(), newton.contiguous().numpy()
    return torch.from_numpy(two_loops(*vectors, tuple(t.numpy() for t in pairs), gamma.numpy(), n_steps))


def _store_pair(s: Tensor, y: Tensor, py: Tensor, pairs: tuple[Tensor, ...], gamma: Tensor, slot: int) -> None:
    """Compute `history_kernels.store_pair` in torch."""
    sy, ypy = (s * y).sum(dim=1), (y * py).sum(dim=1)
    curved = (sy > 0) & (ypy > 0)
    one = torch.ones_like(sy)
    rho = torch.where(curved, 1 / torch.where(curved, sy, one), 0)
    gamma.copy_(torch.where(curved, sy / torch.where(curved, ypy, one), gamma))
    for ours, new in zip(pairs, (s, y, py, rho), strict=True):
        ours[slot] = new


def _store_pair_on_cpu(s: Tensor, y: Tensor, py: Tensor, pairs: tuple[Tensor, ...], gamma: Tensor, slot: int) -> None:
    from delta_selectivity.probing.backends.history_kernels import store_pair

    vectors = (t.contiguous().numpy() for t in (s, y, py))
    store_pair(*vectors, tuple(t.numpy() for t in pairs), gamma.numpy(), slot)
