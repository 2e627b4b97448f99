"""The kept results of one SAE. This module is light to import, so that tables can be printed without SAE Lens."""

from __future__ import annotations

from dataclasses import dataclass

SHUFFLED = ", decoder rows shuffled"  # suffix of the name of a copy with shuffled decoder


@dataclass(frozen=True)
class Result:
    """One SAE: what it keeps of the features, and its scores."""

    name: str
    deceives: bool  # adversarial: built so that delta_sel and recovery disagree; excluded from the rank correlations
    present: float  # as in `recovery.Recovery`, like the next five
    kept: float
    kept_tasks: float
    held: float
    matched: float
    mcc: float
    delta_sel: float  # mean over tasks
    ci_low: float
    ci_high: float
    transfer_delta: float  # mean over tasks
    latent_sel: float | None  # mean over tasks, of probes on the codes, if requested
    mse: float
    fvu: float
    l0: float
