"""The SAEs behind one name, one per layer, before their weights are loaded."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from delta_selectivity.errors import RequestError
from delta_selectivity.saes.coders import Coder
from delta_selectivity.saes.hookpoints import canonical, is_module_path, same_place
from delta_selectivity.saes.input_norm import InputNorm
from delta_selectivity.saes.sae import Sae


@dataclass(frozen=True)
class SaeHeader:
    """What one SAE's config says."""

    format: str
    """``sparsify``, ``sae_lens``, ``dictionary_learning`` or ``plain``; ``object`` for one that no library made."""
    layer: int
    hookpoint: str
    """The place that it reconstructs, which is what is measured."""
    d_in: int
    """Width of what it reads."""
    d_sae: int
    k: int | None
    architecture: str
    config: dict[str, Any]
    """The config file, as it is."""
    prepend_bos: bool | None = None
    """Whether its training texts began with BOS; None if the format does not say."""
    counts_bos: bool = False
    """Whether BOS activations were in its training data."""
    model_name: str | None = None
    """The model it was trained on, if it says."""
    input_hookpoint: str | None = None
    """Where a transcoder reads; None for an autoencoder, which reads what it reconstructs."""
    width_out: int | None = None
    """Width of what it writes, if that is not ``d_in``."""
    context_size: int | None = None
    """How many tokens its training texts had, if it says."""

    @property
    def d_out(self) -> int:
        """Width of what it writes: of activations at ``hookpoint``."""
        return self.d_in if self.width_out is None else self.width_out

    @property
    def promised_l0(self) -> float | None:
        """Latents per activation: k, or the mean that its config says the training aimed at or arrived at."""
        if self.k is not None:
            return self.k
        parts = (self.config, self.config.get("metadata"), self.config.get("trainer"))
        found = (part.get(key) for part in parts if isinstance(part, dict) for key in ("k", "l0", "average_l0"))
        numbers = (n for n in found if isinstance(n, int | float) and not isinstance(n, bool) and n > 0)
        return next(numbers, None)


class Member(Protocol):
    """One SAE that can be loaded."""

    @property
    def header(self) -> SaeHeader:
        """Known without its weights."""
        ...

    @property
    def where(self) -> str:
        """A folder or an address, for messages and names."""
        ...

    def prepare(self) -> None:
        """Fetch the weights if they are not here, and compare their header with the config."""
        ...

    def check_values(self) -> None:
        """Read the weights once. Raises `RequestError` if one is not finite."""
        ...

    def build(self) -> tuple[Coder, InputNorm]:
        """Load the weights: float32, on the CPU."""
        ...

    def digest(self) -> str:
        """sha256 of config and weights."""
        ...


