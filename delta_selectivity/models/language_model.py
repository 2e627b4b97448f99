"""A causal language model as a source of activations: no LM head, no layer beyond the last one asked for.

    info = open_model("EleutherAI/pythia-160m", revision="step1000")    # by config and tokenizer alone
    sites = [Site(3, "resid_post"), Site(3, "z")]
    info.widths(sites)                                                  # {site: d}, still without weights
    model = info.load(sites, "cpu", "float32")
    model.activations(ids)                                              # {site: [texts, tokens, d]}
    model.token_rows(ids, lengths)                                      # {site: [real tokens, d]}

Any decoder of transformers: hook points by name for the families whose blocks are built as most are, by module path
for the rest. Values are those of the raw weights, as TransformerLens's hooks give them without weight processing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
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

# While transformers builds a model it swaps functions of its classes and torch's default dtype, for the whole process:
# of two threads that do so at once, the second may leave every later model with weights untied or not initialised.
BUILDING = threading.Lock()


@dataclass(frozen=True)
class ModelInfo:
    """What is known of a model before its weights are read."""

    files: Pretrained
    n_layers: int
    d_model: int
    max_length: int  # tokens
    n_embeddings: int | None  # tokens that it knows, by the config; None: it does not tell
    bos_token_id: int | None  # of the token that begins a text, if the tokenizer knows one
    eos_token_id: int | None
    saved_dtype: str  # of the weights on disk, by the config: "None" if it does not tell
    quantisation: str | None  # type of most weights of a GGUF file, "Q4_1"; None: no GGUF file

    @classmethod
    def read(cls, files: Pretrained) -> ModelInfo:
        """By config and tokenizer. Raises `RequestError` if either cannot be had, or is no decoder's."""
        quantisation = files.quantisation  # first: it finds damage
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
        """As typed."""
        return self.files.name

    @property
    def config(self) -> Any:
        """A transformers.PretrainedConfig."""
        return self.files.config

    @property
    def tokenizer(self) -> Any:
        """A transformers.PreTrainedTokenizerFast."""
        return self.files.tokenizer

    @property
    def has_bos(self) -> bool:
        """Whether the tokenizer knows a token that begins a text."""
        return self.bos_token_id is not None

    @property
    def opening_token_id(self) -> int | None:
        """Of BOS, and where the tokenizer has none of EOS, which TransformerLens puts in front of texts then."""
        return self.eos_token_id if self.bos_token_id is None else self.bos_token_id

    def choose_dtype(self, asked: str, device: str) -> str:
        """`auto`: bfloat16 for a model that was saved in it or more coarsely, if the device computes in it.

        Else float32.
        """
        if asked != "auto":
            return asked
        coarse = self.saved_dtype == "bfloat16" or self.quantisation not in (None, "F32", "F16")
        return "bfloat16" if coarse and has_bfloat16(device) else "float32"

    def fingerprint(self) -> str:
        """Of the files, as they were when it was first asked for."""
        return self.files.fingerprint

    def widths(self, sites: Collection[Site]) -> dict[Site, int]:
        """Width d of what is at each site, without the weights.

        Raises `RequestError`, with the alternatives, if a hook point does not exist or holds no row for each token.
        """
        config = truncated(self.config, layers_needed(sites))
        return shape_widths(self._builder(config), config, sites)

    def names_of_modules(self) -> dict[str, str]:
        """Paths of MLP and attention modules, and the hook point that each one's output is in this model.

        `layers.<layer>.mlp` is `mlp_out` if it is added to the residual stream as it is, else the path itself.
        """
        with FakeTensorMode():
            return names_of_modules(self._builder(truncated(self.config, 1))())

    def _builder(self, config: Any) -> Callable[[], nn.Module]:
        """What makes the decoder of a config, inside `FakeTensorMode` without weights."""

        def build() -> nn.Module:
            # Made in float32, for transformers gives tensors that others make meanwhile the same dtype. Then bfloat16:
            # some kernels of mixture-of-experts models know no shapes in float32.
            options = {"dtype": torch.float32, "trust_remote_code": self.files.trust_remote_code}
            with BUILDING:
                module = _auto_class(config).from_config(config, **options).get_decoder()
            return _with_weights_of(module, torch.bfloat16)

        return build

    def load(self, sites: Collection[Site], device: str, dtype: str) -> LanguageModel:
        """Read the weights up to the last layer among `sites`, and check that the sites are what their names say.

        Raises `RequestError` if weights are missing or a check fails (see `models.checks`).
        """
        with BUILDING:
            module = self._read_weights(truncated(self.config, layers_needed(sites)), getattr(torch, dtype))
            attention.use_where_faster(module, torch.device(device))
        module = _in_own_memory(module.get_decoder()).to(device).eval().requires_grad_(False)
        use_in(module)
        taps = {site: find_tap(module, site) for site in sorted(sites)}
        check(module, taps, torch.device(device))
        return LanguageModel(module, taps, torch.device(device))

    def load_whole(self, sites: Collection[Site], device: str, dtype: str) -> WholeModel:
        """Read all weights, the LM head's too.

        Raises `RequestError` if weights are missing, there is no LM head, or a site's value cannot be replaced.
        """
        for site in sites:
            check_replaceable(site)
        with BUILDING:
            module: Any = self._read_weights(self.config, getattr(torch, dtype), with_head=True)
            attention.use_where_faster(module, torch.device(device))
        if module.get_output_embeddings() is None:
            raise RequestError(f"`downstream`: {self.name} has no LM head")
        module = _in_own_memory(module).to(device).eval().requires_grad_(False)
        use_in(module)
        decoder = module.get_decoder()
        taps = {site: find_tap(decoder, site) for site in sorted(sites)}
        return WholeModel(module, taps, torch.device(device))

    def _read_weights(self, config: Any, dtype: torch.dtype, with_head: bool = False) -> Any:
        from transformers.utils import logging as hf_logging

        verbosity = hf_logging.get_verbosity()
        hf_logging.set_verbosity_error()  # it lists the LM head and the upper layers, left out on purpose
        hf_logging.disable_progress_bar()
        try:
            with self.files.source() as (where, options), _unpacking(self.quantisation) as unpacked:
                module, report = _auto_class(config, with_head).from_pretrained(
                    where, config=config, dtype=dtype, output_loading_info=True, **options, **unpacked
                )
        except (OSError, ValueError, RuntimeError, ImportError, LookupError, SafetensorError, UnpicklingError) as error:
            raise RequestError(f"`model` {self.name}: weights cannot be read: {first_line(error)}") from error
        finally:
            hf_logging.set_verbosity(verbosity)
            hf_logging.enable_progress_bar()
        bad = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
        if bad:
            raise RequestError(f"`model` {self.name}: {len(bad)} weights are missing or misshapen: {bad[0]} ...")
        return module


