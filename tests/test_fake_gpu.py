"""The CUDA paths without a GPU, with torch's fake tensors, which have a device and a shape but no values.

The model and SAEs are on `cuda:0`, probes on `cuda:1`. An operation on tensors of two devices raises
`FakeTensorDeviceMismatchError`. An operation that needs a value on the CPU raises `GpuWaits`: a real GPU would be
synchronised there. The tests run the code between those places.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import people
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorDeviceMismatchError, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from delta_selectivity.models.language_model import LanguageModel, Site, WholeModel, open_model
from delta_selectivity.models.places import find_tap
from delta_selectivity.probing.backends.lbfgs import Loss
from delta_selectivity.probing.backends.problem import ProbeProblem
from delta_selectivity.probing.backends.torch_dense import DenseDesign, InverseHessian
from delta_selectivity.run import downstream
from delta_selectivity.run.activations import BlockDone, LayerRows, Producer, plan_blocks
from delta_selectivity.run.downstream import DownstreamPass
from delta_selectivity.run.reconstruction import ReconstructionSums, SiteScale
from delta_selectivity.run.row_store import RowStore
from delta_selectivity.run.rows import RowTable
from delta_selectivity.run.token_sample import TokenSample
from delta_selectivity.saes import LinearCoder, Sae
from delta_selectivity.saes import selection as selections
from delta_selectivity.saes.coders import SkipCoder
from delta_selectivity.saes.selection import Dense, Gated, GroupMax, Threshold, TopK
from delta_selectivity.system.cores import Cores
from delta_selectivity.system.stopwatch import Stopwatch
from delta_selectivity.tasks import Dataset, Mention, Probe, ProbeTexts, tokenise

SITES = [Site(0, "resid_post"), Site(2, "resid_post")]
MODEL_GPU, PROBE_GPU = torch.device("cuda:0"), torch.device("cuda:1")


VALUES = {
    Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__, Tensor.item, Tensor.tolist, Tensor.numpy,
    Tensor.cpu, Tensor.nonzero, Tensor.unique,
}  # fmt: skip
"""Operations that need a tensor's values, or a number that only the device knows."""


class GpuWaits(Exception):
    """The CPU needs a value from a GPU."""


class PretendGpus(TorchFunctionMode):
    """Mode in which tensors that are created on or moved to a CUDA device are fake; CPU tensors stay real."""

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        named = [kwargs.get("device"), *args[1:2]]
        if args and isinstance(args[0], FakeTensor) and args[0].device.type == "cuda":
            to_cpu = func is Tensor.to and any(str(name) == "cpu" for name in named)
            if func in VALUES or to_cpu:
                raise GpuWaits(func.__name__)
            if func is Tensor.__getitem__:  # these query the device itself, in C++
                return picked(*args)
            if func is Tensor.__setitem__:
                place, value = picked(*args[:2]), args[2]
                with self.fake:
                    return torch.ops.aten.copy_(place, value) if isinstance(value, Tensor) else place.fill_(value)
            if func is Tensor.copy_:
                func = torch.ops.aten.copy_
            if func is Tensor.contiguous:
                func, args, kwargs = Tensor.clone, args[:1], {"memory_format": torch.contiguous_format}
        moved = any(is_cuda(name) for name in named)
        if moved and isinstance(args[0], Tensor) and not isinstance(args[0], FakeTensor):
            args = (self.fake.from_tensor(args[0]), *args[1:])
        if moved or any(isinstance(part, FakeTensor) for part in tree_leaves((args, kwargs))):
            with self.fake:
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def put(self, module: nn.Module, device: torch.device) -> nn.Module:
        """Move a module's parameters and buffers to a device."""
        for part in module.modules():
            for name, tensor in [*part.named_parameters(recurse=False)]:
                setattr(part, name, nn.Parameter(tensor.detach().to(device), requires_grad=False))
            for name, tensor in [*part.named_buffers(recurse=False)]:
                part.register_buffer(name, tensor.to(device), persistent=False)
        return module


