"""Fuzz every reader of the program: a damaged file must give a valid result or a `RequestError`.

python tests/fuzz/readers.py --minutes 10            # each reader for ten minutes
python tests/fuzz/readers.py --count 100000 --only csv
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import logging
import math
import random
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # pytest adds this folder itself
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from conftest import people, write_csv, write_sparsify
from mutate import damaged_bytes, damaged_json, damaged_safetensors
from safetensors.torch import save

from delta_selectivity.errors import RequestError
from delta_selectivity.probing.probe_statistics import ProbeScores
from delta_selectivity.records import result_file, saebench, scores, texts
from delta_selectivity.records.rows_file import RowProbe, Rows, load
from delta_selectivity.records.rows_file import save as save_rows
from delta_selectivity.reporting import tables
from delta_selectivity.reporting.saebench import beside_text
from delta_selectivity.reporting.saebench_plots import beside_plots
from delta_selectivity.saes import open_sae
from delta_selectivity.saes.torch_file import read_torch_file
from delta_selectivity.tasks import UserData, dataset_fingerprint, load_probe_texts

SLOW = 10.0  # seconds; a slower input is also a finding


class Reader(ABC):
    """One reader, a folder for its files, and how to damage one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @abstractmethod
    def damage(self, rng: random.Random) -> None:
        """Write a damaged file."""

    @abstractmethod
    def read(self) -> None:
        """Read it. Raises RequestError if the file is rejected, AssertionError if it should have been."""


class SaeReader(Reader):
    """A folder of one SAE, whose config or weights are damaged."""

    config: dict[str, Any]
    weights: bytes
    name = "layers.1"
    weights_name = "sae.safetensors"

    def restore(self) -> Path:
        folder = self.folder / self.name
        folder.mkdir(exist_ok=True)
        (folder / "cfg.json").write_text(json.dumps(self.config))
        (folder / self.weights_name).write_bytes(self.weights)
        return folder

    def read(self) -> None:
        source = open_sae(str(self.folder))
        source.fingerprint()
        sae = source.load(source.layers[0], "cpu")
        codes = sae.encode(torch.ones(2, sae.d_in))
        assert sae.decode(codes).shape == (2, sae.d_in)