@dataclass(frozen=True)
class SaeSource:
    """The SAEs of one hook point under one name."""

    name: str
    """As typed, or the name that was given to it there."""
    members: tuple[Member, ...]
    """In order of layers, one a layer."""
    revision: str | None = None
    """What stands for the files where they are not all on this machine: repository and commit."""
    typed: str | None = None
    """What ``open_sae`` finds it by; None if that is its name."""
    asked: str | None = None
    """The place that its user gave; None: the one that the SAE says."""

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers that have an SAE."""
        return tuple(member.header.layer for member in self.members)

    @property
    def hookpoint(self) -> str:
        """The place that the SAEs reconstruct, by a name of ``hookpoints``."""
        return self._first.hookpoint if self.asked is None else self.asked

    @property
    def own_hookpoint(self) -> str:
        """The same, as the SAE says."""
        return self._first.hookpoint

    def at(self, hookpoint: str) -> SaeSource:
        """The same SAEs, whose place has another name in the model that they are used with."""
        return replace(self, asked=hookpoint)

    @property
    def input_hookpoint(self) -> str | None:
        """Where transcoders read; None for autoencoders, which read what they reconstruct."""
        return self._first.input_hookpoint

    @property
    def d_in(self) -> int:
        """Width of what the SAEs read."""
        return self._first.d_in

    @property
    def d_out(self) -> int:
        """Width of the activations at ``hookpoint``: ``d_in`` for autoencoders."""
        return self._first.d_out

    @property
    def d_sae(self) -> dict[int, int]:
        """By layer, how many latents the SAE has."""
        return {member.header.layer: member.header.d_sae for member in self.members}

    @property
    def prepend_bos(self) -> bool | None:
        """Whether training texts began with BOS; None if the format does not say."""
        return self._first.prepend_bos

    @property
    def counts_bos(self) -> bool:
        """Whether BOS activations were in the training data, and so count in the whole-text figures."""
        return self._first.counts_bos

    @property
    def model_name(self) -> str | None:
        """The model it was trained on, if it says."""
        return self._first.model_name

    @property
    def context_size(self) -> int | None:
        """How many tokens its training texts had, if it says."""
        return self._first.context_size

    @property
    def _first(self) -> SaeHeader:
        return self.members[0].header

    def prepare(self, layers: Sequence[int] | None = None) -> None:
        """Fetch and check the files of these layers (all), so that a broken one is found before a model is loaded."""
        for member in self._choose(layers):
            member.prepare()
            member.check_values()

    def load(self, layer: int, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Sae:
        """The SAE of one layer. Raises `RequestError` if there is none, or if its weights are broken."""
        (member,) = self._choose([layer])
        member.prepare()
        coder, input_norm = member.build()
        header = member.header
        return Sae(
            name=member.where,
            layer=header.layer,
            hookpoint=self.hookpoint,
            d_in=header.d_in,
            d_sae=header.d_sae,
            k=header.k,
            architecture=header.architecture,
            coder=coder.to(device, dtype),
            input_norm=input_norm,
            input_hookpoint=header.input_hookpoint,
            width_out=header.width_out,
            promised_l0=header.promised_l0,
        )

    def fingerprint(self, layers: Sequence[int] | None = None) -> str:
        """sha256 over configs and weights of these layers, fetched if need be; of all layers by default.

        By default files on the Hub are not fetched: repository and commit stand for them.
        """
        if layers is None and self.revision is not None:
            return hashlib.sha256(f"{self.revision} {self.hookpoint}".encode()).hexdigest()
        digest = hashlib.sha256()
        for member in self._choose(layers):
            digest.update(f"{member.header.layer} {member.digest()}\n".encode())
        return digest.hexdigest()

    def _choose(self, layers: Sequence[int] | None) -> list[Member]:
        if layers is None:
            return list(self.members)
        by_layer = {member.header.layer: member for member in self.members}
        for layer in layers:
            if layer not in by_layer:
                raise RequestError(
                    f"layer {layer}: {self.name} has SAEs for layers {', '.join(map(str, self.layers))} only"
                )
        return [by_layer[layer] for layer in sorted(set(layers))]


def assemble(name: str, members: Sequence[Member], hookpoint: str | None, revision: str | None = None) -> SaeSource:
    """A source from all SAEs found under a name: those of one hook point, one a layer.

    The hook point that is asked for is where they are measured, whatever they say of themselves.

    Raises `RequestError` if it is none of several or has to be chosen, if two SAEs claim a layer, or if they read
    different places or widths.
    """
    place = _choose_place(name, [member.header.hookpoint for member in members], hookpoint)
    measured = None if hookpoint is None else _as_asked(hookpoint, place)
    chosen = sorted((m for m in members if m.header.hookpoint == place), key=lambda member: member.header.layer)
    for before, after in itertools.pairwise(chosen):
        if before.header.layer == after.header.layer:
            both = f"{before.where} and {after.where}"
            raise RequestError(f"{name}: two SAEs for layer {before.header.layer}, {both}; name one of them")
        for what in ("d_in", "d_out", "input_hookpoint"):
            one, other = getattr(before.header, what), getattr(after.header, what)
            if one != other:
                both = f"{one} ({before.where}) and {other} ({after.where})"
                raise RequestError(f"{name}: SAEs of one hook point have one {what}, these have {both}")
    return SaeSource(name, tuple(chosen), revision, asked=measured)


def _choose_place(name: str, found: Sequence[str], asked: str | None) -> str:
    places = sorted(set(found))
    if asked is not None:
        matching = [place for place in places if same_place(asked, place)] or (places if len(places) == 1 else [])
        if not matching:
            raise RequestError(f"`hookpoint` {asked}: {name} has SAEs for {', '.join(places)}")
        return matching[0]
    if "resid_post" in places or len(places) == 1:
        return "resid_post" if "resid_post" in places else places[0]
    raise RequestError(f"{name}: SAEs for {', '.join(places)}; choose one with `hookpoint`")


def _as_asked(asked: str, found: str) -> str:
    """The place asked for; in the words of the SAE, if it names the same module."""
    asked = canonical(asked)
    both_paths = is_module_path(asked) and is_module_path(found)
    return found if both_paths and same_place(asked, found) else asked