def picked(tensor: Tensor, index: object) -> Tensor:
    """Compute `tensor[index]` by basic operations, because the shortcut in C++ queries the device itself."""
    axis, places = 0, []
    for part in index if isinstance(index, tuple) else (index,):
        if isinstance(part, int):
            tensor = tensor.select(axis, part)
        elif part is ...:
            left = index[index.index(...) + 1 :]
            axis = tensor.ndim - sum(1 for one in left if one is not None)
        elif part is None:
            tensor, axis = tensor.unsqueeze(axis), axis + 1
        elif isinstance(part, slice):
            tensor, axis = torch.ops.aten.slice.Tensor(tensor, axis, part.start, part.stop, part.step or 1), axis + 1
        else:
            places, axis = [*places, *[None] * (axis - len(places)), part], axis + 1
    return torch.ops.aten.index.Tensor(tensor, places) if places else tensor


def is_cuda(name: object) -> bool:
    return isinstance(name, str | torch.device) and str(name).startswith("cuda")


@pytest.fixture
def gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (2**36, 2**36))
    # fake tensors do not support `to` in inference mode, so only gradients are switched off
    monkeypatch.setattr(torch.inference_mode, "__enter__", lambda mode: torch._C._set_grad_enabled(False))
    monkeypatch.setattr(torch.inference_mode, "__exit__", lambda mode, *error: torch._C._set_grad_enabled(True))
    with PretendGpus() as mode:
        yield mode


@pytest.fixture
def mentions():
    return [Mention(str(r["text"]), r["start"], r["end"], str(r["group"])) for r in people(40)]


@pytest.fixture
def texts(mentions):
    probe = Probe("p", np.arange(len(mentions)), np.arange(len(mentions)) % 2 == 0)
    return ProbeTexts(tuple(mentions), np.arange(len(mentions)), (Dataset("p", "p", (probe,)),))


@pytest.fixture
def model(gpus, tiny_model):
    info = open_model(str(tiny_model))
    loaded = info.load(SITES, "cpu", "float32")
    module = gpus.put(loaded.module, MODEL_GPU)
    return LanguageModel(module, {site: find_tap(module, site) for site in SITES}, MODEL_GPU)


def coder(selection, d: int = 32, d_sae: int = 96) -> LinearCoder:
    return LinearCoder(torch.rand(d_sae, d), torch.rand(d_sae), torch.rand(d_sae, d), torch.rand(d), selection)


CODERS = {
    "topk": lambda: coder(TopK(4)),
    "groupmax": lambda: coder(GroupMax(4)),
    "dense": lambda: coder(Dense()),
    "skip": lambda: SkipCoder(coder(TopK(4)), torch.rand(32, 32)),
}
NORMS = ("none", "centre", "layer_norm", "expected_average_only_in")


def sae(kind: str = "topk", **changes) -> Sae:
    made = Sae(kind, 0, "resid_post", 32, 96, 4, kind, CODERS[kind]().to(MODEL_GPU))
    return replace(made, **changes)


def produce(model, saes, texts, tokenised, positions, whole_tokens, latents_of=()):
    """Return everything that the producer outputs, batch by batch."""
    rows = RowTable.build(tokenised, positions)
    sample = TokenSample.draw(tokenised, texts, whole_tokens, seed=0)
    scales = {site: SiteScale(torch.rand(32), 3.0) for site in SITES}
    producer = Producer(
        model, saes, dict.fromkeys(range(9), False), tokenised, rows, None, Cores(1), Stopwatch(), sample, scales,
        latents_of, 256,
    )  # fmt: skip
    items: list[LayerRows | BlockDone] = []
    producer.run(plan_blocks(texts), items.append, lambda n: None)
    return rows, items


@pytest.fixture
def tokenised(tiny_model, mentions):
    info = open_model(str(tiny_model))
    return tokenise(mentions, info.tokenizer, prepend_bos=True, max_length=info.max_length)


