"""Train the demo's language model, a small Pythia, in a given number of minutes.

Uses Muon for the matrices inside the layers, AdamW for embedding, norms and biases, and bfloat16 where it is fast. The
learning rate has a warm-up, a plateau and a decay to zero, all driven by the clock, so that the training ends on time
at any speed.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from delta_selectivity.system.processor import has_fast_bfloat16

from .streams import BOS_ID, TextMix
from .tokenizer import save_tokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelSettings:
    """Settings of the training; written to `training.json` beside the model's card."""

    minutes: float
    seed: int = 0
    rows: int = 16  # per step
    part: int = 4  # rows that a worker thread takes at a time
    workers: int = 2
    length: int = 192  # tokens per row, BOS included
    muon_lr: float = 0.02
    adamw_lr: float = 3e-3
    weight_decay: float = 0.05
    warmup: float = 0.02  # share of the time
    decay: float = 0.45  # share of the time
    first_snapshot_minutes: float = 3.0
    snapshot_minutes: float = 10.0


def new_model(vocab_size: int, seed: int) -> GPTNeoXForCausalLM:
    """Return a model with random weights; it is also the control for the trained model."""
    torch.manual_seed(seed)
    config = GPTNeoXConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=1024,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        use_parallel_residual=True,
        hidden_act="gelu",
        bos_token_id=BOS_ID,
        eos_token_id=BOS_ID,
        pad_token_id=BOS_ID,
        architectures=["GPTNeoXForCausalLM"],
    )
    return GPTNeoXForCausalLM(config)


def next_token_loss(model: GPTNeoXForCausalLM, ids: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats; `ids` is `[rows, length]`; BOS inside a row counts as a token."""
    with torch.autocast("cpu", torch.bfloat16, enabled=has_fast_bfloat16()):
        hidden = model.gpt_neox(ids, use_cache=False).last_hidden_state
        logits = model.get_output_embeddings()(hidden[:, :-1])  # [rows, length - 1, vocab]
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def loss_and_gradient(
    model: GPTNeoXForCausalLM, ids: Tensor, part: int, pool: Executor
) -> tuple[float, tuple[Tensor, ...]]:
    """Return the mean loss over `ids` `[rows, length]` and its gradient, computed by single-threaded workers.

    Each free worker takes the next few rows. On cores that are shared with other programs, this is several times faster
    than splitting every operation between threads that wait for each other.
    """
    weights = list(model.parameters())

    def one(rows: Tensor) -> tuple[float, tuple[Tensor, ...]]:
        loss = next_token_loss(model, rows) * (len(rows) / len(ids))
        return loss.item(), torch.autograd.grad(loss, weights)

    losses, gradients = zip(*pool.map(one, ids.split(part)), strict=True)
    total = gradients[0]
    for gradient in gradients[1:]:
        torch._foreach_add_(total, gradient)
    return sum(losses), total


@torch.no_grad()
def validation_loss(model: GPTNeoXForCausalLM, rows: Tensor) -> float:
    model.eval()
    total = sum(next_token_loss(model, part).item() * len(part) for part in rows.split(32))
    model.train()
    return total / len(rows)


def optimisers(model: GPTNeoXForCausalLM, settings: ModelSettings) -> list[torch.optim.Optimizer]:
    inner = [p for p in model.gpt_neox.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in inner}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(inner, lr=settings.muon_lr, weight_decay=settings.weight_decay),
        torch.optim.AdamW(rest, lr=settings.adamw_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def rate_at(progress: float, settings: ModelSettings) -> float:
    """Return the share of the full learning rate when `progress` of the time is over."""
    return max(0.0, min(1.0, progress / settings.warmup, (1.0 - progress) / settings.decay))


def save(model: GPTNeoXForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save the model in bfloat16 and the tokenizer, in the Hub's layout; the folder appears complete or not at all."""
    fresh, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    for stale in (fresh, old):
        shutil.rmtree(stale, ignore_errors=True)
    copy = GPTNeoXForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.to(torch.bfloat16).save_pretrained(fresh, max_shard_size="10MB")
    save_tokenizer(tokenizer, fresh)
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def train_model(
    mix: TextMix,
    tokenizer: PreTrainedTokenizerFast,
    settings: ModelSettings,
    folder: Path,
    snapshots: Path | None,
) -> dict[str, object]:
    """Train, save to `folder`, and return what the model card needs."""
    model = new_model(len(tokenizer), settings.seed)
    steppers = optimisers(model, settings)
    full_rates = [group["lr"] for stepper in steppers for group in stepper.param_groups]
    validation, held_out_statements = mix.validation(settings.length), mix.validation(settings.length, True)
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(settings.workers)
    start, step, recent = time.monotonic(), 0, 0.0
    next_snapshot = settings.first_snapshot_minutes
    while (minutes := (time.monotonic() - start) / 60) < settings.minutes:
        groups = [group for stepper in steppers for group in stepper.param_groups]
        for group, rate in zip(groups, full_rates, strict=True):
            group["lr"] = rate * rate_at(minutes / settings.minutes, settings)
        loss, gradient = loss_and_gradient(model, mix.batch(settings.rows, settings.length), settings.part, pool)
        for weight, slope in zip(model.parameters(), gradient, strict=True):
            weight.grad = slope
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper in steppers:
            stepper.step()
        step, recent = step + 1, recent + loss
        if step % 50 == 0:
            tokens = step * settings.rows * settings.length
            speed = tokens / (time.monotonic() - start)
            log.info("step %d  %.1f min  loss %.3f  %.0f tokens/s", step, minutes, recent / 50, speed)
            recent = 0.0
        if snapshots is not None and minutes > next_snapshot:
            save(model, tokenizer, snapshots)
            next_snapshot = minutes + settings.snapshot_minutes
            log.info("snapshot at step %d: held-out loss %.3f", step, validation_loss(model, validation[:64]))
    pool.shutdown()
    seconds = time.monotonic() - start
    save(model, tokenizer, folder)
    tokens = step * settings.rows * settings.length
    facts: dict[str, object] = {
        "settings": asdict(settings),
        "steps": step,
        "tokens_seen": tokens,
        "seconds": round(seconds),
        "tokens_per_second": round(tokens / seconds),
        "parameters": sum(p.numel() for p in model.parameters()),
        "epochs": mix.epochs(),
        "held_out_loss": round(validation_loss(model, validation), 4),
        "held_out_loss_statements": round(validation_loss(model, held_out_statements), 4),
    }
    (folder / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    return facts
