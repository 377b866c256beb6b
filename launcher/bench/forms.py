"""The forms in which one model can be run, each with why it is not run where it is not."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from launcher.bench.engines import elsewhere, engines
from launcher.bench.form import Form
from launcher.export.source import Source
from sclcore.export import ExportError, load_semi_structured
from sclcore.export.folding import fold_batch_norm
from sclcore.export.removal import remove_dead_features
from sclcore.export.semi_structured import patterns
from sclcore.network.connections import find_connections


class CsrLinear(nn.Module):
    """A Linear that multiplies by its live weights alone: torch's sparse CSR on the CPU.

    Input [..., in], output [..., out], as of the Linear it takes the place of.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
            self.weight = linear.weight.detach().to_sparse_csr()
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out = (self.weight @ rows.T).T
        out = out if self.bias is None else out + self.bias
        return out.reshape(*x.shape[:-1], -1)


def forms(source: Source, device: torch.device, folder: Path) -> list[Form]:
    """Every form; the first is the model as it is, which the others are compared with.

    `folder` holds what they are read from, until all is measured.
    """
    model = copy.deepcopy(source.model).float()
    example = source.network.example(2)
    smaller, smaller_form = _smaller(model, example)
    in_torch = [
        _in_torch("as trained", _torch(model, device)),
        _in_torch("without a zero", _torch(_filled(model), device)),
        smaller_form if smaller is None else _in_torch(smaller_form.name, _torch(smaller, device)),
        _csr(model, device),
        _semi_structured(model, device),
    ]
    if device.type != "cpu":
        return [*in_torch, *elsewhere()]
    return [*in_torch, *engines(model, smaller, example, folder)]


def _in_torch(name: str, model: nn.Module) -> Form:
    return Form(name, lambda _: model, engine="torch")


def _torch(model: nn.Module, device: torch.device) -> nn.Module:
    model = copy.deepcopy(model).eval().requires_grad_(False)
    return model.to(device, torch.float16 if device.type == "cuda" else torch.float32)


def _filled(model: nn.Module) -> nn.Module:
    """`model` with random weights and no zeros: the difference in time is the zeros' worth."""
    filled = copy.deepcopy(model)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for connection in find_connections(filled):
            nn.init.xavier_normal_(connection.parameter)
    return filled


def _smaller(model: nn.Module, example: Tensor) -> tuple[nn.Module | None, Form]:
    # With batch norm folded, which onnxruntime does by itself.
    name = "dead features removed"
    try:
        smaller, _ = remove_dead_features(model, example[:1])
        return fold_batch_norm(smaller, example[:1])[0], Form(name, None)
    except ExportError as error:
        return None, Form(name, None, str(error))


def _csr(model: nn.Module, device: torch.device) -> Form:
    name = "Linear as sparse CSR"
    if device.type != "cpu":
        return Form(name, None, "measured on the CPU: --device cpu")
    sparse = copy.deepcopy(model)
    linears = [(n, m) for n, m in sparse.named_modules() if type(m) is nn.Linear and n]
    for path, linear in linears:
        parent, _, attribute = path.rpartition(".")
        setattr(sparse.get_submodule(parent), attribute, CsrLinear(linear))
    if not linears:
        return Form(name, None, "the model has no Linear")
    return _in_torch(name, sparse.eval().requires_grad_(False))


def _semi_structured(model: nn.Module, device: torch.device) -> Form:
    name = "2:4"
    if device.type != "cuda":
        return Form(name, None, "needs a GPU")
    if not any(p.qualifies for p in patterns(model)):
        return Form(name, None, "no layer is 2:4: see scl export --format 2:4")
    converted = copy.deepcopy(model).eval().requires_grad_(False)
    load_semi_structured(converted)
    return _in_torch(name, converted)
