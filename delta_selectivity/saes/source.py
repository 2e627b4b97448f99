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
    """The content of one SAE's config."""

    format: str  # `sparsify`, `sae_lens`, `dictionary_learning` or `plain`; `object` for other in-memory objects
    layer: int
    hookpoint: str  # the hook point that it reconstructs, at which it is measured
    d_in: int  # width of its input
    d_sae: int
    k: int | None
    architecture: str
    config: dict[str, Any]  # the unmodified content of the config file
    prepend_bos: bool | None = None  # whether training texts began with BOS; None if the format does not say
    counts_bos: bool = False  # whether BOS activations were in the training data
    model_name: str | None = None  # the model that it was trained on, if given
    input_hookpoint: str | None = None  # the hook point that a transcoder reads; None for an autoencoder
    width_out: int | None = None  # width of its output, if not `d_in`
    context_size: int | None = None  # tokens per training text, if given

    @property
    def d_out(self) -> int:
        """Width of its output, the activations at ``hookpoint``."""
        return self.d_in if self.width_out is None else self.width_out

    @property
    def promised_l0(self) -> float | None:
        """Latents per activation: k, or the mean that the config gives as target or result of training."""
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
        """Metadata, available without the weights."""
        ...

    @property
    def where(self) -> str:
        """Folder or address, for messages and names."""
        ...

    def prepare(self) -> None:
        """Download the weights if needed and compare their names and shapes with the config."""
        ...

    def check_values(self) -> None:
        """Read the weights. Raises `RequestError` if a value is not finite."""
        ...

    def build(self) -> tuple[Coder, InputNorm]:
        """Load the weights in float32 on the CPU."""
        ...

    def digest(self) -> str:
        """Return the sha256 of config and weights."""
        ...


@dataclass(frozen=True)
class SaeSource:
    """The SAEs of one hook point behind one name."""

    name: str  # the name as typed, or the user's own name in `mine=NAME`
    members: tuple[Member, ...]  # the SAEs ordered by layer, at most one per layer
    revision: str | None = None  # identifies files that are not all on this machine, such as by repository and commit
    opened_as: str | None = None  # the argument of `open_sae`, if it differs from `name`
    requested_hookpoint: str | None = None  # the user's; None: that of the SAE's config

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers that have an SAE."""
        return tuple(member.header.layer for member in self.members)

    @property
    def hookpoint(self) -> str:
        """The hook point that the SAEs reconstruct, by a name of ``hookpoints``."""
        return self._first.hookpoint if self.requested_hookpoint is None else self.requested_hookpoint

    @property
    def config_hookpoint(self) -> str:
        """The hook point in the SAE's config."""
        return self._first.hookpoint

    def with_hookpoint(self, hookpoint: str) -> SaeSource:
        """Return the same SAEs with another name of their hook point, such as the model's name of it."""
        return replace(self, requested_hookpoint=hookpoint)

    @property
    def input_hookpoint(self) -> str | None:
        """The hook point that transcoders read; None for autoencoders."""
        return self._first.input_hookpoint

    @property
    def d_in(self) -> int:
        """Width of the SAEs' input."""
        return self._first.d_in

    @property
    def d_out(self) -> int:
        """Width of the activations at ``hookpoint``: ``d_in`` for autoencoders."""
        return self._first.d_out

    @property
    def d_sae(self) -> dict[int, int]:
        """Number of latents by layer."""
        return {member.header.layer: member.header.d_sae for member in self.members}

    @property
    def prepend_bos(self) -> bool | None:
        """Whether training texts began with BOS; None if the format does not say."""
        return self._first.prepend_bos

    @property
    def counts_bos(self) -> bool:
        """Whether BOS activations were in the training data, so that they count in whole-text figures."""
        return self._first.counts_bos

    @property
    def model_name(self) -> str | None:
        """The model that the SAEs were trained on, if given."""
        return self._first.model_name

    @property
    def context_size(self) -> int | None:
        """Tokens per training text, if given."""
        return self._first.context_size

    @property
    def _first(self) -> SaeHeader:
        return self.members[0].header

    def prepare(self, layers: Sequence[int] | None = None) -> None:
        """Download and check the files of these layers, to find broken ones before a model is loaded.

        Args:
            layers: layer indices; None for all.

        Raises:
            RequestError: there is no SAE for a layer, or its files are missing or broken.
        """
        for member in self._choose(layers):
            member.prepare()
            member.check_values()

    def load(self, layer: int, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Sae:
        """Load the SAE of one layer.

        Args:
            layer: layer index, from 0.
            device: device of the weights and of ``encode``.
            dtype: dtype of the weights.

        Returns:
            The SAE. Its codes and reconstructions are float32 for every dtype.

        Raises:
            RequestError: there is no SAE for the layer, or its files are missing or broken.
        """
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
        """Return a hash that identifies the SAEs' configs and weights.

        Args:
            layers: the layers to hash, whose files are downloaded if needed. None for all layers; then files on the Hub
                are not downloaded, and repository and commit identify them.

        Returns:
            64 hexadecimal digits of SHA-256.

        Raises:
            RequestError: there is no SAE for a layer, or its files are missing or broken.
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
    """Build a source from all SAEs found behind a name: those of one hook point, one per layer.

    The user's hook point takes precedence over those in the configs. Raises `RequestError` if it matches none of
    several, if one has to be chosen, if two SAEs have the same layer, or if their inputs differ in hook point or width.
    """
    place = _choose_place(name, [member.header.hookpoint for member in members], hookpoint)
    measured = None if hookpoint is None else _canonical_request(hookpoint, place)
    chosen = sorted((m for m in members if m.header.hookpoint == place), key=lambda member: member.header.layer)
    for before, after in itertools.pairwise(chosen):
        if before.header.layer == after.header.layer:
            both = f"{before.where} and {after.where}"
            raise RequestError(f"{name}: it has two SAEs for layer {before.header.layer}, {both}: give one of them")
        for what in ("d_in", "d_out", "input_hookpoint"):
            one, other = getattr(before.header, what), getattr(after.header, what)
            if one != other:
                both = f"{one} ({before.where}) and {other} ({after.where})"
                raise RequestError(f"{name}: its SAEs have different values of {what}: {both}")
    return SaeSource(name, tuple(chosen), revision, requested_hookpoint=measured)


def _choose_place(name: str, found: Sequence[str], requested: str | None) -> str:
    places = sorted(set(found))
    if requested is not None:
        matching = [place for place in places if same_place(requested, place)] or (places if len(places) == 1 else [])
        if not matching:
            raise RequestError(f"`hookpoint` {requested}: {name} has SAEs for {', '.join(places)}")
        return matching[0]
    if "resid_post" in places or len(places) == 1:
        return "resid_post" if "resid_post" in places else places[0]
    raise RequestError(f"{name}: it has SAEs for {', '.join(places)}: choose one with `hookpoint`")


def _canonical_request(requested: str, found: str) -> str:
    """Return the user's hook point, spelled as in the SAE's config if both are paths of the same module."""
    requested = canonical(requested)
    both_paths = is_module_path(requested) and is_module_path(found)
    return found if both_paths and same_place(requested, found) else requested
