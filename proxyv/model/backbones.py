"""Moving the weights of loaded backbones into a model that was built on the meta device."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["adopt", "materialise"]

_FRESH = (".guided_update.", ".proxy_initializer.", ".light_mlp.")


def adopt(target: nn.Module, source: nn.Module, name: str) -> None:
    """Move a backbone's weights into a module on the meta device; new modules stay there."""
    missing, unexpected = target.load_state_dict(source.state_dict(), strict=False, assign=True)
    missing = [key for key in missing if not any(mark in key for mark in _FRESH)]
    if missing or unexpected:
        raise ValueError(
            f"{name} does not fit its configuration: missing {missing}, unexpected {unexpected}"
        )
    for parameter in target.parameters():
        if not parameter.is_meta:
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]


def materialise(model: nn.Module) -> None:
    """Give tensors that are still on the meta device (empty) memory."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                empty = torch.empty_like(parameter, device="cpu")
                setattr(module, name, nn.Parameter(empty, requires_grad=parameter.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
