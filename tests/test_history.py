"""L-BFGS's memory compared with the matrices that it represents, on a CPU and with the operations of other devices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from delta_selectivity.probing.backends import history
from delta_selectivity.probing.backends.history import History

COLUMNS, P, MEMORY = 3, 6, 4


@pytest.fixture(params=["compiled", "torch"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torch":
        monkeypatch.setattr(history, "_step_on_cpu", history._step)
        monkeypatch.setattr(history, "_store_pair_on_cpu", history._store_pair)


def positive(generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    root = torch.randn(P, P, generator=generator, dtype=torch.float64)
    return (root @ root.T / P + torch.eye(P, dtype=torch.float64)).to(dtype)


def updated(inverse: Tensor, s: Tensor, y: Tensor) -> Tensor:
    """Update an inverse Hessian's estimate by BFGS (Nocedal & Wright 2006, equation 6.17)."""
    rho, one = 1 / (s @ y), torch.eye(P, dtype=s.dtype)
    turn = one - rho * torch.outer(s, y)
    return turn @ inverse @ turn.T + rho * torch.outer(s, s)


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n_steps", [0, 1, MEMORY, 2 * MEMORY + 1])
def test_a_step_equals_that_of_the_matrix(n_steps: int, dtype: torch.dtype) -> None:
    """Columns are independent: the second has no positive curvature at its last step and keeps its state."""
    generator = torch.Generator().manual_seed(n_steps)
    preconditioner, hessian = positive(generator, dtype), positive(generator, dtype)
    kept, pairs = History(MEMORY), []
    for i in range(n_steps):
        s = torch.randn(COLUMNS, P, generator=generator, dtype=torch.float64).to(dtype)
        y = s @ hessian
        if i == n_steps - 1:
            y[1] = -y[1]
        kept.push(s, y, y @ preconditioner)
        pairs = [*pairs, (s, y)][-MEMORY:]
    gradient = torch.randn(COLUMNS, P, generator=generator, dtype=torch.float64).to(dtype)
    found = kept.step(gradient, gradient @ preconditioner)
    chosen = torch.tensor([2, 1])
    part = kept.select(chosen).step(gradient[chosen], gradient[chosen] @ preconditioner)
    torch.testing.assert_close(part, found[chosen], rtol=0, atol=0)
    for column in range(COLUMNS):
        own = [(s[column].double(), y[column].double()) for s, y in pairs if s[column] @ y[column] > 0]
        inverse = preconditioner.double()
        if own:
            s, y = own[-1]
            inverse = inverse * (s @ y) / (y @ inverse @ y)
        for s, y in own:
            inverse = updated(inverse, s, y)
        expected = -(inverse @ gradient[column].double()).to(dtype)
        torch.testing.assert_close(found[column], expected, rtol=2e-4 if dtype == torch.float32 else 1e-9, atol=1e-4)
