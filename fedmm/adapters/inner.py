"""Adapters inside the layers of frozen modules: peft's LoRA, or bottlenecks, in named sets like those of a NanoEdge.

    LoRA        W x  ->  W x + mean over the acting sets of (alpha / r) B A x     B zero at start
    bottleneck  y    ->  y + mean over the acting sets of U relu(D y)             U zero at start; y a module's output

Both start as the identity. A bottleneck stands behind the MLP of a layer; with `inner.targets=[o_proj,mlp]` behind the
attention too, as in Houlsby et al. 2019. No biases, so that equal ranks are equal counts of parameters.
Source: Hu et al. 2021; Pfeiffer et al. 2021 for the place; FedDAT 2023's released code for relu and for the mean of two
adapters' outputs (its own stand behind the residual sum in ViLT, and have biases).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DOWN, UP = ("lora_A", "bottleneck_down"), ("lora_B", "bottleneck_up")
"""How the names of the factors end: the one that is drawn at the start, the one that is zero."""


def lora(
    module: nn.Module,
    sets: Sequence[str],
    *,
    rank: int = 4,
    alpha: float = 8.0,  # twice the rank, as for NanoAdapters
    targets: Sequence[str] = ("q_proj", "v_proj"),  # Hu et al. 2021, section 7.1: of equal budgets the best
) -> None:
    """peft's LoRA on the layers that `targets` name. Raises ValueError where they name none."""
    if not inject([module], sets, rank=rank, alpha=alpha, targets=targets):
        raise ValueError(_nowhere(module, targets))


def bottleneck(
    module: nn.Module,
    sets: Sequence[str],
    *,
    rank: int = 8,
    targets: Sequence[str] = ("mlp",),  # Pfeiffer et al. 2021's place
) -> None:
    """A bottleneck behind every module that `targets` name, each of which gives a tensor as wide as the embeddings.

    Raises ValueError where they name none.
    """
    found = [path for path, _ in module.named_modules() if path.rpartition(".")[2] in targets]
    if not found:
        raise ValueError(_nowhere(module, targets))
    width = cast(Any, module).config.hidden_size
    for path in found:
        parent, _, name = path.rpartition(".")
        setattr(module.get_submodule(parent), name, Bottleneck(module.get_submodule(path), width, rank, sets))


class Bottleneck(nn.Module):
    """A frozen module and the bottlenecks behind it, in fp32; it is switched like a layer of peft's."""

    def __init__(self, base: nn.Module, width: int, rank: int, sets: Sequence[str]) -> None:
        super().__init__()
        device = next(base.parameters()).device
        self.base = base
        self.bottleneck_down = nn.ParameterDict({name: torch.zeros(rank, width, device=device) for name in sets})
        self.bottleneck_up = nn.ParameterDict({name: torch.zeros(width, rank, device=device) for name in sets})
        self._weights: dict[str, float] = {}

    def set_adapter(self, names: Sequence[str]) -> None:
        self._weights = dict.fromkeys(names, 1.0)

    def set_scale(self, name: str, weight: float) -> None:
        self._weights[name] = weight

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        y = self.base(*args, **kwargs)
        x = out = y.float()
        for name, weight in self._weights.items():
            hidden = F.relu(F.linear(x, self.bottleneck_down[name]))
            out = out + weight * F.linear(hidden, self.bottleneck_up[name])
        return out.to(y.dtype)


class Inner:
    """The adapters inside some modules, and which of their sets act now. The modules are named in their parameters."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.use: tuple[str, ...] = ()
        self._modules = modules
        self._layers = _layers(modules.values()) if modules else []

    def act(self, use: Sequence[str]) -> None:
        """Let exactly these sets act, each with weight 1 / len(use). Who is trained stays as it is."""
        if self.use == tuple(use):
            return
        for layer in self._layers:
            trained = [(parameter, parameter.requires_grad) for parameter in layer.parameters()]
            layer.set_adapter(list(use))
            for parameter, flag in trained:  # peft lets whatever acts be trained, and nothing else
                parameter.requires_grad_(flag)
            for name in use:
                layer.set_scale(name, 1 / len(use))
        self.use = tuple(use)

    def trainable(self, name: str) -> dict[str, nn.Parameter]:
        """The parameters of one set, under names that are the same in every set."""
        return {
            f"{place}.{path.removesuffix('.weight').removesuffix(f'.{name}')}": parameter
            for place, module in self._modules.items()
            for path, parameter in module.named_parameters()
            if path.removesuffix(".weight").endswith(tuple(f".{factor}.{name}" for factor in (*DOWN, *UP)))
        }


def inject(
    modules: Sequence[nn.Module], sets: Sequence[str], *, rank: int, alpha: float, targets: Sequence[str]
) -> bool:
    """peft's LoRA, in fp32, wherever `targets` name a module within `modules`; says whether they name any."""
    from peft import LoraConfig, LoraModel  # seconds to import

    for module in modules:
        names = {path.rsplit(".", 1)[-1] for path, _ in module.named_modules()}
        found = [name for name in targets if name in names]
        config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=found)  # type: ignore[arg-type]
        if found:
            tuner = LoraModel(module, dict.fromkeys(sets, config), sets[0])
            for name in sets[1:]:
                tuner.inject_adapter(module, name)
    made = [p for module in modules for path, p in module.named_parameters() if "lora_" in path]
    for parameter in made:
        parameter.data = parameter.data.float()  # as wide as they travel; peft makes them as narrow as the layer
    return bool(made)


def _layers(modules: Any) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer  # seconds to import

    return [module for root in modules for module in root.modules() if isinstance(module, (BaseTunerLayer, Bottleneck))]


def _nowhere(module: nn.Module, targets: Sequence[str]) -> str:
    names = {path.rpartition(".")[2] for path, _ in module.named_modules()}
    known = ", ".join(sorted(name for name in names if name and not name.isdecimal()))
    return f"inner.targets={list(targets)} names no layer of the LLM; its layers have {known}"
