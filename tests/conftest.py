"""Fixtures: a small random GPT-NeoX in the Hub's layout with its tokenizer, SAEs, and a task about people.

Slow imports are inside: pytest reads this file once more before it starts its workers.
"""

from __future__ import annotations

import csv
import json
import math
import random
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from runs import Request

from delta_selectivity.system import hub_access

if TYPE_CHECKING:
    import torch

N_LAYERS, D_MODEL, D_SAE = 3, 32, 96
WOMEN = ["Maria", "Anna", "Ruth", "Clara", "Ingrid"]
MEN = ["Karl", "Otto", "Peter", "Ivan", "José"]
SURNAMES = [f"{a}{b}" for a in ["Lind", "Berg", "Roth", "Wein", "Gold"] for b in ["mann", "er", "feld", "s", "ström"]]
FRAMES = ["The minutes were read by {}", "In 1950 the prize went to {}", "We met {}", "{}"]


def people(n: int, seed: int = 0) -> list[dict[str, str | int]]:
    """Return n rows text,label,group,start,end; the first name determines the label."""
    rng = random.Random(seed)
    rows = []
    for i in range(n):
        label = i % 2
        name = f"{rng.choice(WOMEN if label else MEN)} {rng.choice(SURNAMES)}"
        text = rng.choice(FRAMES).format(name)
        start = text.index(name)
        rows.append({"text": text, "label": label, "group": name, "start": start, "end": start + len(name)})
    return rows


def write_csv(path: Path, rows: list[dict]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Compute with one thread: the matrices of the tests are too small for several."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _hub_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Assume that the Hub is reachable; tests of that check override this fixture."""
    monkeypatch.setattr(hub_access, "_last_check", (math.inf, True))


@pytest.fixture(scope="session")
def onednn_bfloat16() -> None:
    """Skip a test whose products in bfloat16 oneDNN does not compute on this processor (AVX2 alone)."""
    import torch

    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        pytest.skip("oneDNN has no bfloat16 on this processor")


@pytest.fixture(scope="session")
def exact_bytes() -> None:
    """Skip a test of products of bytes where they overflow (AVX2 alone): the program does not use them there."""
    import torch

    most = torch.full((32, 64), 127, dtype=torch.int8)
    if not (torch._int_mm(most, most.T) == 127**2 * 64).all():
        pytest.skip("products of bytes overflow on this processor")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a folder in the Hub's layout: EleutherAI/pythia-tiny, 3 layers of width 32, random weights."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("hub") / "EleutherAI" / "pythia-tiny"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([str(row["text"]) for row in people(500)], trainer)
    end = "<|endoftext|>"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end, unk_token=end).save_pretrained(
        folder
    )
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer.get_vocab()),
        hidden_size=D_MODEL,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=128,
        initializer_range=0.2,
    )
    GPTNeoXForCausalLM(config).save_pretrained(folder)
    return folder


def write_sparsify(
    folder: Path, layers: range | list[int] = range(N_LAYERS), k: int = 8, d_in: int = D_MODEL, suffix: str = ""
) -> Path:
    """Write random TopK SAEs with tied directions in EleutherAI/sparsify's layout."""
    import torch

    for layer in layers:
        generator = torch.Generator().manual_seed(layer)
        directions = torch.nn.functional.normalize(torch.randn(D_SAE, d_in, generator=generator), dim=1)
        _write_sparsify_layer(folder / f"layers.{layer}{suffix}", directions, k)
    return folder


def write_identity(folder: Path, layers: range | list[int] = range(N_LAYERS), d_in: int = D_MODEL) -> Path:
    """Write SAEs that return x bit for bit: one latent for each sign of each coordinate."""
    import torch

    for layer in layers:
        _write_sparsify_layer(folder / f"layers.{layer}", torch.cat([torch.eye(d_in), -torch.eye(d_in)]), k=d_in)
    return folder


def _write_sparsify_layer(folder: Path, directions: torch.Tensor, k: int) -> None:
    import torch
    from safetensors.torch import save_file

    d_sae, d_in = directions.shape
    folder.mkdir(parents=True)
    weights = {
        "encoder.weight": directions.clone(),
        "encoder.bias": torch.zeros(d_sae),
        "W_dec": directions.clone(),
        "b_dec": torch.zeros(d_in),
    }
    save_file(weights, str(folder / "sae.safetensors"))
    config = {"activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": d_sae, "k": k,
              "multi_topk": False, "skip_connection": False, "transcode": False, "d_in": d_in}  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps(config))


@pytest.fixture(scope="session")
def tiny_saes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create sparsify-format SAEs for every layer of the tiny model, k = 8."""
    return write_sparsify(tmp_path_factory.mktemp("saes") / "sae-tiny")


@pytest.fixture
def people_csv(tmp_path: Path) -> Path:
    """Create a task of 240 rows about some 100 people, which a probe can learn from the first name."""
    return write_csv(tmp_path / "women.csv", people(240))


@pytest.fixture
def with_cache(tiny_model: Path, tiny_saes: Path, people_csv: Path, tmp_path: Path) -> Request:
    """Run the tiny SAEs with a cache in `tmp_path / "cache"`, for a later run to read."""
    return Request(tiny_model, (tiny_saes,), people_csv, tmp_path / "out").plus("--cache_dir", str(tmp_path / "cache"))


@pytest.fixture
def other_saes(tmp_path: Path) -> Path:
    """Create SAEs of the same layers, k = 4."""
    return write_sparsify(tmp_path / "sae-other", k=4)
