"""The model card that a folder gets, or a model on the hub: what kind of ProxyV it is."""

from __future__ import annotations

from typing import Any

from huggingface_hub import ModelCard, ModelCardData, create_repo, file_exists

from proxyv.config import OPTIONS

__all__ = ["ModelCardMixin", "model_card"]

_TEXT = """# {title}

{what} Made with the `proxyv` package; see its README for training and evaluation.

| setting | value |
|---|---|
{rows}

```python
import proxyv
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{name}")
processor = AutoProcessor.from_pretrained("{name}")
```
"""
_PROXYV = (
    "A vision-language model of the LLaVA-NeXT kind that {keeps} and, from decoder layer {start} "
    "of {layers} on, computes with {proxies} proxy tokens for {full} tokens of a crop (ProxyV, "
    "[arXiv 2505.15816](https://arxiv.org/abs/2505.15816))."
)
_SKIPPING = (
    "A vision-language model of the LLaVA-NeXT kind in which, from decoder layer {start} of "
    "{layers} on, vision tokens skip {skipped}, as in the redundancy study of ProxyV "
    "([arXiv 2505.15816](https://arxiv.org/abs/2505.15816))."
)
_SKIPPED = {"atn": "attention", "atn_ffn": "attention and FFN"}
_BASELINE = "A vision-language model of the LLaVA-NeXT kind, without proxies: the ProxyV baseline."


def model_card(config: Any, name: str) -> ModelCard:
    """Write a card with the settings of a model.

    Args:
        config: a ``ProxyVConfig``.
        name: folder or hub id under which the model will be found.

    Returns:
        The card; ``save`` writes it as a ``README.md``.
    """
    text = config.text_config
    what = _BASELINE
    if config.start_layer is not None and config.skip is not None:
        what = _SKIPPING.format(
            start=config.start_layer,
            layers=text.num_hidden_layers,
            skipped=_SKIPPED[config.skip],
        )
    elif config.start_layer is not None:
        what = _PROXYV.format(
            start=config.start_layer,
            layers=text.num_hidden_layers,
            keeps=_keeps(config),
            proxies=config.proxies_per_crop,
            full=_full_tokens(config),
        )
    shown = {option: getattr(config, option) for option in OPTIONS}
    shown |= {"language model": f"{text.model_type}, width {text.hidden_size}"}
    pixels, patches = config.vision_config.image_size, f"{config.side} x {config.side} patches"
    shown |= {"crop": f"{pixels} px, {patches}, {_full_tokens(config)} tokens"}
    rows = "\n".join(
        f"| `{key}` | {'null' if value is None else value} |" for key, value in shown.items()
    )
    data = ModelCardData(
        library_name="transformers", pipeline_tag="image-text-to-text", tags=["proxyv"]
    )
    title = name.rstrip("/").rpartition("/")[2] or name
    body = _TEXT.format(title=title, what=what, rows=rows, name=name)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")


def _keeps(config: Any) -> str:
    """What becomes of the vision tokens before proxies stand for them."""
    method = config.reduction_method
    if method is None:
        return "keeps every vision token"
    return f"reduces vision tokens ({method.name})"


def _full_tokens(config: Any) -> str:
    """Full tokens of a crop; an upper limit where the image or a decoder layer decides."""
    method = config.reduction_method
    fixed = method is None or not (config.image_decides or method.stage == "decoder")
    return str(config.crop_tokens) if fixed else f"at most {config.crop_tokens}"


class ModelCardMixin:
    """Gives a model on the hub its card when it is first pushed; put it before the stock class."""

    config: Any

    def push_to_hub(self, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        """Push to the hub as every transformers model, with a card that names the settings.

        A card that is there already is kept.
        """
        token = kwargs.get("token")
        repo = create_repo(repo_id, private=kwargs.get("private"), token=token, exist_ok=True)
        if not file_exists(repo.repo_id, "README.md", token=token):
            model_card(self.config, repo.repo_id).push_to_hub(repo.repo_id, token=token)
        parent: Any = super()
        return parent.push_to_hub(repo_id, *args, **kwargs)