class SparsifyConfig(SaeReader):
    """The cfg.json of sparsify."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        made = write_sparsify(folder, layers=[1], d_in=8) / "layers.1"
        self.config = json.loads((made / "cfg.json").read_text())
        self.weights = (made / "sae.safetensors").read_bytes()

    def damage(self, rng: random.Random) -> None:
        path = self.restore() / "cfg.json"
        text = json.dumps(self.config).encode()
        path.write_bytes(damaged_json(self.config, rng) if rng.random() < 0.7 else damaged_bytes(text, rng))


class LensConfig(SaeReader):
    """The cfg.json of SAE Lens, of several architectures and two versions."""

    name = "blocks.1.hook_resid_post"
    weights_name = "sae_weights.safetensors"
    d_in, d_sae = 8, 16

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        matrix, latents = torch.ones(self.d_in, self.d_sae), torch.zeros(self.d_sae)
        self.weights = save({"W_enc": matrix, "W_dec": matrix.T.contiguous(), "b_enc": latents.clone(),
                             "b_dec": torch.zeros(self.d_in), "threshold": latents.clone(), "b_gate": latents.clone(),
                             "b_mag": latents.clone(), "r_mag": latents.clone()})  # fmt: skip
        common = {"d_in": self.d_in, "d_sae": self.d_sae, "dtype": "float32", "device": "cpu",
                  "apply_b_dec_to_input": True, "normalize_activations": "none"}  # fmt: skip
        metadata = {"sae_lens_version": "6.54.12", "model_name": "pythia", "hook_name": self.name, "prepend_bos": True,
                    "exclude_special_tokens": False, "seqpos_slice": [None], "context_size": 128}  # fmt: skip
        old = {**common, "hook_point": self.name, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4},
               "expansion_factor": 2, "sae_lens_version": "3.20.0", "prepend_bos": True}  # fmt: skip
        self.configs = [
            {**common, "architecture": "standard", "metadata": metadata},
            {**common, "architecture": "topk", "k": 4, "rescale_acts_by_decoder_norm": True, "metadata": metadata},
            {**common, "architecture": "jumprelu", "metadata": metadata},
            {**common, "architecture": "gated", "metadata": metadata},
            {**common, "normalize_activations": "expected_average_only_in", "metadata": metadata},
            old,
        ]
        self.config = self.configs[0]

    def damage(self, rng: random.Random) -> None:
        config = rng.choice(self.configs)
        folder = self.restore()
        text = json.dumps(config).encode()
        damage = damaged_json(config, rng) if rng.random() < 0.8 else damaged_bytes(text, rng)
        (folder / "cfg.json").write_bytes(damage)
        scaler = {"scaling_factor": 2.0}
        (folder / "activation_scaler.json").write_bytes(
            damaged_json(scaler, rng) if rng.random() < 0.3 else json.dumps(scaler).encode()
        )


class SafetensorsHeader(SparsifyConfig):
    """The header of the weights, with a length that matches it or not."""

    def damage(self, rng: random.Random) -> None:
        (self.restore() / self.weights_name).write_bytes(damaged_safetensors(self.weights, rng))


class Csv(Reader):
    """A user's task as CSV."""

    suffix = "csv"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.path = folder / f"task.{self.suffix}"
        self.rows = people(24)

    def damage(self, rng: random.Random) -> None:
        self.path.write_bytes(damaged_bytes(write_csv(self.path, self.rows).read_bytes(), rng))

    def read(self) -> None:
        texts = load_probe_texts([UserData(str(self.path))])
        for dataset in texts.datasets:
            assert len(dataset_fingerprint(texts, dataset)) == 64
            for probe in dataset.probes:
                assert 0 < probe.labels.sum() < len(probe.labels)
                probe.name.encode("utf-8")
        for mention in texts.mentions:
            mention.text.encode("utf-8")
            assert mention.text[mention.start : mention.end].strip()


class Jsonl(Csv):
    """A user's task as JSON lines."""

    suffix = "jsonl"

    def damage(self, rng: random.Random) -> None:
        lines = [json.dumps(row).encode() for row in self.rows]
        if rng.random() < 0.7:
            for _ in range(rng.randint(1, 3)):
                place = rng.randrange(len(lines))
                lines[place] = damaged_json(self.rows[place], rng).replace(b"\n", b"")
            self.path.write_bytes(b"\n".join(lines))
        else:
            self.path.write_bytes(damaged_bytes(b"\n".join(lines), rng))


class ResultJson(Reader):
    """A result file: an accepted file has the written numbers."""

    key: result_file.Json = {"schema": result_file.SCHEMA_VERSION, "model": "abc", "seed": 0, "views": ["model", "sae"]}  # noqa: RUF012

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.path = folder / "m_d.json"
        self.run = result_file.describe_run({"sae": "some/sae", "layers": [0, 1]})
        cell = {"model_sel": 0.75, "sae_sel": 0.5, "delta_sel": -0.25, "ci_low": -0.3, "ci_high": -0.2,
                "model_ci_low": 0.7, "model_ci_high": 0.8, "sae_ci_low": 0.4, "sae_ci_high": 0.6, "detectable": 0.05,
                "p_value": 0.001, "q_value": 0.002, "transfer_sel": 0.6, "transfer_r2": 0.8,
                "n_people": 300}  # fmt: skip
        layer = {"mse_pos": 0.5, "fvu_pos": 0.25, "l0": 8.0, "gender": cell, "is_alive": {**cell, "q_value": None}}
        file = result_file.RecordFile.open(self.path, self.key, self.run, overwrite=False)
        file.warnings.append("layer 0 gender: only 30 groups: the interval is unreliable")
        file.seconds, file.resources, file.complete = {"forward": 1.5}, {"peak_ram_gb": 0.5}, True
        parts = {"": 0.02, "_ci_low": 0.01, "_ci_high": 0.03, "_p_value": 0.001, "_detectable": 0.01}
        figures = {f"{score}{part}": value for score in ("delta_sel", "transfer_r2") for part, value in parts.items()}
        file.q_family = [self.path.name]
        file.sae_level = {**figures, "compared": {"other/sae": figures}}
        file.write({0: layer, 1: layer})
        self.text = self.path.read_bytes()
        self.content = json.loads(self.text)
        self.other = json.loads(self.text)
        self.other["_run"]["config"]["sae"] = "other/sae"

    def damage(self, rng: random.Random) -> None:
        self.path.write_bytes(damaged_json(self.content, rng) if rng.random() < 0.6 else damaged_bytes(self.text, rng))

    def read(self) -> None:
        found = result_file.read(self.path)
        before, after = ({k: v for k, v in file.items() if k != "_run"} for file in (self.content, found))
        assert before == after, "damaged numbers were taken for results"
        assert self.content["_run"]["sae_level"] == found["_run"]["sae_level"], "so were those of the SAE"
        tables.render([(self.path, found)])
        tables.render([(self.path, found), (self.path, self.other)])
        tables.resource_table([(self.path, found)])
        result_file.RecordFile.open(self.path, self.key, self.run, overwrite=False)