@pytest.fixture
def sums_stay(monkeypatch):
    """Keep a block's sums on the device: the producer would copy them to the CPU, but they have no values."""
    monkeypatch.setattr(ReconstructionSums, "to", lambda self, device: self)


@pytest.mark.parametrize(
    ("kind", "positions", "whole_tokens"),
    [
        ("topk", "last", None),
        ("topk", "mean", 100),
        ("groupmax", "all", 100),
        ("dense", "last", 100),
        ("skip", "mean", None),
    ],
)
def test_the_producer_never_synchronises_and_mixes_no_devices(
    gpus, model, texts, tokenised, sums_stay, kind, positions, whole_tokens
):
    """Covers forward pass, encode and decode of every SAE, the sums and the rows: from token ids to the queue."""
    saes = {site: {0: sae(kind), 1: sae(kind, input_hookpoint=None)} for site in SITES}
    latents_of = (0,) if positions == "last" else ()  # codes of `mean` are selected by their number
    rows, items = produce(model, saes, texts, tokenised, positions, whole_tokens, latents_of)
    (done,) = (item for item in items if isinstance(item, BlockDone))
    batches = [item for item in items if isinstance(item, LayerRows)]
    assert sum(len(item.row_ids) for item in batches) == len(rows) * len(SITES)
    for item in batches:
        on_gpu = [item.x, *item.recons.values(), *(codes.value for codes in item.latents.values())]
        assert {tensor.device for tensor in on_gpu} == {MODEL_GPU}
        assert {tensor.device for tensor in item.broken.values()} == {MODEL_GPU}
        assert item.row_ids.device.type == "cpu" and not isinstance(item.row_ids, FakeTensor)
    for part in done.sums.values():
        (whole,) = part.whole.values()
        tensors = [whole.fired, whole.products, whole.ordinary.mean, whole.outliers.n, part.probed.others]
        assert {tensor.device for tensor in tensors} == {MODEL_GPU}


def test_downstream_synchronises_only_for_its_sums(gpus, tiny_model, tokenised, monkeypatch):
    whole = open_model(str(tiny_model)).load_whole(SITES, "cpu", "float32")
    module = gpus.put(whole.module, MODEL_GPU)
    model = WholeModel(module, {site: find_tap(module.get_decoder(), site) for site in SITES}, MODEL_GPU)
    waited = []

    def counted(sums):
        waited.append(sums.device)
        return torch.zeros(sums.shape, dtype=torch.float64)

    monkeypatch.setattr(downstream, "_on_cpu", counted)
    saes = {site: {0: sae(), 1: sae("dense")} for site in SITES}
    mentions = np.arange(len(tokenised.ids))
    one = DownstreamPass(model, saes, {0: False, 1: True}, tokenised, "mean", mentions, Cores(1))
    found = one.run(lambda n: None)
    assert len(found) == 4
    assert set(waited) == {MODEL_GPU}
    assert len(waited) == 4 + 2 + 4 + 8, "one batch: means, the model as it is, four SAEs, means and zeros"


@pytest.mark.parametrize("norm", NORMS)
def test_encode_and_decode_stay_on_the_sae_s_device(gpus, norm):
    one = sae(input_norm=norm)
    codes = one.encode(torch.rand(300, 32).to(MODEL_GPU))
    recon = one.decode(codes, None)
    assert (codes.value.device, recon.device, recon.dtype) == (MODEL_GPU, MODEL_GPU, torch.float32)


