"""A causal language model as a source of activations: no LM head, and no layer above the last requested one.

    info = open_model("EleutherAI/pythia-160m", revision="step1000")    # reads only config and tokenizer
    sites = [Site(3, "resid_post"), Site(3, "z")]
    info.widths(sites)                                                  # {site: d}, still without weights
    model = info.load(sites, "cpu", "float32")
    model.activations(ids)                                              # {site: [texts, tokens, d]}
    model.token_rows(ids, lengths)                                      # {site: [real tokens, d]}

Any decoder of transformers works: hook points by name for families with the usual block structure, by module path for
the others. Values are those of the raw weights, like TransformerLens's hooks without weight processing.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pickle import UnpicklingError
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from delta_selectivity.errors import RequestError
from delta_selectivity.models import attention
from delta_selectivity.models.capture import capture, replacing
from delta_selectivity.models.checks import check
from delta_selectivity.models.configs import read_sizes, truncated
from delta_selectivity.models.fused_neox import fuse, reading, running
from delta_selectivity.models.gguf_file import without_bar
from delta_selectivity.models.places import (
    HOOKPOINTS,
    Site,
    Tap,
    check_replaceable,
    drop_layers_above,
    find_tap,
    layers_needed,
    names_of_modules,
)
from delta_selectivity.models.pretrained import Pretrained, first_line
from delta_selectivity.models.widths import shape_widths
from delta_selectivity.system.gemm import use_in
from delta_selectivity.system.processor import has_bfloat16

__all__ = [
    "HOOKPOINTS",
    "ActivationSource",
    "LanguageModel",
    "ModelInfo",
    "Pretrained",
    "Site",
    "WholeModel",
    "open_model",
]

# While transformers builds a model, it swaps functions of its classes and torch's default dtype for the whole process.
# If two threads do so at once, the second may leave all later models with untied or uninitialised weights.
BUILDING = threading.Lock()


@dataclass(frozen=True)
class ModelInfo:
    """Facts about a model that are known before its weights are read."""

    files: Pretrained
    n_layers: int
    d_model: int
    max_length: int  # tokens
    n_embeddings: int | None  # number of embeddings, from the config; None: unknown
    bos_token_id: int | None  # None: the tokenizer has no BOS
    eos_token_id: int | None
    saved_dtype: str  # dtype of the weights on disk, from the config; "None" if unknown
    quantisation: str | None  # type of most weights of a GGUF file, "Q4_1"; None: not a GGUF file

    @classmethod
    def read(cls, files: Pretrained) -> ModelInfo:
        """Read config and tokenizer. Raises `RequestError` if either is not available, or is not a decoder's."""
        quantisation = files.quantisation  # first, because this detects a damaged file
        config, tokenizer = files.config, files.tokenizer
        try:
            sizes = read_sizes(config, tokenizer)
        except (AttributeError, ValueError) as error:
            raise RequestError(f"`model` {files.name}: not a decoder-only language model ({error})") from error
        dtype = str(getattr(config, "dtype", None)).removeprefix("torch.")
        n_embeddings = getattr(config.get_text_config(decoder=True), "vocab_size", None)
        return cls(files, *sizes, n_embeddings, tokenizer.bos_token_id, tokenizer.eos_token_id, dtype, quantisation)

    @property
    def name(self) -> str:
        """Return the name as typed."""
        return self.files.name

    @property
    def config(self) -> Any:
        """Return the transformers.PretrainedConfig."""
        return self.files.config

    @property
    def tokenizer(self) -> Any:
        """Return the transformers.PreTrainedTokenizerFast."""
        return self.files.tokenizer

    @property
    def has_bos(self) -> bool:
        """Return whether the tokenizer has a token that begins a text."""
        return self.bos_token_id is not None

    @property
    def opening_token_id(self) -> int | None:
        """Return the id of BOS, or of EOS if the tokenizer has no BOS, as TransformerLens does."""
        return self.eos_token_id if self.bos_token_id is None else self.bos_token_id

    def choose_dtype(self, requested: str, device: str) -> str:
        """Return the dtype for the weights and activations.

        `auto` is bfloat16 if the model was saved in bfloat16 or lower precision and the device supports bfloat16,
        otherwise float32.
        """
        if requested != "auto":
            return requested
        coarse = self.saved_dtype == "bfloat16" or self.quantisation not in (None, "F32", "F16")
        return "bfloat16" if coarse and has_bfloat16(device) else "float32"

    def fingerprint(self) -> str:
        """Return the fingerprint of the files, computed at the first access."""
        return self.files.fingerprint

    def widths(self, sites: Collection[Site]) -> dict[Site, int]:
        """Return the width d of each site, without reading the weights.

        Raises `RequestError`, with the alternatives, if a hook point does not exist or does not hold one row per token.
        """
        found = _widths(self._decoder(layers_needed(sites)), tuple(sorted(sites)))
        return {site: found[site] for site in sites}

    def names_of_modules(self) -> dict[str, str]:
        """Return the paths of MLP and attention modules -> the hook point of each one's output in this model.

        `layers.<layer>.mlp` is `mlp_out` if it is added to the residual stream unchanged, otherwise the path itself.
        """
        return dict(_names_of_modules(self._decoder(1)))

    def _decoder(self, n_layers: int) -> _Decoder:
        config, has_own_code = truncated(self.config, n_layers), self.files.trust_remote_code
        return _Decoder(object() if has_own_code else config.to_json_string(use_diff=False), config, has_own_code)

    def load(self, sites: Collection[Site], device: str, dtype: str) -> LanguageModel:
        """Read the weights up to the last layer among `sites`, and check the sites.

        Raises `RequestError` if weights are missing or a check fails (see `models.checks`).
        """
        with BUILDING:
            module = self._read_weights(truncated(self.config, layers_needed(sites)), getattr(torch, dtype))
            attention.use_where_faster(module, torch.device(device))
        module = _copy_weights(module.get_decoder()).to(device).eval().requires_grad_(False)
        taps = {site: find_tap(module, site) for site in sorted(sites)}
        fuse(module, taps.values())
        use_in(module)
        check(module, taps, torch.device(device))
        return LanguageModel(module, taps, torch.device(device))

    def load_whole(self, sites: Collection[Site], device: str, dtype: str) -> WholeModel:
        """Read all weights, including the LM head.

        Raises `RequestError` if weights are missing, there is no LM head, or the value at a site cannot be replaced.
        """
        for site in sites:
            check_replaceable(site)
        with BUILDING:
            module: Any = self._read_weights(self.config, getattr(torch, dtype), with_head=True)
            attention.use_where_faster(module, torch.device(device))
        if module.get_output_embeddings() is None:
            raise RequestError(f"`downstream`: {self.name} has no LM head")
        module = _copy_weights(module).to(device).eval().requires_grad_(False)
        use_in(module)
        decoder = module.get_decoder()
        taps = {site: find_tap(decoder, site) for site in sorted(sites)}
        return WholeModel(module, taps, torch.device(device))

    def _read_weights(self, config: Any, dtype: torch.dtype, with_head: bool = False) -> Any:
        from transformers.utils import logging as hf_logging

        verbosity = hf_logging.get_verbosity()
        hf_logging.set_verbosity_error()  # it would list the LM head and upper layers as unused
        hf_logging.disable_progress_bar()
        try:
            with self.files.source() as (where, options), _dequantising(self.quantisation) as gguf_options:
                module, report = _auto_class(config, with_head).from_pretrained(
                    where, config=config, dtype=dtype, output_loading_info=True, **options, **gguf_options
                )
        except (OSError, ValueError, RuntimeError, ImportError, LookupError, SafetensorError, UnpicklingError) as error:
            raise RequestError(f"`model` {self.name}: weights cannot be read: {first_line(error)}") from error
        finally:
            hf_logging.set_verbosity(verbosity)
            hf_logging.enable_progress_bar()
        bad = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
        if bad:
            raise RequestError(
                f"`model` {self.name}: {len(bad)} weights are missing or have a wrong shape: {bad[0]} ..."
            )
        return module