@contextmanager
def _unpacking(quantisation: str | None) -> Iterator[dict[str, Any]]:
    """Options to read weights with; of a GGUF file as plain numbers, which some kernels would leave packed."""
    if quantisation is None:
        yield {}
        return
    from transformers import GgufConfig

    with without_bar():
        yield {"quantization_config": GgufConfig(dequantize=True)}


def _with_weights_of(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The module with new parameters: fake tensors, unlike others, cannot be converted where they are."""
    for part in module.modules():
        for name, weight in [*part.named_parameters(recurse=False)]:
            if weight.is_floating_point():
                setattr(part, name, nn.Parameter(weight.to(dtype), requires_grad=False))
    return module


class ActivationSource(Protocol):
    """A `LanguageModel`, or what stands for one."""

    @property
    def device(self) -> torch.device:
        """Where activations are given."""
        ...

    def token_rows(self, ids: Tensor, lengths: Tensor, skip: int = 0) -> dict[Site, Tensor]:
        """What is at its sites for right-padded token ids [texts, tokens], of which `lengths` [texts] are real.

        Row after row, text by text, without the first `skip` tokens of each: site -> [rows, d of the site].
        """
        ...

    def only(self, sites: Collection[Site]) -> ActivationSource:
        """The same with some of its sites; `self` is of no more use."""
        ...


@dataclass(frozen=True)
class LanguageModel:
    """The loaded model with the places in it whose values are wanted."""

    module: nn.Module  # the decoder without its LM head
    taps: Mapping[Site, Tap]
    device: torch.device

    @torch.inference_mode()
    def activations(self, ids: Tensor) -> dict[Site, Tensor]:
        """What is at the sites for right-padded token ids [texts, tokens]: site -> [texts, tokens, d of the site].

        No attention mask: attention is causal and padding comes last, so no real token ever sees it. What stands at
        padded positions is meaningless.
        """
        with capture(self.taps, *ids.shape) as found:
            self.module(input_ids=ids.to(self.device, non_blocking=True), use_cache=False)
        return found

    @torch.inference_mode()
    def token_rows(self, ids: Tensor, lengths: Tensor, skip: int = 0) -> dict[Site, Tensor]:
        """The rows of real tokens alone (see `ActivationSource`)."""
        found = self.activations(ids)
        position = torch.arange(ids.shape[1])
        real = (position >= skip) & (position < lengths[:, None])
        place = real.flatten().nonzero()[:, 0].to(self.device, non_blocking=True)  # found on the CPU: nothing waits
        return {site: found.pop(site).flatten(0, 1).index_select(0, place) for site in list(found)}

    def only(self, sites: Collection[Site]) -> LanguageModel:
        """This model with some of its sites; layers above the last of them are let go, so `self` is of no more use."""
        drop_layers_above(self.module, layers_needed(sites))
        return LanguageModel(self.module, {site: self.taps[site] for site in sites}, self.device)


@dataclass(frozen=True)
class WholeModel:
    """The loaded model with its LM head, and the places in it whose values can be replaced."""

    module: Any  # a transformers model with `get_decoder` and an LM head
    taps: Mapping[Site, Tap]
    device: torch.device

    @property
    def n_vocabulary(self) -> int:
        """Logits of a token."""
        return int(self.module.config.get_text_config(decoder=True).vocab_size)

    @torch.inference_mode()
    def activations(self, ids: Tensor) -> dict[Site, Tensor]:
        """What is at the sites, as `LanguageModel.activations` gives it; the LM head is not used."""
        with capture(self.taps, *ids.shape) as found:
            self.module.get_decoder()(input_ids=ids.to(self.device), use_cache=False)
        return found

    @torch.inference_mode()
    def logits(self, ids: Tensor) -> tuple[Tensor, dict[Site, Tensor]]:
        """Logits [texts, tokens, vocabulary] of the model as it is, and what is at the sites."""
        with capture(self.taps, *ids.shape) as found:
            logits = self._run(ids)
        return logits, found

    @torch.inference_mode()
    def logits_with(self, ids: Tensor, site: Site, place: Tensor, rows: Tensor) -> Tensor:
        """Logits [texts, tokens, vocabulary] of the model run on from `rows` [n, d] at a site.

        place int64 [n], text x tokens + position: where they stand; everything else there stays as it is.
        """
        n_texts, n_tokens = ids.shape
        with replacing(site, self.taps[site], n_texts, n_tokens, place, rows):
            return self._run(ids)

    def _run(self, ids: Tensor) -> Tensor:
        output = self.module(input_ids=ids.to(self.device, non_blocking=True), use_cache=False)
        logits: Tensor = output.logits
        return logits


def open_model(name: str, revision: str | None = None, trust_remote_code: bool = False) -> ModelInfo:
    """A hub id or local folder, by its config and tokenizer. Raises `RequestError` if either cannot be had.

    Code of the model's own repository runs only if `trust_remote_code`.
    """
    return ModelInfo.read(Pretrained.find(name, revision, trust_remote_code))


def _auto_class(config: Any, with_head: bool = False) -> Any:
    """`AutoModel`, which has no LM head; a repository's own code may know only how to build the model with one."""
    from transformers import AutoModel, AutoModelForCausalLM

    own = getattr(config, "auto_map", None) or {}
    only_whole = "AutoModelForCausalLM" in own and "AutoModel" not in own
    return AutoModelForCausalLM if with_head or only_whole else AutoModel


def _in_own_memory(module: nn.Module) -> nn.Module:
    """The module with its weights copied out of the mapped file: what is done to that file now is no matter."""
    for weight in (*module.parameters(), *module.buffers()):
        weight.data = weight.data.clone()
    return module
