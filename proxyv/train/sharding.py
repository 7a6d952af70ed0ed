"""Building a model in shares: with ZeRO-3, no rank but the first ever holds it whole.

The first rank builds or loads the model on its CPU, with all checks; the others build it on the
meta device. Then transformers builds it once more under ``deepspeed.zero.Init``, which leaves each
rank its share of every parameter, and fills it from the first rank. So the weights are bit by bit
those of one process, new modules included.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from proxyv.model.modeling import ProxyVForConditionalGeneration
from proxyv.train.arguments import deepspeed_config
from proxyv.train.ranks import rank
from proxyv.train.settings import Settings

__all__ = ["build_in_shares", "in_shares"]


def in_shares(settings: Settings) -> bool:
    """Whether the run has several ranks, and DeepSpeed's file shards parameters (stage 3)."""
    zero = (deepspeed_config(settings) or {}).get("zero_optimization", {})
    return zero.get("stage") == 3 and int(os.environ.get("WORLD_SIZE", "1")) > 1


def build_in_shares(make: Callable[[], Any], settings: Settings) -> Any:
    """Build a model of which each rank holds its share.

    Args:
        make: builds the whole model; called on the first rank alone.
        settings: of the run.

    Raises:
        ValueError: as ``make`` raises it, on every rank.
        OSError: likewise.
    """
    import deepspeed
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    backend = "nccl" if torch.cuda.is_available() else "gloo"
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)
    model = _make_on_first(make)
    dtype, generation = model.dtype, model.generation_config
    kept = HfDeepSpeedConfig(_for_building(settings))  # transformers looks for it, and holds it not
    try:
        with _same_draws():
            shared = ProxyVForConditionalGeneration.from_pretrained(
                None, config=model.config, state_dict=dict(model.state_dict()), dtype=dtype
            )
    finally:
        unset_hf_deepspeed_config()
        del kept
    shared.generation_config = generation
    return shared


def _make_on_first(make: Callable[[], Any]) -> Any:
    """The whole model on the first rank, and the same on the meta device on all others."""
    model: Any = None
    said: Any = None
    if rank() == 0:
        try:
            model = make()
            said = model.config, model.generation_config, model.dtype
        except (ValueError, OSError) as error:
            said = error
    said = _from_first(said)
    if isinstance(said, Exception):
        raise said
    config, generation, dtype = said
    if model is None:
        with torch.device("meta"):
            model = ProxyVForConditionalGeneration._from_config(config, dtype=dtype)
        model.generation_config = generation
    return model


def _from_first(value: Any) -> Any:
    """The first rank's value, on every rank."""
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


@contextmanager
def _same_draws() -> Iterator[None]:
    """All ranks draw from here on what a single process would, and nothing within is drawn."""
    state = _from_first(torch.get_rng_state())
    yield
    torch.set_rng_state(state)


def _for_building(settings: Settings) -> dict[str, Any]:
    """DeepSpeed's file as ``zero.Init`` takes it: what the trainer fills in later is left out."""
    config = _without_auto(deepspeed_config(settings) or {})
    config["train_micro_batch_size_per_gpu"] = settings.optim.micro_batch
    config["bf16"] = {"enabled": settings.model.dtype == "bfloat16"}
    return config


def _without_auto(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: _without_auto(item) for key, item in value.items() if item != "auto"}
