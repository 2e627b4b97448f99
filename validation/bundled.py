"""The bundled model's activations as a ground for plants, with its own SAEs and separate people.

ground = bundled_ground(rows=1000, apart=800, backend=backend)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import bundled
from delta_selectivity.probing.probes import ProbeBackend
from delta_selectivity.run.calibration import principal_axes
from delta_selectivity.saes import open_sae
from delta_selectivity.tasks import Probe, ProbeTexts, load_probe_texts
from validation.plants import Bench, Ground
from validation.world import Rows

LAYER = 5
DATASETS = ("gender", "is_alive")  # the two that the model knows best
PLANTED = "planted"
PLANTED_SIGNAL = 1.0  # half the distance of its class means, in standard deviations along its direction
ASSETS = Path(__file__).resolve().parent.parent / "assets"
SAES = {"k8": ASSETS / "tiny-pythia-saes-k8", "k32": ASSETS / "tiny-pythia-saes-k32"}


def bundled_ground(
    rows: int, apart: int, backend: ProbeBackend, seed: int = 0, max_length: int | None = None
) -> Ground:
    """Return at most `rows` rows of each task on the benches, and `apart` rows of people who are on none of them.

    max_length: last tokens of each text that the model reads; None: all.
    """
    texts = load_probe_texts(DATASETS, seed=seed)
    probes = [probe for dataset in texts.datasets for probe in dataset.probes]
    random = np.random.default_rng(seed)
    order = {probe.name: random.permutation(len(probe.mentions)) for probe in probes}
    benched = {probe.name: order[probe.name][:rows] for probe in probes}
    taken = np.concatenate([texts.persons[probe.mentions[benched[probe.name]]] for probe in probes])
    others = {}
    for probe in probes:
        left = order[probe.name][rows:]
        others[probe.name] = left[~np.isin(texts.persons[probe.mentions[left]], taken)][:apart]
    chosen = [(probe, part[probe.name]) for part in (benched, others) for probe in probes]
    found = _rows(texts, chosen, max_length)
    return Ground(
        name=f"bundled, layer {LAYER}",
        benches=[Bench(each, backend) for each in found[: len(probes)]],
        apart={probe.name: each for probe, each in zip(probes, found[len(probes) :], strict=True)},
        saes={name: open_sae(str(folder)).load(LAYER, "cpu") for name, folder in SAES.items()},
    )


def with_planted_trait(ground: Ground, backend: ProbeBackend, seed: int = 0) -> Ground:
    """Return the ground with one more task on every bench: a random trait of people, planted along one direction.

    The model's own concepts are correlated (of these people, three women in four are alive, and one man in three), so
    erasing one also changes the others. The planted trait is independent of them.
    """
    random = np.random.default_rng([seed, 1])
    everyone = [*(bench.rows for bench in ground.benches), *ground.apart.values()]
    people = np.unique(np.concatenate([rows.persons for rows in everyone]))
    coin = random.permutation(len(people)) % 2 == 0
    mean, axes = principal_axes(torch.cat([rows.x for rows in everyone]))
    spread = torch.cat([(rows.x - mean) @ axes.T for rows in everyone]).std(dim=0)
    white = torch.from_numpy(random.normal(size=len(spread)))
    direction = (white / white.norm() * spread) @ axes  # one standard deviation along a direction across all axes

    def planted(rows: Rows) -> Rows:
        trait = coin[np.searchsorted(people, rows.persons)]
        x = rows.x + PLANTED_SIGNAL * torch.from_numpy(np.where(trait, 1, -1))[:, None] * direction
        return Rows(x.float(), np.stack([*rows.labels, trait]), rows.persons, (*rows.tasks, PLANTED))

    aside = [planted(rows) for rows in ground.apart.values()]
    return Ground(
        name=f"{ground.name}, a trait planted",
        benches=[Bench(planted(bench.rows), backend) for bench in ground.benches],
        apart={PLANTED: joined(PLANTED, aside)},
        saes={},
    )


def joined(task: str, parts: Sequence[Rows], n: int | None = None) -> Rows:
    """Return the first n rows (None: all) of the parts together, with the one task that they share."""
    labels = np.concatenate([part.labels[part.tasks.index(task)] for part in parts])[:n]
    x, persons = torch.cat([part.x for part in parts])[:n], np.concatenate([part.persons for part in parts])[:n]
    return Rows(x, labels[None], persons, (task,))


def _rows(texts: ProbeTexts, chosen: list[tuple[Probe, NDArray[np.int64]]], max_length: int | None) -> list[Rows]:
    """Return the rows of each (probe, indices of its mentions); every distinct text goes through the model once."""
    mentions = np.unique(np.concatenate([probe.mentions[places] for probe, places in chosen]))
    x = bundled.activations([texts.mentions[m] for m in mentions], [LAYER], max_length=max_length)[LAYER]
    return [
        Rows(
            x=x[torch.from_numpy(np.searchsorted(mentions, probe.mentions[places]))],
            labels=probe.labels[places][None],
            persons=texts.persons[probe.mentions[places]],
            tasks=(probe.name,),
        )
        for probe, places in chosen
    ]
