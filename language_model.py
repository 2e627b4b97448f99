"""A causal language model as a source of activations: no LM head, no layer beyond the last one asked for.

    info = open_model("EleutherAI/pythia-160m", revision="step1000")    # config and tokenizer alone
    sites = [Site(3, "resid_post"), Site(3, "z")]
    info.widths(sites)                                                  # {site: d}, still without weights
    model = info.load(sites, "cpu", "float32")
    model.activations(ids)                                              # {site: [texts, tokens, d]}
    model.token_rows(ids, lengths)                                      # {site: [real tokens, d]}

Any decoder of transformers: hook points by name for the families whose blocks are built as most are, by module path
for the rest. Values are those of the raw weights, as TransformerLens's hooks give them without weight processing.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from errors import RequestError
from gemm import use_in
from model_hooks import attention
from model_hooks.capture import capture
from model_hooks.checks import check
from model_hooks.configs import read_sizes, truncated
from model_hooks.places import HOOKPOINTS, Site, Tap, drop_layers_above, find_tap, layers_needed
from model_hooks.widths import shape_widths

__all__ = ["HOOKPOINTS", "ActivationSource", "LanguageModel", "ModelInfo", "Site", "open_model"]

NO_REVISION = "main"  # what transformers calls the only state of a local folder, and a repository's newest

# While transformers builds a model it swaps functions of its classes and torch's default dtype, for the whole process:
# of two threads that do so at once, the second may leave every later model with weights untied or not initialised.
BUILDING = threading.Lock()
FINGERPRINTED = {".json", ".safetensors", ".bin", ".txt", ".model", ".py"}  # files of a local model


@dataclass(frozen=True)
class ModelInfo:
    """What is known of a model before its weights are read."""

    name: str  # as typed
    revision: str | None  # branch, tag or commit of a hub model, as typed; None: its main branch, or a local folder
    commit: str | None  # what `revision` meant when the model was opened; None: a local folder
    trust_remote_code: bool  # whether Python code of the model's repository may run
    config: Any  # transformers.PretrainedConfig
    tokenizer: Any  # transformers.PreTrainedTokenizerFast
    n_layers: int
    d_model: int
    max_length: int  # tokens

    @property
    def has_bos(self) -> bool:
        """Whether the tokenizer knows a token that begins a text."""
        return self.tokenizer.bos_token_id is not None

    def choose_dtype(self, asked: str) -> str:
        """`auto`: bfloat16 for a model that was saved in it, so nothing is lost that was there; else float32."""
        saved = str(getattr(self.config, "dtype", None)).removeprefix("torch.")
        if asked != "auto":
            return asked
        return "bfloat16" if saved == "bfloat16" else "float32"

    def fingerprint(self) -> str:
        """Commit of a hub model; sha256 over the files of a local one. It changes whenever a number could."""
        if self.commit is not None:
            return self.commit
        digest = hashlib.sha256()
        for path in sorted(p for p in Path(self.name).iterdir() if p.suffix in FINGERPRINTED):
            digest.update(path.name.encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def widths(self, sites: Collection[Site]) -> dict[Site, int]:
        """Width d of what is at each site, without the weights.

        Raises `RequestError`, with the alternatives, if a hook point does not exist or holds no row for each token.
        """
        config = truncated(self.config, layers_needed(sites))

        def build() -> nn.Module:
            # bfloat16: some kernels of mixture-of-experts models know no shapes in float32
            options = {"dtype": torch.bfloat16, "trust_remote_code": self.trust_remote_code}
            with BUILDING:
                return _auto_class(config).from_config(config, **options).get_decoder()

        return shape_widths(build, config, sites)

    def load(self, sites: Collection[Site], device: str, dtype: str) -> LanguageModel:
        """Read the weights up to the last layer among `sites`, and check that the sites are what their names say.

        Raises `RequestError` if weights are missing or a check fails (see `model_hooks.checks`).
        """
        with BUILDING:
            module = self._read_weights(truncated(self.config, layers_needed(sites)), getattr(torch, dtype))
            attention.use_where_faster(module, torch.device(device))
        module = _in_own_memory(module.get_decoder()).to(device).eval().requires_grad_(False)
        use_in(module)
        taps = {site: find_tap(module, site) for site in sorted(sites)}
        check(module, taps, torch.device(device))
        return LanguageModel(module, taps, torch.device(device))

    def _read_weights(self, config: Any, dtype: torch.dtype) -> Any:
        from transformers.utils import logging as hf_logging

        verbosity = hf_logging.get_verbosity()
        hf_logging.set_verbosity_error()  # it lists the LM head and the upper layers, left out on purpose
        hf_logging.disable_progress_bar()
        try:
            module, report = _auto_class(config).from_pretrained(
                self.name,
                config=config,
                dtype=dtype,
                revision=self.commit or NO_REVISION,
                trust_remote_code=self.trust_remote_code,
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError, ImportError, SafetensorError, UnpicklingError) as error:
            raise RequestError(f"--model_name {self.name}: weights cannot be read: {_first_line(error)}") from error
        finally:
            hf_logging.set_verbosity(verbosity)
            hf_logging.enable_progress_bar()
        bad = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
        if bad:
            raise RequestError(f"--model_name {self.name}: {len(bad)} weights are missing or misshapen: {bad[0]} ...")
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


def open_model(name: str, revision: str | None = None, trust_remote_code: bool = False) -> ModelInfo:
    """Config and tokenizer of a hub id or local folder. Raises `RequestError` if either cannot be had.

    Code of the model's own repository runs only if `trust_remote_code`.
    """
    folder = Path(os.path.expanduser(name))  # noqa: PTH111 - leaves an unknown ~user as it is
    local = os.path.isdir(folder)  # noqa: PTH112 - False, not an error, for a name too long to be a path
    if local:
        name = str(folder)
        if not (folder / "config.json").is_file():
            raise RequestError(f"--model_name {name}: the folder has no config.json")
        if revision is not None:
            raise RequestError(f"--revision {revision}: {name} is a local folder, which has one state only")
    elif folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or not name:
        raise RequestError(f"--model_name {name!r}: no such folder (and not a hub id of the form owner/name)")
    try:
        commit = None if local else _commit(name, revision or NO_REVISION)
        config, tokenizer = _read_config_and_tokenizer(name, commit, trust_remote_code)
    except Exception as error:  # the hub client and the parsers raise many kinds; all mean that this name is unusable
        raise RequestError(f"--model_name {name}: {_why_unusable(error, local, revision)}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise RequestError(f"--model_name {name}: needs a fast tokenizer (tokenizer.json) to place the name's tokens")
    try:
        sizes = read_sizes(config, tokenizer)
    except (AttributeError, ValueError) as error:
        raise RequestError(f"--model_name {name}: not a decoder-only language model ({error})") from error
    return ModelInfo(name, revision, commit, trust_remote_code, config, tokenizer, *sizes)


def _commit(name: str, revision: str) -> str:
    """The commit of a hub model that `revision` means now: config, tokenizer and weights are all read at that one."""
    from transformers.utils import cached_file

    config = Path(str(cached_file(name, "config.json", revision=revision)))  # .../snapshots/<commit>/config.json
    return config.parent.name


def _read_config_and_tokenizer(name: str, commit: str | None, trust: bool) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoTokenizer

    options = {"revision": commit or NO_REVISION, "trust_remote_code": trust}  # unsaid, it would ask on the terminal
    return AutoConfig.from_pretrained(name, **options), AutoTokenizer.from_pretrained(name, **options)


def _why_unusable(error: Exception, local: bool, revision: str | None) -> str:
    if "trust_remote_code" in str(error):
        return "it comes with Python code of its own: read it, and allow it with --trust_remote_code"
    if local:
        return f"config or tokenizer cannot be read: {_first_line(error)}"
    at = f" at revision {revision}" if revision else ""
    return f"not a local folder, and not to be had from the hub{at}: {_first_line(error)}"


def _auto_class(config: Any) -> Any:
    """`AutoModel`, which has no LM head; a repository's own code may know only how to build the model with one."""
    from transformers import AutoModel, AutoModelForCausalLM

    own = getattr(config, "auto_map", None) or {}
    return AutoModelForCausalLM if "AutoModelForCausalLM" in own and "AutoModel" not in own else AutoModel


def _in_own_memory(module: nn.Module) -> nn.Module:
    """The module with its weights copied out of the mapped file: what is done to that file now is no matter."""
    for weight in (*module.parameters(), *module.buffers()):
        weight.data = weight.data.clone()
    return module


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
