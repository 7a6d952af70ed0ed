"""Convert checkpoints: ``python -m proxyv.convert SOURCE OUT``.

What SOURCE is follows from its ``config.json`` or its suffix, what OUT becomes from SOURCE:

    authors' release (folder or hub id)      ->  folder of this package, layout released
    folder of this package                   ->  folder in the authors' form
    llava-hf LLaVA-NeXT (folder or hub id)   ->  baseline folder of this package
    InternLM2 or 2.5 language model folder   ->  the same as a Llama folder
    mm_projector.bin                         ->  FILE.safetensors under our names, and back
    stage-1 file, --vision and --language    ->  folder of this package, as stage 1 leaves it

Every tensor keeps its bits, and a start layer or a kind of proxies that does not match is an error.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
)

from proxyv.cli import CommandError, nearest, run_command
from proxyv.config import ProxyVConfig
from proxyv.data.templates import TEMPLATES, mark_template, template_of
from proxyv.eval.answerer import check_model_name
from proxyv.model.card import model_card
from proxyv.model.checkpoints import check_exactly, to_released
from proxyv.model.crops import crop_processor
from proxyv.model.internlm2 import convert_internlm2
from proxyv.model.modeling import ProxyVForConditionalGeneration
from proxyv.model.processing import ProxyVProcessor
from proxyv.model.released import is_release, read_tokenizer, read_weights, to_released_config
from proxyv.model.stage1 import load_stage1, read_stage1, stage1_facts, write_stage1
from proxyv.model.stock import read_stock, suggested_template

__all__ = ["main"]

STAGE1_SUFFIXES = (".bin", ".safetensors")

EXAMPLES = """examples:
  python -m proxyv.convert craigwu/proxyv_vicuna_7b_layer12 runs/release
  python -m proxyv.convert runs/vicuna-7b/finetune runs/authors-form
  python -m proxyv.convert llava-hf/llava-v1.6-vicuna-7b-hf runs/llava-next-baseline
  python -m proxyv.convert mm_projector.bin stage1.safetensors --start-layer 12
  python -m proxyv.convert mm_projector.bin runs/stage1 --start-layer 12 --template v1 \\
      --vision openai/clip-vit-large-patch14-336 --language lmsys/vicuna-7b-v1.5
"""


def build_parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m proxyv.convert",
        description=__doc__.partition("\n\n")[2] if __doc__ else None,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", help="folder, hub id or stage-1 file")
    add("out", metavar="OUT", type=Path, help="folder or file to write; must not exist")
    add("--start-layer", type=int, metavar="N", help="first ProxyV layer, where SOURCE is a .bin")
    add("--template", metavar="NAME", help="chat template; default: what the vocabulary suggests")
    add("--vision", metavar="NAME", help="vision tower (folder or hub id), for a stage-1 file")
    add("--language", metavar="NAME", help="language model, for a stage-1 file")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Convert one checkpoint.

    Raises:
        CommandError: a mistake in the options.
        ValueError: weights that contradict each other or the options.
    """
    args = build_parser().parse_args(argv)
    if args.out.exists():
        raise CommandError(f"OUT {args.out} exists already: name a new folder or file")
    if args.template is not None and args.template not in TEMPLATES:
        raise CommandError(nearest("template", args.template, TEMPLATES))
    if Path(args.source).suffix in STAGE1_SUFFIXES:
        done = _stage1(args)
    else:
        done = _folder(args)
    print(f"{args.out}: {done}")
    return 0


def _folder(args: argparse.Namespace) -> str:
    """Convert a folder or a model of the hub, by its type."""
    for option in ("vision", "language", "start_layer"):
        if getattr(args, option) is not None:
            raise CommandError(
                f"--{option.replace('_', '-')} is for stage-1 files (.bin, .safetensors), but "
                f"SOURCE is {args.source}: leave it out"
            )
    check_model_name(args.source, "SOURCE")
    try:
        release = is_release(args.source)
    except OSError as error:
        raise CommandError(
            f"SOURCE {args.source}: no such folder with a config.json here, and not read from the "
            f"hub ({error})"
        ) from error
    if release:
        return _from_release(args)
    kind = PreTrainedConfig.get_config_dict(args.source)[0].get("model_type")
    if kind == ProxyVConfig.model_type:
        return _to_release(args)
    if kind == "llava_next":
        return _from_llava_next(args)
    if kind == "internlm2":
        convert_internlm2(args.source, args.out)
        return "the language model as a Llama folder, without its tokenizer"
    raise CommandError(
        f"SOURCE {args.source} is of type {kind!r}: expected a release (llava_llama, llava_phi, "
        "llava_qwen), proxyv, llava_next or internlm2"
    )


def _from_release(args: argparse.Namespace) -> str:
    """A release becomes a folder of this package."""
    model = ProxyVForConditionalGeneration.from_pretrained(args.source, dtype="auto")
    processor = ProxyVProcessor.from_pretrained(args.source)
    _save(model, processor, args)
    return f"start_layer={model.config.start_layer}, layout {model.config.layout}"


