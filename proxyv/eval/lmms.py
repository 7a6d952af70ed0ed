"""ProxyV as a model of lmms-eval: ``lmms-eval --model proxyv --model_args pretrained=DIR ...``.

The package's entry point ``lmms_eval.models`` names `manifest`. This is the only file that needs
lmms-eval (``pip install proxyv[lmms]``, or ``bash scripts/lmms_env.sh`` for an environment of its
own that keeps torch as it is).

Source: lmms-eval 0.7.3, models/simple/llava.py. Differs: tasks that ask for sampling or beams are
refused, and questions are answered in batches of similar length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image
from tqdm.auto import tqdm

from proxyv.eval.answerer import Answerer, user_message
from proxyv.eval.team import join_team, own_gpu
from proxyv.model.images import to_rgb

__all__ = ["ProxyV", "manifest"]

MAX_NEW_TOKENS = 1024  # where a task names no number


def manifest() -> ModelManifest:
    """What lmms-eval registers when it starts."""
    return ModelManifest(model_id="proxyv", simple_class_path="proxyv.eval.lmms.ProxyV")


class Request(NamedTuple):
    """A question of lmms-eval's, and its place among all."""

    place: int
    message: dict[str, str]
    images: list[Image.Image]
    max_new_tokens: int


class ProxyV(lmms):
    """A model behind lmms-eval's simple interface.

    Args:
        pretrained: model folder, or hub id.
        device: see `Answerer.load`, as for the next three.
        dtype: kind of numbers.
        attn_implementation: attention backend.
        template: chat template.
        batch_size: questions at a time.
        others: options that lmms-eval gives every model, which have no meaning here.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        dtype: str | None = None,
        attn_implementation: str = "sdpa",
        template: str = "auto",
        batch_size: int | str = 1,
        **others: Any,
    ) -> None:
        super().__init__()
        unknown = sorted(set(others) - {"max_batch_size"})
        if unknown:
            raise ValueError(
                f"--model_args {', '.join(unknown)}: unknown; pretrained, dtype, "
                "attn_implementation and template are allowed"
            )
        team = join_team(device)
        self._rank, self._world_size = team.rank, team.size
        if not (device or "").startswith("cpu"):
            device = own_gpu(team) or device  # lmms-eval may name one GPU to all processes
        self.batch_size = int(batch_size)
        self.answerer = Answerer.load(
            pretrained,
            dtype=dtype,
            attention=attn_implementation,
            device=device,
            template=template,
        )

    @property
    def device(self) -> Any:
        """Where the model is."""
        return self.answerer.device

    @property
    def rank(self) -> int:
        """Number of this process."""
        return self._rank

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self._world_size

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Answer every request, in the order in which they were given."""
        answers = [""] * len(requests)
        ordered = sorted(range(len(requests)), key=lambda place: -len(requests[place].args[0]))
        bar = tqdm(total=len(requests), disable=self.rank != 0, desc="proxyv")
        for start in range(0, len(ordered), self.batch_size):
            chosen = ordered[start : start + self.batch_size]
            batch = [self._request(place, requests[place]) for place in chosen]
            for longest in {request.max_new_tokens for request in batch}:
                group = [request for request in batch if request.max_new_tokens == longest]
                texts = self.answerer.reply(
                    [[request.message] for request in group],
                    [request.images for request in group],
                    longest,
                )
                for request, text in zip(group, texts, strict=True):
                    answers[request.place] = text
            bar.update(len(batch))
        bar.close()
        return answers

    def _request(self, place: int, request: Instance) -> Request:
        context, settings, doc_to_visual, doc_id, task, split = request.args
        _refuse_sampling(task, settings)
        visuals = doc_to_visual(self.task_dict[task][split][doc_id]) or []
        images = [to_rgb(visual) for visual in visuals]
        message = user_message(context, len(images))
        return Request(place, message, images, int(settings.get("max_new_tokens", MAX_NEW_TOKENS)))

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Not offered: none of the paper's tasks scores given answers."""
        raise NotImplementedError("the model proxyv answers; tasks of log-likelihood are not run")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Not offered: none of the paper's tasks has several rounds."""
        raise NotImplementedError("the model proxyv answers once; tasks of rounds are not run")


def _refuse_sampling(task: str, settings: Mapping[str, Any]) -> None:
    """Greedy answers are all there is; ``until`` is ignored, as by the harness's own LLaVA."""
    asked = {
        "temperature": settings.get("temperature") or 0,
        "num_beams": (settings.get("num_beams") or 1) - 1,
    }
    for name, value in asked.items():
        if value > 0:
            raise ValueError(
                f"task {task}: {name} {settings[name]} is asked for, and only greedy answers are "
                "given; set it to its neutral value in the task"
            )