@dataclass(frozen=True)
class _Decoder:
    """A decoder that is built inside `FakeTensorMode`, without weights."""

    identity: object  # the config as JSON; a new object if the repository's own code decides more than the config
    config: Any = field(compare=False)
    has_own_code: bool = field(compare=False)

    def build(self) -> nn.Module:
        # Build in float32, because transformers changes the default dtype of the process and other threads create
        # tensors. Then convert to bfloat16: some mixture-of-experts kernels have no shape inference in float32.
        options = {"dtype": torch.float32, "trust_remote_code": self.has_own_code}
        with BUILDING:
            module = _auto_class(self.config).from_config(self.config, **options).get_decoder()
        return _cast_weights(module, torch.bfloat16)


@lru_cache(maxsize=256)  # building a tiny model takes half of a run, as in the tests; a real one some per cent
def _widths(decoder: _Decoder, sites: tuple[Site, ...]) -> Mapping[Site, int]:
    return shape_widths(decoder.build, decoder.config, sites)


@lru_cache(maxsize=256)
def _names_of_modules(decoder: _Decoder) -> Mapping[str, str]:
    with FakeTensorMode():
        return names_of_modules(decoder.build())


@contextmanager
def _dequantising(quantisation: str | None) -> Iterator[dict[str, Any]]:
    """Yield the loading options that dequantise a GGUF file, because some kernels would keep it quantised."""
    if quantisation is None:
        yield {}
        return
    from transformers import GgufConfig

    with without_bar():
        yield {"quantization_config": GgufConfig(dequantize=True)}