def _to_release(args: argparse.Namespace) -> str:
    """A folder of this package becomes one in the authors' form."""
    source = Path(args.source)
    if not source.is_dir():
        raise CommandError(f"SOURCE {source}: no such folder; download the model first")
    config = ProxyVConfig.from_pretrained(source)
    processor = ProxyVProcessor.from_pretrained(source)
    raw = to_released_config(config, processor.image_aspect_ratio)
    state = to_released(read_weights(source), config.start_layer)
    _check_all_there(state, config)
    args.out.mkdir(parents=True)
    save_torch_state_dict(state, args.out, filename_pattern="model{suffix}.safetensors")
    raw["torch_dtype"] = str(next(iter(state.values())).dtype).removeprefix("torch.")
    (args.out / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    AutoTokenizer.from_pretrained(source).save_pretrained(args.out)
    if (source / "generation_config.json").is_file():
        GenerationConfig.from_pretrained(source).save_pretrained(args.out)
    foreign = raw.get("proxyv_options")
    note = f"; the authors' code does not know {json.dumps(foreign)}" if foreign else ""
    return f"the authors' form, start_layer={config.start_layer}{note}"


def _check_all_there(state: Mapping[str, Tensor], config: ProxyVConfig) -> None:
    """Refuse tensors, under the authors' names, that are not exactly those of the model.

    A tied head need not be there, and older files hold buffers that are made anew.
    """
    with torch.device("meta"):  # names and shapes only
        model = ProxyVForConditionalGeneration(config)
    own = to_released(model.state_dict(), config.start_layer)
    if config.tie_word_embeddings and "lm_head.weight" not in state:
        del own["lm_head.weight"]
    check_exactly({n: t for n, t in state.items() if not n.endswith(".position_ids")}, own)


def _from_llava_next(args: argparse.Namespace) -> str:
    """A stock LLaVA-NeXT becomes a baseline of this package, with the stock packing."""
    model, processor = read_stock(args.source, dtype="auto")
    args.template = args.template or suggested_template(processor)
    _save(model, processor, args)
    return "baseline (start_layer=null), packing llava_next"


def _save(model: Any, processor: ProxyVProcessor, args: argparse.Namespace) -> None:
    """Write model, processor, template and card."""
    tokenizer = processor.tokenizer
    name = args.template or tokenizer.init_kwargs.get("proxyv_template")
    if name:
        template = template_of(tokenizer, name)
        mark_template(tokenizer, template)
        processor.chat_template = template.chat_template()
    model.save_pretrained(args.out)
    processor.save_pretrained(args.out)
    model_card(model.config, args.out.name).save(args.out / "README.md")


def _stage1(args: argparse.Namespace) -> str:
    """Convert a stage-1 file, or join it with the backbones."""
    source = Path(args.source)
    if not source.is_file():
        raise CommandError(f"SOURCE {source}: no such file")
    start = _start_layer(source, args.start_layer)
    if args.vision is None and args.language is None:
        if args.out.suffix not in STAGE1_SUFFIXES:
            raise CommandError(
                f"OUT {args.out}: a stage-1 file becomes a .safetensors or a .bin file, or with "
                "--vision and --language a folder"
            )
        write_stage1(read_stage1(source, start), args.out, start, _facts(source))
        return f"stage-1 file, start_layer={start}"
    if args.vision is None or args.language is None:
        raise CommandError("--vision and --language belong together: name both")
    return _join(args, source, start)


def _join(args: argparse.Namespace, source: Path, start: int | None) -> str:
    """Backbones and a stage-1 file become a folder of this package."""
    tokenizer = read_tokenizer(args.language)
    options = {
        "layout": "natural",
        **_facts(source),
        "start_layer": start,
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
    }
    state = read_stage1(source, start)
    queries = [t for name, t in state.items() if name.endswith("proxy_initializer.queries")]
    if queries:
        options |= {"proxy_kind": "learned", "learned_proxies": len(queries[0])}
    model = ProxyVForConditionalGeneration.from_backbones(
        args.vision, args.language, config_overrides=options
    )
    load_stage1(model, source)
    vision: Any = model.config.vision_config
    images = crop_processor(vision.image_size, model.config.image_grid_pinpoints)
    processor = ProxyVProcessor(
        images, tokenizer, patch_size=vision.patch_size, image_aspect_ratio="pad"
    )
    _save(model, processor, args)
    return f"ProxyV as stage 1 leaves it, start_layer={start}, layout {options['layout']}"


def _facts(source: Path) -> dict[str, Any]:
    """How the model of a stage-1 file was built, from the file and its ``config.json``."""
    beside = _config_beside(source).get("proxyv_reduce_factor")
    return ({} if beside is None else {"side_reduction": beside}) | stage1_facts(source)


def _config_beside(source: Path) -> dict[str, Any]:
    """The ``config.json`` that the authors' training writes beside a stage-1 file, if any."""
    path = source.with_name("config.json")
    return json.loads(path.read_text()) if path.is_file() else {}


def _start_layer(source: Path, given: int | None) -> int | None:
    """The first ProxyV layer of a stage-1 file: as given, as stored, or as ``config.json`` says."""
    raw = _config_beside(source)
    stored: int | None = None
    if source.suffix == ".safetensors":
        with safe_open(source, framework="pt") as file:
            text = (file.metadata() or {}).get("start_layer", "None")
        stored = None if text == "None" else int(text)
    elif raw.get("proxyv"):
        stored = int(raw["proxyv_start_layer"])
    if given is not None and stored is not None and given != stored:
        raise CommandError(
            f"--start-layer {given}: {source} was trained with start_layer={stored}; leave it out"
        )
    return stored if given is None else given


if __name__ == "__main__":
    sys.exit(run_command(main))