class SaeBench(Reader):
    """Files of SAEBench, as its own classes write them: an accepted file can be compared with ours."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.path = folder / "theirs_eval_results.json"
        made = Path(__file__).resolve().parents[1] / "saebench"
        self.contents = [
            json.loads((made / f"{kind}_eval_results.json").read_text()) for kind in ("core", "sparse_probing")
        ]
        self.whole = saebench.evaluation(self.contents[1], "whole")

    def damage(self, rng: random.Random) -> None:
        content = rng.choice(self.contents)
        text = json.dumps(content).encode()
        self.path.write_bytes(damaged_json(content, rng) if rng.random() < 0.7 else damaged_bytes(text, rng))

    def read(self) -> None:
        found = saebench.read(self.path)
        assert all(math.isfinite(value) for value in found.metrics.values())
        beside_text([self.whole], [found])
        beside_text([], [found])
        for plot in beside_plots([self.whole], [found]):
            plot.csv()
            hash(plot.description)


class Scores(Reader):
    """Stored out-of-fold scores: an accepted file has the written scores, and statistics can be computed from it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.path = scores.path_of(folder / "m_d.json", 3)
        self.stored = scores.LayerScores(
            3, "a" * 64, {"gender": self.probe(24, True), "is_alive": self.probe(12, False)}
        )
        scores.save(self.path, self.stored)
        self.whole = self.path.read_bytes()

    @staticmethod
    def probe(rows: int, control: bool) -> ProbeScores:
        """Return scores of some rows, two of each person, in two partitions into three folds."""
        random = np.random.default_rng(rows)
        labels = np.arange(rows) // 2 % 2 == 0
        views = {
            view: (random.normal(size=(2, rows)) + labels).astype(np.float16) for view in ("model", "sae", "transfer")
        }
        folds = np.stack([np.arange(rows) // 2 % 3, np.arange(rows) // 4 % 3]).astype(np.int8)
        parts = {"control_scores": views["model"][0], "control_labels": ~labels} if control else {}
        parts |= {"outliers": np.arange(rows) == 0}
        return ProbeScores(views, labels, np.arange(rows) // 2, np.ones(rows), folds, **parts)

    def damage(self, rng: random.Random) -> None:
        self.forged = rng.random() < 0.2
        if self.forged:
            scores.save(
                self.path, replace(self.stored, probes={"gender": self.forge(self.stored.probes["gender"], rng)})
            )
        else:
            self.path.write_bytes(damaged_safetensors(self.whole, rng))

    @staticmethod
    def forge(probe: ProbeScores, rng: random.Random) -> ProbeScores:
        """Return a file with one invalid number and a correct digest."""
        part = rng.choice([*sorted(vars(probe).keys() - {"views"}), "model", "sae"])
        values = np.array(probe.views[part] if part in probe.views else getattr(probe, part))
        odd = [0, 1, -1, 127, -128] if values.dtype.kind in "bi" else [0, -1, 1e-30, 6e4, math.nan, math.inf, -math.inf]
        values.flat[rng.randrange(values.size)] = rng.choice(odd)
        if rng.random() < 0.1:
            values[...] = rng.choice(odd)
        return (
            replace(probe, views={**probe.views, part: values})
            if part in probe.views
            else replace(probe, **{part: values})
        )

    def read(self) -> None:
        found = scores.load(self.path)
        scores.compute(found)
        if self.forged:
            return
        assert (found.layer, found.key) == (self.stored.layer, self.stored.key)
        assert found.probes.keys() == self.stored.probes.keys()
        for name, probe in self.stored.probes.items():
            for before, after in ((vars(probe), vars(found.probes[name])), (probe.views, found.probes[name].views)):
                for part in before.keys() - {"views"}:
                    assert np.array_equal(before[part], after[part]), f"damaged {part} were taken for scores"


class KeptTexts(Reader):
    """Stored texts: an accepted file has the written texts."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.path = texts.path_of(folder / "m_d.json")
        self.path.parent.mkdir()
        written = [texts.Text(f"{name} was born", 0, len(name), name) for name in ("Ada", "Bob", "Zoë")]
        self.written = texts.KeptTexts("a" * 64, written, {"gender": np.arange(3), "is_alive": np.array([2, 0])})
        self.whole = texts.to_bytes(self.written)
        self.content = json.loads(gzip.decompress(self.whole))

    def damage(self, rng: random.Random) -> None:
        self.forged = rng.random() < 0.6
        if not self.forged:
            self.path.write_bytes(damaged_bytes(self.whole, rng))
            return
        content = damaged_json(self.content, rng)
        try:  # with the digest of the damaged content
            found = json.loads(content)
            found["sha256"] = texts.digest({name: part for name, part in found.items() if name != "sha256"})
            content = json.dumps(found).encode()
        except (ValueError, TypeError, AttributeError, RecursionError):
            pass
        self.path.write_bytes(gzip.compress(content))

    def read(self) -> None:
        found = texts.load(self.path)
        assert all(0 <= place < len(found.texts) for rows in found.rows.values() for place in rows)
        if not self.forged:
            assert found.texts == self.written.texts and found.data == self.written.data


class RowsFile(Reader):
    """A file of rows of this program: an accepted file has the written rows."""

    suffix = "safetensors"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.path = folder / f"rows.{self.suffix}"
        x = np.random.default_rng(0).normal(size=(24, 4)).astype(np.float32)
        labels = np.arange(24) % 2 == 0
        probes = (RowProbe("a", np.arange(24), labels, "one"), RowProbe("b", np.arange(12)[::-1], labels[:12], "two"))
        about = {"layer": 3, "saes": {"s": {}, "t": {}}, "settings": {"folds": 3}}
        self.rows = Rows(x, {"s": x + 1, "t": x * 2}, probes, np.arange(24) // 2, tokens=np.arange(24) % 5, about=about)
        save_rows(self.path, self.rows)
        self.whole = self.path.read_bytes()

    def damage(self, rng: random.Random) -> None:
        self.path.write_bytes(damaged_safetensors(self.whole, rng))

    def read(self) -> None:
        found = load(self.path)
        assert np.array_equal(found.x, self.rows.x), "damaged rows were taken for rows"
        assert found.recons.keys() == self.rows.recons.keys()
        for one, other in zip(found.probes, self.rows.probes, strict=True):
            assert np.array_equal(one.rows, other.rows) and np.array_equal(one.labels, other.labels)


class TorchFile(Reader):
    """A file of torch.save, zip or older, with damaged bytes or a damaged pickle."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.path = folder / "ae.pt"
        self.forms = []
        for is_zip in (True, False):
            content = {"encoder.weight": torch.ones(8, 4), "inner": {"bias": torch.zeros(8)}, "k": 3}
            torch.save(content, self.path, _use_new_zipfile_serialization=is_zip)
            self.forms.append(self.path.read_bytes())

    def damage(self, rng: random.Random) -> None:
        form = rng.randrange(2)
        if form == 0 and rng.random() < 0.5:
            with zipfile.ZipFile(io.BytesIO(self.forms[0])) as whole, zipfile.ZipFile(self.path, "w") as made:
                for member in whole.infolist():
                    content = whole.read(member)
                    is_pickle = member.filename.endswith("data.pkl")
                    made.writestr(member.filename, damaged_bytes(content, rng, 1) if is_pickle else content)
        else:
            self.path.write_bytes(damaged_bytes(self.forms[form], rng))

    def read(self) -> None:
        for tensor in read_torch_file(self.path).values():
            tensor.to(torch.float32, copy=True)


class RowsNpz(RowsFile):
    """A file of rows as .npz."""

    suffix = "npz"

    def damage(self, rng: random.Random) -> None:
        self.path.write_bytes(damaged_bytes(self.whole, rng))


class RowsParquet(RowsNpz):
    """A file of rows as Parquet."""

    suffix = "parquet"


READERS: dict[str, type[Reader]] = {
    "sparsify": SparsifyConfig,
    "sae_lens": LensConfig,
    "safetensors": SafetensorsHeader,
    "csv": Csv,
    "jsonl": Jsonl,
    "result": ResultJson,
    "saebench": SaeBench,
    "scores": Scores,
    "texts": KeptTexts,
    "torch_file": TorchFile,
    "rows": RowsFile,
    "rows_npz": RowsNpz,
    "rows_parquet": RowsParquet,
}


@dataclass
class Tally:
    """Counts of the outcomes of damaged files."""

    accepted: int = 0
    refused: int = 0
    slowest: float = 0.0
    bugs: dict[str, str] = field(default_factory=dict)  # place -> seed and traceback of the first

    @property
    def count(self) -> int:
        return self.accepted + self.refused

    def __str__(self) -> str:
        return (f"{self.count} inputs: {self.accepted} accepted, {self.refused} refused, {len(self.bugs)} bugs, "
                f"slowest {self.slowest:.2f} s")  # fmt: skip


def fuzz(kind: str, folder: Path, count: int | None = None, seconds: float | None = None, first_seed: int = 0) -> Tally:
    """Damage and read `count` files, or as many as fit into the CPU seconds of this process."""
    reader, tally, begin = READERS[kind](folder), Tally(), time.process_time()
    seed = first_seed
    while (count is None or seed < first_seed + count) and (seconds is None or time.process_time() < begin + seconds):
        reader.damage(random.Random(seed))
        start = time.process_time()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                reader.read()
            tally.accepted += 1
        except RequestError:
            tally.refused += 1
        except Exception as error:
            tally.refused += 1
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{type(error).__name__} at {place.filename}:{place.lineno}"
            tally.bugs.setdefault(where, f"seed {seed}: {''.join(traceback.format_exception(error))[-1500:]}")
        spent = time.process_time() - start
        tally.slowest = max(tally.slowest, spent)
        if spent > SLOW:
            tally.bugs.setdefault("slow", f"seed {seed}: {spent:.1f} s")
        seed += 1
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int)
    parser.add_argument("--minutes", type=float, default=10.0, help="for each reader at most (%(default)s)")
    parser.add_argument("--only", choices=READERS)
    parser.add_argument("--first_seed", type=int, default=0)
    asked = parser.parse_args()
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    failed = False
    for kind in [asked.only] if asked.only else READERS:
        with tempfile.TemporaryDirectory() as folder:
            tally = fuzz(kind, Path(folder), asked.count, asked.minutes * 60, asked.first_seed)
        print(f"{kind}: {tally}", flush=True)
        for where, what in tally.bugs.items():
            failed = True
            print(f"--- {where}\n{what}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
