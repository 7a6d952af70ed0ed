"""Options of the commands that look at a data set, and the processor that they describe."""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import AutoTokenizer

from proxyv.data.pipeline import ImagePipeline, RowPipeline
from proxyv.data.templates import Renderer
from proxyv.model.chat_templates import add_image_token
from proxyv.model.crops import ASPECT_RATIOS, PINPOINTS_HW, crop_processor
from proxyv.model.processing import ProxyVProcessor

__all__ = ["add_set_options", "pipeline_of", "processor_of"]


def add_set_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which rows are meant and how the model would see them."""
    add = parser.add_argument
    add("--annotations", required=True, help="json, jsonl, parquet, a folder, a hub id, or yaml")
    add("--images", help="folder that image paths are relative to")
    add("--model", help="folder of a finished run: its tokenizer, template and crops")
    add("--tokenizer", help="tokenizer folder or hub id (needs --template)")
    add("--template", default="auto", help="chat template (auto: the one saved with the tokenizer)")
    add("--image-aspect-ratio", choices=ASPECT_RATIOS, help="(the run's, else pad)")
    add("--crop-px", type=int, default=336, help="side of a crop in pixels (336)")
    add("--patch-size", type=int, default=14, help="of the vision tower (14)")
    add("--max-length", type=int, default=2048, help="longest row in tokens (2048)")
    add("--max-megapixels", type=float, default=100.0, help="largest image (100)")
    add("--follow-links", action="store_true", help="links may lead out of the image folder")
    add("--streaming", action="store_true", help="read parquet where it lies, make no copy of it")
    add("--limit", type=int, help="look only at the first rows")
    add("--json", action="store_true", help="write JSON")


def processor_of(options: argparse.Namespace) -> ProxyVProcessor | None:
    """Tokenizer and crops of a run, or of a tokenizer with the given crops; None without either."""
    if options.model is not None:
        if not (Path(options.model) / "processor_config.json").is_file():
            raise FileNotFoundError(
                f"--model {options.model}: no finished run (no processor_config.json there)"
            )
        processor = ProxyVProcessor.from_pretrained(options.model)
        if options.image_aspect_ratio is not None:
            processor.image_aspect_ratio = options.image_aspect_ratio
        return processor
    if options.tokenizer is None:
        return None
    _check_tokenizer(options.tokenizer)
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    add_image_token(tokenizer)
    crop = options.crop_px
    # LLaVA-NeXT's are for crops of 336 pixels; other crops scale them.
    pinpoints = [[side * crop // 336 for side in pair] for pair in PINPOINTS_HW]
    return ProxyVProcessor(
        crop_processor(crop, pinpoints),
        tokenizer,
        patch_size=options.patch_size,
        image_aspect_ratio=options.image_aspect_ratio or "pad",
    )


def _check_tokenizer(name: str) -> None:
    """Refuse a folder that is not there, before the hub takes its name for an id."""
    local = name.startswith((".", "/", "data/", "runs/")) or name.count("/") > 1
    if local and not Path(name).is_dir():
        raise FileNotFoundError(f"--tokenizer {name}: no such folder")


def pipeline_of(options: argparse.Namespace, processor: ProxyVProcessor) -> RowPipeline:
    """Template, crops and length limit of the options."""
    renderer = Renderer(processor.tokenizer, options.template, processor.image_token_id)
    return RowPipeline(renderer, ImagePipeline.of(processor), options.max_length)
