"""The protocol that wrapped in-memory SAEs implement."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from delta_selectivity.saes.coders import Coder
from delta_selectivity.saes.input_norm import InputNorm
from delta_selectivity.saes.source import SaeHeader
from delta_selectivity.saes.wrap_arguments import WrapArguments


class Contents(Protocol):
    """A wrapped SAE object, with the behaviour of its kind."""

    @property
    def label(self) -> str:
        """Name of the object in messages: its class."""
        ...

    def header(self, given: WrapArguments) -> SaeHeader:
        """Return the object's own metadata, completed with the caller's. Raises `RequestError`."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Return the current weights, in any dtype and on any device."""
        ...

    def settings(self) -> Any:
        """Return, as JSON-compatible data, other state that affects the codes and is not in the header's config."""
        ...

    @property
    def needs_version(self) -> bool:
        """Whether a change of the weights cannot be detected from the object."""
        ...

    def build(self, header: SaeHeader) -> tuple[Coder, InputNorm]:
        """Return a float32 coder of the current weights. Raises `RequestError` if a weight is not finite."""
        ...
