"""What makes the same training faster: memory layout, compiling, cuDNN's choice, recomputing."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from launcher.cluster.accelerator import accelerator
from launcher.errors import UsageError
from launcher.recipe.engine import EngineConfig


def set_arithmetic(config: EngineConfig, device: torch.device) -> None:
    """What this process may do in TF32, and whether cuDNN tries its algorithms out."""
    if device.type != "cuda":
        return
    torch.backends.cudnn.allow_tf32 = config.tf32
    torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
    torch.backends.cudnn.benchmark = config.autotune


def make_fast(model: nn.Module, config: EngineConfig) -> None:
    """Have calls of `model` keep no activations and go through `torch.compile`, as is asked for.

    In place: its tensors and their names stay as they are.
    """
    if config.recompute:
        _recompute(model)
    if config.compile != "off":
        model.compile(mode=config.compile)


def set_layout(model: nn.Module, config: EngineConfig) -> None:
    """Lay out the weights of convolutions as is asked for; after DeepSpeed has sent them round.

    It sends memory as it lies, and refuses other strides.
    """
    if config.channels_last:
        for parameter in model.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def check_fast(config: EngineConfig, model: nn.Module, image: Tensor, name: str) -> None:
    """Refuse what cannot work with this model or on this machine; both on the meta device.

    Raises UsageError.
    """
    if config.channels_last and config.zero_stage:
        raise UsageError(
            f"engine.channels_last does nothing with engine.zero_stage={config.zero_stage}, which "
            "lays weights end to end: leave one of them out"
        )
    if config.compile != "off" and config.zero_stage == 3:
        raise UsageError(
            f"engine.compile={config.compile} and engine.zero_stage=3 do not go together: what "
            "puts each layer's weights together breaks the graph at every layer; take "
            "engine.compile=off or a lower stage"
        )
    if config.recompute:
        _recompute(model, name)
    if config.compile != "off":
        _check_compiler(config)
        _check_traced(config, model, image, name)


def _recompute(model: nn.Module, name: str = "") -> None:
    if any(isinstance(module, _BatchNorm) for module in model.modules()):
        raise UsageError(
            f"engine.recompute: {name} has batch norm, whose statistics would take in every batch "
            "twice: leave it out"
        )
    switch: Callable[..., Any] | None = getattr(model, "set_grad_checkpointing", None)
    try:
        if switch is None:
            raise AssertionError
        switch(True)
    # What timm's models without it raise.
    except AssertionError:
        raise UsageError(
            f"engine.recompute: {name} cannot compute its activations again: leave it out"
        ) from None


def _check_compiler(config: EngineConfig) -> None:
    if accelerator() == "cuda":
        if importlib.util.find_spec("triton") is None:
            raise UsageError(f"engine.compile={config.compile} needs triton: pip install triton")
    elif shutil.which("c++") is None and shutil.which("g++") is None:
        raise UsageError(
            f"engine.compile={config.compile} needs a C++ compiler: install one, such as g++"
        )


def _check_traced(config: EngineConfig, model: nn.Module, image: Tensor, name: str) -> None:
    try:
        with torch.no_grad():
            torch.compile(model.eval(), backend="eager", fullgraph=True)(image)
    # A model may resist in any way.
    except Exception as error:
        reason = " ".join(str(error).split("\n")[0].split())[:200]
        raise UsageError(
            f"engine.compile={config.compile}: {name} cannot be traced as one graph ({reason}); "
            "take engine.compile=off"
        ) from error
    finally:
        torch._dynamo.reset()
