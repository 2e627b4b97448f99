"""Models and SAEs of common sizes with random weights, for timing: speed does not depend on the values.

with Shape.of("pythia-160m").model_folder() as folder:
    open_model(str(folder)).load(sites, "cpu", "float32")
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn.functional import normalize

from benchmarks.bundled import MODEL
from delta_selectivity.saes import Sae, random_topk

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Shape:
    """Sizes of a Pythia model, and of TopK SAEs on its residual stream."""

    name: str
    n_layers: int
    d: int  # width of the residual stream
    n_heads: int
    d_sae: int
    k: int

    @property
    def model_flops(self) -> int:
        """Return the floating-point operations of the weight matrices per token: 2 x 12 d² for each layer."""
        return 24 * self.d**2 * self.n_layers

    @property
    def sae_flops(self) -> int:
        """Return the floating-point operations of the encoder's product for one token at one site."""
        return 2 * self.d * self.d_sae

    @contextmanager
    def model_folder(self) -> Iterator[Path]:
        """Yield a temporary folder with such a model in bfloat16 and the bundled tokenizer."""
        from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
        from transformers.utils import logging as hf_logging

        hf_logging.disable_progress_bar()
        tokenizer = json.loads((MODEL / "config.json").read_text(encoding="utf-8"))
        config = GPTNeoXConfig(
            vocab_size=tokenizer["vocab_size"],
            hidden_size=self.d,
            num_hidden_layers=self.n_layers,
            num_attention_heads=self.n_heads,
            intermediate_size=4 * self.d,
            max_position_embeddings=512,
            bos_token_id=tokenizer["bos_token_id"],
            eos_token_id=tokenizer["eos_token_id"],
        )
        with tempfile.TemporaryDirectory(prefix="delta-selectivity-") as name:
            folder = Path(name) / self.name
            torch.manual_seed(0)
            GPTNeoXForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
            for file in TOKENIZER_FILES:
                shutil.copy(MODEL / file, folder)
            yield folder

    def sae(self, layer: int, device: str = "cpu") -> Sae:
        """Return a random TopK SAE for a layer's residual stream."""
        generator = torch.Generator().manual_seed(layer)
        coder = random_topk(torch.zeros(self.d), self.d_sae, self.k, generator).to(device)
        return Sae(f"random {self.d_sae}", layer, "resid_post", self.d, self.d_sae, self.k, "topk", coder)

    def write_saes(self, folder: Path, seed: int = 0) -> None:
        """Write one random SAE for each layer in EleutherAI's format."""
        config = {"activation": "topk", "num_latents": self.d_sae, "k": self.k, "d_in": self.d}
        for layer in range(self.n_layers):
            generator = torch.Generator().manual_seed(layer + 1000 * seed)
            directions = normalize(torch.randn(self.d_sae, self.d, generator=generator), dim=1)
            place = folder / f"layers.{layer}"
            place.mkdir(parents=True)
            (place / "cfg.json").write_text(json.dumps(config), encoding="utf-8")
            weights = {"encoder.weight": directions, "encoder.bias": torch.zeros(self.d_sae)}
            weights |= {"W_dec": directions.clone(), "b_dec": torch.zeros(self.d)}
            save_file(weights, str(place / "sae.safetensors"))


SHAPES = (
    Shape("pythia-70m", n_layers=6, d=512, n_heads=8, d_sae=32768, k=32),
    Shape("pythia-160m", n_layers=12, d=768, n_heads=12, d_sae=32768, k=32),
    Shape("pythia-410m", n_layers=24, d=1024, n_heads=16, d_sae=32768, k=32),
)
TINY = Shape("tiny", n_layers=2, d=64, n_heads=4, d_sae=512, k=8)  # to check that a benchmark runs
