"""What is kept of one SAE; light to import, so that tables can be printed without SAE Lens."""

from __future__ import annotations

from dataclasses import dataclass

SHUFFLED = ", decoder rows shuffled"  # ends the name of a broken copy


@dataclass(frozen=True)
class Result:
    """One SAE: what it truly keeps, and what each score says of it."""

    name: str
    deceives: bool  # built so that delta_sel and recovery must disagree; left out of the rank correlations
    present: float  # as in `recovery.Recovery`, with the next five
    kept: float
    kept_tasks: float
    held: float
    matched: float
    mcc: float
    delta_sel: float  # mean over tasks
    ci_low: float
    ci_high: float
    transfer_delta: float  # mean over tasks
    latent_sel: float | None  # mean over tasks, of probes on the codes; where asked for
    mse: float
    fvu: float
    l0: float
