"""The protocol of objects that can be wrapped as an SAE."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from delta_selectivity.saes.coders import Coder
from delta_selectivity.saes.given import Given
from delta_selectivity.saes.input_norm import InputNorm
from delta_selectivity.saes.source import SaeHeader


class Contents(Protocol):
    """An object that is an SAE, with what is known of its kind."""

    @property
    def label(self) -> str:
        """What to call the object in messages: its class."""
        ...

    def header(self, given: Given) -> SaeHeader:
        """Return what the object says, completed by what the caller says. Raises `RequestError`."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Return the weights as they are now, in any dtype and on any device."""
        ...

    def settings(self) -> Any:
        """Return what else can change its numbers and is not in the header's config, as JSON can hold it."""
        ...

    @property
    def needs_version(self) -> bool:
        """Whether nothing of the object shows that its weights have changed."""
        ...

    def build(self, header: SaeHeader) -> tuple[Coder, InputNorm]:
        """Return the coder of the weights as they are now: float32. Raises `RequestError` if one is not finite."""
        ...