@pytest.mark.parametrize("selection", [Threshold(torch.zeros(96)), Gated(torch.ones(96), torch.zeros(96))])
def test_saes_with_a_varying_l0_synchronise_only_to_count_latents(gpus, selection, monkeypatch):
    """There is one wait for each chunk of rows: `nonzero`."""
    found = []
    where = selections._layout_of
    monkeypatch.setattr(selections, "_layout_of", lambda mask: found.append(mask.device) or where(mask))
    one = sae()
    one = replace(one, coder=replace(one.coder, selection=selection.to(MODEL_GPU)))
    with pytest.raises(GpuWaits, match="nonzero"):
        one.encode(torch.rand(300, 32).to(MODEL_GPU))
    assert found == [MODEL_GPU]


def test_rows_are_checked_on_the_probes_device_when_they_are_read(gpus, model, texts, tokenised, sums_stay):
    saes = {site: {0: sae()} for site in SITES}
    table, items = produce(model, saes, texts, tokenised, "last", None)
    widths = {(site, view): 32 for site in SITES for view in (None, 0)}
    with RowStore(widths, len(table), PROBE_GPU, 2**30) as store:
        assert store.place == "gpu"
        for item in items:
            if isinstance(item, LayerRows):
                store.put(item)
        ids = torch.arange(10)
        with pytest.raises(GpuWaits):  # whether a number was broken: once for each view, when its dataset is complete
            store.get(SITES[0], 0, ids, PROBE_GPU)
        store._broken.clear()
        assert store.get(SITES[0], 0, ids, PROBE_GPU).device == PROBE_GPU


@pytest.mark.parametrize("d", [16, 64], ids=["float64", "float32 first"])
def test_the_solver_s_steps_stay_on_the_probes_device(gpus, d):
    """Covers an iteration, except for the checks whether it was the last and whether the Cholesky factor exists."""
    rows, n = 3000, 8
    problem = object.__new__(ProbeProblem)  # its checks need values
    fields = {
        "x": torch.rand(rows, d).to(PROBE_GPU), "labels": torch.rand(2, rows) > 0.5, "weight": torch.ones(4, rows),
        "scale": torch.ones(4, d), "cs": (0.1, 1.0),
    }  # fmt: skip
    for name, value in fields.items():
        object.__setattr__(problem, name, value)
    design = DenseDesign.build(problem)
    index = torch.arange(n).to(PROBE_GPU)
    weight = problem.weight.to(PROBE_GPU)[index % 4].double()
    exact = design.columns(index, index % 4, Loss.of(problem.labels.to(PROBE_GPU)[index // 4], weight)).scaled(0.1)
    theta = design.start(n)
    gram = design.preconditioners(n)._weighted_gram(exact.loss.curvature(exact.margins(theta)).sum(dim=0).float())
    columns = [exact, exact.in_float32()] if d == 64 else [exact]
    assert None not in columns
    for one in columns:
        at = theta.to(one.loss.weight.dtype)
        margins = one.margins(at)
        each = gram.expand(n, *gram.shape)
        for preconditioner in (InverseHessian(gram, None), InverseHessian(gram, gram), InverseHessian(each, each)):
            gradient, newton = one.gradients(at, one.loss.residual(margins), preconditioner)
            near = one.quadratic_at(at, margins, gradient)
            found = [margins, gradient, newton, *one.line_terms(newton), *one.norms(at, margins, gradient, newton)]
            found += near.gradients(at, near.loss.residual(margins), preconditioner)
            assert {tensor.device for tensor in found} == {PROBE_GPU}
    coef, intercept = exact.select(index[:3]).coefficients(theta[:3])
    assert (coef.device, intercept.shape) == (PROBE_GPU, (3,))


def test_mixing_devices_is_an_error(gpus):
    """The tests above rely on this."""
    one, other, here = torch.rand(3).to(MODEL_GPU), torch.rand(3).to(PROBE_GPU), torch.rand(3)
    for pair in ((one, other), (one, here), (here, other)):
        with pytest.raises(FakeTensorDeviceMismatchError):
            torch.add(*pair)
    for value in (lambda: int(one[0]), lambda: bool(one.any()), one.tolist, one.cpu, lambda: one.to("cpu")):
        with pytest.raises(GpuWaits):
            value()
