"""Write the README of the bundled model and of each folder of SAEs from the records of their training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .sae_training import Quality

LICENCES = """\
| source | what | licence |
|---|---|---|
| Wikipedia | featured biographies | CC BY-SA |
| BOLD, GAP, WikiText-2 | sentences and articles of Wikipedia | CC BY-SA |
| Biographical Directory of the US Congress | lives of members of Congress | US government, public domain |
| Project Gutenberg 13240 | Cousin, Short Biographical Dictionary of English Literature | public domain |
| unitedstates/congress-legislators | gender, party and state, as template sentences | CC0 |
| Pantheon 1.0 | gender, occupation, birth year and country, as template sentences | CC BY-SA |
"""

MODEL = """\
---
library_name: transformers
license: cc-by-sa-4.0
language: en
tags: [gpt_neox, demo]
---

# tiny-pythia

The language model of the bundled demo: Pythia's architecture (`GPTNeoXForCausalLM`, parallel residual, a
quarter rotary) in small: 6 layers, {parameters:.1f} M parameters, width 256, 4 heads, vocabulary 8192, input
and output embedding tied. **It is not Pythia.** It was trained here, on two CPU cores, to know a little about
people; it writes poor English, and what it says of anyone is not to be believed. Judge no method by its
numbers: it is there so that the program can be tried, and tested, without a download.

## Training

- {tokens:.1f} M tokens in {minutes:.0f} minutes ({speed:,} tokens a second on shared cores): {steps} steps,
  {length} tokens a row.
- Muon for the matrices of the layers, AdamW for the rest; learning rate decayed to zero; saved in bfloat16.
- Held-out loss {loss:.2f} nats a token on documents that it never saw;
  {loss_statements:.2f} on held-out template sentences.
- Every document begins with `<|endoftext|>` (id 0), which is bos, eos, pad and unk; long documents are cut
  into rows, which begin with it too.
- After some mentions of a person in the biographies a short remark on who they are was inserted.
- The probe prompts were not used. But they are web text, and 17 of their 12,403 distinct texts
  share 13 words in a row with the training text (9 of them more than half): passages of Wikipedia in both.

{licences}
Passes over each source:
{epochs}.

## What it knows

Balanced accuracy of probes on its activations, folded by person (1/2: nothing), beside the same architecture with
random weights; means over all layers, and one layer:

<!-- python -m benchmarks.random_control -->
<!-- end -->

`scripts/train_demo.py` made it; `training.json` has the settings.
"""

SAES = """\
---
library_name: {library}
license: cc-by-sa-4.0
tags: [sae, demo]
---

# SAEs for tiny-pythia, TopK, k = {k}

One SAE a layer on the residual stream **after** that layer (the output of `gpt_neox.layers[i]`, before the
final LayerNorm), {d_sae} latents, in {library}'s folder format, bfloat16 on disk. Input is the raw activation
of the Hugging Face model: no normalisation, no folding of weights. Texts begin with `<|endoftext|>`; its own
activations were left out of the training, so reconstruct them at your own risk.

Trained for {minutes:.0f} minutes on two CPU cores, {tokens:.1f} M tokens of the text that tiny-pythia learnt
from (see its card for sources and licences), with AuxK against dead latents. On held-out text, without BOS:

| layer | FVU | L0 | dead |
|---|---|---|---|
{table}

FVU is the fraction of variance unexplained; dead is the share of the latents that never fired on {held_out:,}
held-out tokens. They are small and briefly trained: for trying the program, not for conclusions.
`scripts/train_demo.py saes` made them.
"""


def model_card(facts: Mapping[str, Any]) -> str:
    return MODEL.format(
        parameters=facts["parameters"] / 1e6,
        tokens=facts["tokens_seen"] / 1e6,
        minutes=facts["seconds"] / 60,
        speed=facts["tokens_per_second"],
        steps=facts["steps"],
        length=facts["settings"]["length"],
        loss=facts["held_out_loss"],
        loss_statements=facts["held_out_loss_statements"],
        epochs=", ".join(f"{name} {passes:.1f}" for name, passes in facts["epochs"].items()),
        licences=LICENCES,
    )


def sae_card(
    library: str, k: int, d_sae: int, minutes: float, tokens: int, held_out: int, found: Iterable[Quality]
) -> str:
    rows = [f"| {q.layer} | {q.fvu:.3f} | {q.l0:.1f} | {q.dead:.1%} |" for q in found if q.k == k]
    return SAES.format(
        library=library, k=k, d_sae=d_sae, minutes=minutes, tokens=tokens / 1e6, held_out=held_out,
        table="\n".join(rows),
    )  # fmt: skip