def _cast_weights(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return the module with new parameters, because fake tensors cannot be converted in place."""
    for part in module.modules():
        for name, weight in [*part.named_parameters(recurse=False)]:
            if weight.is_floating_point():
                setattr(part, name, nn.Parameter(weight.to(dtype), requires_grad=False))
    return module


class ActivationSource(Protocol):
    """Interface of `LanguageModel` and its substitutes."""

    @property
    def device(self) -> torch.device:
        """Return the device of the activations."""
        ...

    def token_rows(self, ids: Tensor, lengths: Tensor, wanted: Tensor | None = None) -> dict[Site, Tensor]:
        """Return activations of some tokens, text by text: site -> [rows, d of the site].

        Args:
            ids: Right-padded token ids [texts, tokens].
            lengths: Real tokens of each text [texts].
            wanted: Which tokens, bool [texts, tokens] on the CPU; None: all real ones.
        """
        ...

    def restricted_to(self, sites: Collection[Site]) -> ActivationSource:
        """Return the same source restricted to some of its sites; `self` must not be used afterwards."""
        ...


@dataclass(frozen=True)
class LanguageModel:
    """A loaded model and the sites whose activations it returns."""

    module: nn.Module  # the decoder without its LM head
    taps: Mapping[Site, Tap]
    device: torch.device

    @torch.inference_mode()
    def activations(self, ids: Tensor, tokens: Tensor | None = None) -> dict[Site, Tensor]:
        """Return activations for right-padded token ids [texts, tokens]: site -> [texts, tokens, d of the site].

        tokens: return only those at these tokens: int64 [n], text x tokens + position; site -> [n, d of the site].

        There is no attention mask: attention is causal and padding is last, so real tokens are unaffected by it. Values
        at padded positions are meaningless.
        """
        n_texts, n_tokens = ids.shape
        with capture(self.taps, n_texts, n_tokens, tokens) as found, running(ids):
            self.module(input_ids=ids.to(self.device, non_blocking=True), use_cache=False)
        return found

    @torch.inference_mode()
    def token_rows(self, ids: Tensor, lengths: Tensor, wanted: Tensor | None = None) -> dict[Site, Tensor]:
        """Return the activations of some tokens only (see `ActivationSource`)."""
        chosen = real_tokens(ids, lengths) if wanted is None else wanted
        place = chosen.flatten().nonzero()[:, 0].to(self.device, non_blocking=True)  # computed on the CPU: no waiting
        with reading(chosen):
            return self.activations(ids, place)

    def restricted_to(self, sites: Collection[Site]) -> LanguageModel:
        """Return this model restricted to some sites. Drops higher layers, so `self` must not be used afterwards."""
        drop_layers_above(self.module, layers_needed(sites))
        taps = {site: self.taps[site] for site in sites}
        fuse(self.module, taps.values())  # more blocks than before: taps inside them are gone
        return LanguageModel(self.module, taps, self.device)


def real_tokens(ids: Tensor, lengths: Tensor) -> Tensor:
    """Return which of the right-padded token ids [texts, tokens] are real: bool [texts, tokens]."""
    return torch.arange(ids.shape[1]) < lengths[:, None]


@dataclass(frozen=True)
class WholeModel:
    """A loaded model with its LM head, and the sites whose values can be replaced."""

    module: Any  # a transformers model with `get_decoder` and an LM head
    taps: Mapping[Site, Tap]
    device: torch.device

    @property
    def n_vocabulary(self) -> int:
        """Return the number of logits per token."""
        return int(self.module.config.get_text_config(decoder=True).vocab_size)

    @torch.inference_mode()
    def activations(self, ids: Tensor) -> dict[Site, Tensor]:
        """Return the activations as `LanguageModel.activations` does, without running the LM head."""
        with capture(self.taps, *ids.shape) as found:
            self.module.get_decoder()(input_ids=ids.to(self.device), use_cache=False)
        return found

    @torch.inference_mode()
    def logits(self, ids: Tensor) -> tuple[Tensor, dict[Site, Tensor]]:
        """Return the logits [texts, tokens, vocabulary] of the unmodified model, and the activations at the sites."""
        with capture(self.taps, *ids.shape) as found:
            logits = self._run(ids)
        return logits, found

    @torch.inference_mode()
    def logits_with(self, ids: Tensor, site: Site, place: Tensor, rows: Tensor) -> Tensor:
        """Return the logits [texts, tokens, vocabulary] with the value at a site replaced by `rows` [n, d].

        Args:
            ids: Right-padded token ids [texts, tokens].
            site: The site whose value is replaced.
            place: int64 [n], text x tokens + position of each row; all other positions keep their values.
            rows: The new values.
        """
        n_texts, n_tokens = ids.shape
        with replacing(site, self.taps[site], n_texts, n_tokens, place, rows):
            return self._run(ids)

    def _run(self, ids: Tensor) -> Tensor:
        output = self.module(input_ids=ids.to(self.device, non_blocking=True), use_cache=False)
        logits: Tensor = output.logits
        return logits


def open_model(name: str, revision: str | None = None, trust_remote_code: bool = False) -> ModelInfo:
    """Open a hub id or local folder by its config and tokenizer. Raises `RequestError` if either is not available.

    Code from the model's repository runs only if `trust_remote_code` is set.
    """
    return ModelInfo.read(Pretrained.find(name, revision, trust_remote_code))


def _auto_class(config: Any, with_head: bool = False) -> Any:
    """Return `AutoModel`, which has no LM head, or the class with one if a repository's own code only supports that."""
    from transformers import AutoModel, AutoModelForCausalLM

    classes = getattr(config, "auto_map", None) or {}
    only_whole = "AutoModelForCausalLM" in classes and "AutoModel" not in classes
    return AutoModelForCausalLM if with_head or only_whole else AutoModel


def _copy_weights(module: nn.Module) -> nn.Module:
    """Copy the weights out of the memory-mapped file, so that later changes to the file have no effect."""
    for weight in (*module.parameters(), *module.buffers()):
        weight.data = weight.data.clone()
    return module
