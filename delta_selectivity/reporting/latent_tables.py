"""The latents that carry a probe, as text for a terminal and as lines of a data frame."""

from __future__ import annotations

from typing import Any

from delta_selectivity.records.result_file import Json
from delta_selectivity.records.texts import Text
from delta_selectivity.reporting.row_tables import excerpt
from delta_selectivity.reporting.tables import Row, aligned

MAX_LATENTS = 15  # maximum number of latents in the text
BEFORE, NAME = 40, 24  # characters of an example
COLUMNS = ("carrier", "latent", "share", "dropped", "alignment", "difference", "rate_0", "rate_1", "auc", "examples",
           "address")  # fmt: skip
REMAINDERS = {"others": "other latents", "error": "error: no latent", "rest": "biases and scales"}


def latent_lines(attribution: Json) -> list[Json]:
    """Return a line for each latent, and three lines for other latents, the error and the rest; shares add up to 1."""
    lines: list[Json] = [{"carrier": f"latent {one['latent']}", **one} for one in attribution["latents"]]
    for line in lines:
        line["examples"] = [text for text, *_ in line["examples"]]
    remainders: list[dict[str, Any]] = [
        {"carrier": name, "share": attribution[key]} for key, name in REMAINDERS.items()
    ]
    return [{column: line.get(column) for column in COLUMNS} for line in (*lines, *remainders)]


def latents_text(attribution: Json, where: str) -> str:
    """Return the latents that carry the probe of a cell as text."""
    table: list[Row] = [("carrier", "share", "dropped", "fires: class 0", "class 1", "AUC alone", "fires most on")]
    for one in attribution["latents"][:MAX_LATENTS]:
        best = [Text(text, start, end, "") for text, start, end in one["examples"][:1]]
        example = "".join("".join(excerpt(text, BEFORE, NAME)) for text in best)
        shares = (f"{one['share']:+.1%}", f"{one['dropped']:+.1%}")
        rates = (f"{one['rate_0']:.1%}", f"{one['rate_1']:.1%}", f"{one['auc']:.3f}")
        table.append((f"latent {one['latent']}", *shares, *rates, example))
    hidden = sum(one["share"] for one in attribution["latents"][MAX_LATENTS:])
    for key, name in REMAINDERS.items():
        share = attribution[key] + (hidden if key == "others" else 0.0)
        table.append((name, f"{share:+.1%}", "", "", "", "", ""))
    note = (
        "share: of the difference between the classes' mean scores by the model's probe\n"
        "dropped: share of that difference that lies in the error along the latent's direction"
    )
    link = next((one["address"] for one in attribution["latents"] if one["address"]), None)
    parts = [f"{where}: gap {attribution['gap']:.3f}", aligned(table), note, *([f"latents: {link}"] if link else [])]
    return "\n\n".join(parts)
