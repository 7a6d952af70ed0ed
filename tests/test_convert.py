"""Folders and files of other forms, there and back, by the command and by name."""

from __future__ import annotations

import json
import os
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from small_model import character_tokenizer, save_small_model
from tiny_models import tiny_config, tiny_model
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    pipeline,
)
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)

from proxyv import ProxyVConfig, ProxyVForConditionalGeneration, ProxyVProcessor
from proxyv.cli import run_command
from proxyv.config import OPTIONS
from proxyv.convert import main
from proxyv.model.card import model_card
from proxyv.model.chat_templates import TEMPLATES
from proxyv.model.crops import num_unpadded_tokens
from proxyv.model.released import (
    is_release,
    read_tokenizer,
    read_weights,
    released_config,
    to_released_config,
)
from proxyv.model.stage1 import load_stage1, save_stage1

TOKENIZERS = os.environ.get("PROXYV_TOKENIZERS")
PX, PATCH = 32, 8
PINPOINTS = [[PX, 2 * PX], [2 * PX, PX], [2 * PX, 2 * PX], [PX, 3 * PX]]
SIZES = [(40, 60), (60, 40), (32, 32), (9, 90), (120, 31), (57, 29), (200, 200), (1, 500)]
# An option, another value than its default, and what has to go with it.
HALF = {"side_reduction": 2}
LEARNED = {"proxy_kind": "learned", "start_layer": 1}
OTHER_VALUES: dict = {
    "start_layer": (1, {}),
    "skip": ("atn", {}),
    "side_reduction": (2, {}),
    "proxy_kind": ("learned", {}),
    "learned_proxies": (3, LEARNED),
    "downsample": ("average", {}),
    "proxy_positions": ("block", {}),
    "layout": ("released", {}),
    "guided_ratio": (0.25, {}),
    "packing": ("llava_next", {"start_layer": None}),
    "reduction": ({"method": "visionzip", "dominant": 6, "contextual": 2}, LEARNED),
}


def convert(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return read_weights(folder)


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("ours") / "model", start_layer=1)


@pytest.fixture(scope="module")
def theirs(ours) -> Path:
    convert(ours, ours.parent / "theirs")
    return ours.parent / "theirs"


@pytest.fixture(scope="module")
def inputs(ours):
    processor = ProxyVProcessor.from_pretrained(ours)
    image = Image.effect_noise((50, 70), 90).convert("RGB")
    return processor(images=image, text="<s><|user|><image>hi<|assistant|>", return_tensors="pt")


def test_round_trip_is_bit_equal(ours, theirs, tmp_path, inputs, capsys) -> None:
    assert any(name.startswith("model.vision_mlp_layers.1.") for name in tensors(theirs))
    raw = json.loads((theirs / "config.json").read_text())
    assert (raw["model_type"], raw["proxyv"], raw["proxyv_start_layer"]) == ("llava_llama", True, 1)
    assert raw["proxyv_options"] == {"layout": "natural"}
    convert(theirs, tmp_path / "back", "--template", "tiny")
    assert capsys.readouterr().out == f"{tmp_path / 'back'}: start_layer=1, layout natural\n"
    assert_same(tensors(ours), tensors(tmp_path / "back"))
    first, second = (ProxyVConfig.from_pretrained(folder) for folder in (ours, tmp_path / "back"))
    for name in ("start_layer", "layout", "side_reduction", "image_grid_pinpoints", "side"):
        assert getattr(first, name) == getattr(second, name), name
    image = Image.effect_noise((50, 70), 90).convert("RGB")
    seen = [
        ProxyVProcessor.from_pretrained(folder)(images=image, text="<image>", return_tensors="pt")
        for folder in (ours, theirs, tmp_path / "back")
    ]
    for other in seen[1:]:
        assert torch.equal(seen[0]["pixel_values"], other["pixel_values"])
        assert torch.equal(seen[0]["num_crops"], other["num_crops"])
    convert(tmp_path / "back", tmp_path / "theirs")
    assert_same(tensors(theirs), tensors(tmp_path / "theirs"))
    models = [AutoModelForImageTextToText.from_pretrained(f) for f in (ours, tmp_path / "back")]
    with torch.no_grad():
        assert torch.equal(models[0](**inputs).logits, models[1](**inputs).logits)


def test_a_release_loads_by_its_name(ours, theirs, inputs) -> None:
    """As the authors wrote it: their keys only, weights in .bin shards, positions as released."""
    raw = json.loads((theirs / "config.json").read_text())
    del raw["proxyv_options"]
    raw["image_aspect_ratio"] = "anyres"
    folder = theirs.parent / "release"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    state = list(tensors(theirs).items())
    torch.save(dict(state[::2]), folder / "pytorch_model-00001-of-00002.bin")
    torch.save(dict(state[1::2]), folder / "pytorch_model-00002-of-00002.bin")
    tokenizer = character_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    GenerationConfig(eos_token_id=[2, 7], max_new_tokens=3).save_pretrained(folder)
    assert is_release(folder) and not is_release(ours)
    model, report = ProxyVForConditionalGeneration.from_pretrained(
        folder, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert (model.config.layout, model.config.start_layer) == ("released", 1)
    assert model.dtype == torch.bfloat16 and [n for n, p in model.named_parameters()
                                              if not p.requires_grad]  # fmt: skip
    assert model.generation_config.eos_token_id == [2, 7]
    processor = ProxyVProcessor.from_pretrained(folder)
    assert type(processor.tokenizer) is type(AutoTokenizer.from_pretrained(folder))
    assert processor.chat_template == TEMPLATES["tiny"].chat_template()
    assert processor.image_token_id == model.config.image_token_index
    assert (processor.image_aspect_ratio, processor.crop_px, processor.side) == ("anyres", 32, 4)
    own = ProxyVForConditionalGeneration.from_pretrained(ours, layout="released")
    again = ProxyVForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, own(**inputs).logits)
    image = {"type": "image", "image": Image.effect_noise((50, 70), 90).convert("RGB")}
    message = {"role": "user", "content": [image, {"type": "text", "text": "What is it?"}]}
    answer = pipeline("image-text-to-text", model=again, processor=processor)
    assert answer(text=[message])[0]["generated_text"][-1]["role"] == "assistant"


@pytest.mark.golden
@pytest.mark.skipif(not TOKENIZERS, reason="PROXYV_TOKENIZERS names no folder of tokenizers")
@pytest.mark.parametrize(
    ("name", "template"),
    [
        ("vicuna", "v1"),
        ("llama3", "llama3"),
        ("qwen2", "qwen"),
        ("phi3", "phi3"),
        ("internlm2", "internlm2"),
        ("smollm2", "smollm2"),
    ],
)
def test_the_template_of_a_release_follows_from_its_vocabulary(name, template) -> None:
    tokenizer = read_tokenizer(Path(TOKENIZERS or "", name))
    assert tokenizer.init_kwargs["proxyv_template"] == template
    assert tokenizer.encode("<image>", add_special_tokens=False) == [
        tokenizer.convert_tokens_to_ids("<image>")
    ]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"start_layer": 2}, ["holds 2 guided updates", "start_layer=1 ", "start_layer=2"]),
        ({"start_layer": None}, ["start_layer=1 ", "start_layer=None"]),
        ({"proxy_kind": "learned"}, ["spatial proxies", "'learned'"]),
        ({"start_layer": 9}, ["start_layer=9", "from 0 to 2"]),
    ],
)
def test_a_release_of_another_variant_is_refused(theirs, options, words) -> None:
    with pytest.raises(ValueError) as error:
        ProxyVForConditionalGeneration.from_pretrained(theirs, **options)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("holes", ["projector", "context_proj", "image_newline", "embed_tokens"])
@pytest.mark.parametrize("form", ["ours", "theirs"])
def test_a_folder_with_holes_is_neither_loaded_nor_converted(form, holes, request, tmp_path):
    folder = shutil.copytree(request.getfixturevalue(form), tmp_path / form)
    [file] = folder.glob("*.safetensors")
    whole = load_file(file)
    some = {name: tensor for name, tensor in whole.items() if holes not in name}
    assert len(some) < len(whole)
    save_file(some, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"incomplete: \d+ tensors .*{holes}"):
        ProxyVForConditionalGeneration.from_pretrained(folder)
    with pytest.raises(ValueError, match=rf"missing.*{holes}"):
        main([str(folder), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_comes_back_from_the_authors_form_or_is_refused(option) -> None:
    value, others = OTHER_VALUES[option]
    config = tiny_config(**{option: value, **others})
    if option in ("skip", "packing"):
        with pytest.raises(ValueError, match=f"{option}=.*no released form"):
            to_released_config(config, "pad")
        return
    raw = json.loads(json.dumps(to_released_config(config, "pad")))
    back = released_config(raw, config.vision_config)
    assert getattr(back, option) == value != getattr(ProxyVConfig, option)
    assert (back.crop_tokens, back.crop_side) == (config.crop_tokens, config.crop_side)
    assert back.proxies_per_crop == config.proxies_per_crop


@pytest.mark.parametrize(
    "other",
    [{}, {"hidden_act": "gelu"}, {"num_attention_heads": 8}, {"layer_norm_eps": 1e-6}],
    ids=lambda other: next(iter(other), "none"),
)
def test_only_the_very_tower_of_the_authors_is_left_to_its_name(other) -> None:
    """Towers of the same sizes compute otherwise with another activation, heads or epsilon."""
    known = LlavaNextConfig().vision_config.to_dict()
    raw = to_released_config(tiny_config(vision={**known, **other}), "pad")
    assert ("proxyv_vision_config" in raw) == bool(other)
    assert {name: raw["proxyv_vision_config"][name] for name in other} == other


def test_a_model_with_a_method_comes_back_with_it(tmp_path, inputs) -> None:
    """Answers too: the processor of the authors' form reserves what the method leaves."""
    method = {"method": "visionzip", "dominant": 5, "contextual": 3}
    ours = save_small_model(tmp_path / "ours", reduction=method, proxy_kind="learned", **HALF)
    processor = ProxyVProcessor.from_pretrained(ours)
    processor.follow(ProxyVConfig.from_pretrained(ours))
    processor.save_pretrained(ours)
    convert(ours, tmp_path / "theirs")
    raw = json.loads((tmp_path / "theirs/config.json").read_text())
    assert raw["per_crop_token_len"] == 8 and raw["proxyv_options"]["reduction"] == method
    image = Image.effect_noise((50, 70), 90).convert("RGB")
    logits = []
    for folder in (ours, tmp_path / "theirs"):
        processor = ProxyVProcessor.from_pretrained(folder)
        model = ProxyVForConditionalGeneration.from_pretrained(folder).eval()
        given = processor(images=image, text="<s><image>hi", return_tensors="pt")
        with torch.no_grad():
            logits.append(model(**given).logits)
    assert torch.equal(*logits)


def test_a_method_with_weights_has_no_released_form(tmp_path) -> None:
    method = {"method": "tokenpacker", "scale": 2, "heads": 2}
    ours = save_small_model(tmp_path / "ours", reduction=method, side_reduction=1)
    with pytest.raises(ValueError, match=r"reduction=.*'tokenpacker'.*no released form"):
        main([str(ours), str(tmp_path / "theirs")])
    assert not (tmp_path / "theirs").exists()


def test_a_release_gets_no_projector_that_nobody_trained(theirs) -> None:
    method = {"method": "tokenpacker", "scale": 2, "heads": 2}
    with pytest.raises(ValueError, match=r"incomplete: \d+ tensors .*projector\.attention"):
        ProxyVForConditionalGeneration.from_pretrained(theirs, reduction=method, side_reduction=2)


@pytest.fixture(scope="module")
def llava_next(tmp_path_factory) -> Path:
    """A small random stock checkpoint, as llava-hf writes them."""
    folder = tmp_path_factory.mktemp("stock") / "llava-next"
    tokenizer = character_tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        image_size=PX, patch_size=PATCH,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(tokenizer) + 2, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config = LlavaNextConfig(
        vision_config=vision, text_config=text, image_grid_pinpoints=PINPOINTS,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlavaNextForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    model.save_pretrained(folder)
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": PX}, crop_size={"height": PX, "width": PX},
        image_grid_pinpoints=PINPOINTS,
    )  # fmt: skip
    LlavaNextProcessor(
        images, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (*size, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def test_a_stock_checkpoint_becomes_a_baseline_with_the_same_logits(llava_next, tmp_path) -> None:
    convert(llava_next, tmp_path / "baseline", "--template", "tiny")
    stock = LlavaNextForConditionalGeneration.from_pretrained(llava_next).eval()
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "baseline").eval()
    assert isinstance(model, ProxyVForConditionalGeneration)
    assert (model.config.start_layer, model.config.packing) == (None, "llava_next")
    processor = AutoProcessor.from_pretrained(tmp_path / "baseline")
    theirs = AutoProcessor.from_pretrained(llava_next, backend="pil")
    for size in SIZES:
        call = {"images": noise(size), "text": "a<image>bc", "return_tensors": "pt"}
        ours, expected = processor(**call), theirs(**call)
        assert torch.equal(ours["input_ids"], expected["input_ids"]), size
        torch.testing.assert_close(ours["pixel_values"], expected["pixel_values"])
        assert int((ours["input_ids"] == 4).sum()) == processor.num_image_tokens(size)
        with torch.no_grad():
            torch.testing.assert_close(model(**ours).logits, stock(**expected).logits)
            torch.testing.assert_close(model(**expected).logits, stock(**expected).logits)
    batch = {"images": [noise(s) for s in SIZES[:3]], "text": ["<image>", "a<image>b<image>c", "d"]}
    inputs = processor(**batch, padding=True, padding_side="left", return_tensors="pt")
    chosen = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    names = ("input_ids", "attention_mask", "pixel_values", "image_sizes")
    got = model.generate(**inputs, **chosen, num_beams=2)
    expected = stock.generate(**{n: inputs[n] for n in names}, **chosen)
    assert got.shape == expected.shape
    assert model.generate(**inputs, **chosen).tolist() == expected.tolist()


def test_a_stock_checkpoint_with_holes_is_refused(llava_next, tmp_path) -> None:
    folder = shutil.copytree(llava_next, tmp_path / "stock")
    state = load_file(folder / "model.safetensors")
    del state[next(name for name in state if "linear_2.bias" in name)]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"incomplete: 1 tensors .*linear_2\.bias"):
        main([str(folder), str(tmp_path / "out")])


@pytest.mark.parametrize("seed", range(3))
def test_unpadded_token_counts_are_the_stock_ones(llava_next, seed) -> None:
    stock = LlavaNextProcessor.from_pretrained(llava_next)
    generator = torch.Generator().manual_seed(seed)
    grid = {tuple(p): (p[0] // PX, p[1] // PX) for p in PINPOINTS}
    for height, width in torch.randint(1, 5001, (60, 2), generator=generator).tolist():
        expected = stock._get_number_of_features(height, width, PX, PX) - 1
        best = tuple(select_best_resolution([height, width], PINPOINTS))
        assert num_unpadded_tokens((height, width), grid[best], PX // PATCH) == expected


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image_sizes": None}, ["needs image_sizes", "got none"]),
        ({"num_crops": torch.tensor([2])}, ["num_crops=[2]", "40 x 60", "5 crops"]),
        ({"pool_sizes": torch.tensor([2])}, ["pools nothing"]),
    ],
)
def test_stock_packing_says_what_it_needs(llava_next, tmp_path, change, words) -> None:
    convert(llava_next, tmp_path / "baseline")
    model = ProxyVForConditionalGeneration.from_pretrained(tmp_path / "baseline")
    processor = ProxyVProcessor.from_pretrained(tmp_path / "baseline")
    inputs = processor(images=noise((40, 60)), text="<image>", return_tensors="pt")
    with pytest.raises(ValueError) as error:
        model(**{**inputs, **change})
    for word in words:
        assert word in str(error.value)


def test_a_stock_checkpoint_with_proxies_is_refused(llava_next, tmp_path) -> None:
    convert(llava_next, tmp_path / "baseline")
    with pytest.raises(ValueError, match=r"packing='llava_next' is for the baseline.*start_layer"):
        ProxyVForConditionalGeneration.from_pretrained(tmp_path / "baseline", start_layer=1)
    with pytest.raises(ValueError, match=r"layout='released'"):
        ProxyVForConditionalGeneration.from_pretrained(tmp_path / "baseline", layout="released")


@pytest.mark.parametrize("kind", ["spatial", "learned"])
def test_stage1_files_of_both_forms(kind, tmp_path) -> None:
    options = {"start_layer": 2, "proxy_kind": kind, "layout": "released"}
    model, other = tiny_model(**options), tiny_model(seed=1, **options)
    save_stage1(model, tmp_path / "mm_projector.bin")
    names = set(torch.load(tmp_path / "mm_projector.bin", weights_only=True))
    assert {"model.image_newline", "model.mm_projector.0.weight"} < names
    assert ("model.proxyv_initializer.Wk.weight" in names) == (kind == "learned")
    assert not any("layers.0.self_attn" in name or "vision_tower" in name for name in names)
    ours, back = tmp_path / "stage1.safetensors", tmp_path / "back.bin"
    convert(tmp_path / "mm_projector.bin", ours, "--start-layer", 2)
    convert(ours, back)
    assert_same(*(torch.load(f, weights_only=True) for f in (tmp_path / "mm_projector.bin", back)))
    for file in (ours, back):
        fresh = tiny_model(seed=2, **options)
        load_stage1(fresh, file)
        for name, tensor in load_file(ours).items():
            assert torch.equal(fresh.state_dict()[name], tensor), name
        head = "lm_head.weight"
        assert not torch.equal(fresh.state_dict()[head], model.state_dict()[head])
    assert not torch.equal(other.model.image_newline, model.model.image_newline)


def test_a_bin_file_joined_in_one_step_or_in_two_is_the_same_model(tmp_path) -> None:
    model = tiny_model(start_layer=2, layout="released")
    save_stage1(model, tmp_path / "mm_projector.bin")
    model.model.vision_tower.save_pretrained(tmp_path / "vision")
    LlamaForCausalLM(model.config.text_config).save_pretrained(tmp_path / "language")
    character_tokenizer().save_pretrained(tmp_path / "language")
    backbones = ("--vision", tmp_path / "vision", "--language", tmp_path / "language")
    convert(tmp_path / "mm_projector.bin", tmp_path / "one", "--start-layer", 2, *backbones)
    convert(tmp_path / "mm_projector.bin", tmp_path / "s.safetensors", "--start-layer", 2)
    convert(tmp_path / "s.safetensors", tmp_path / "two", *backbones)
    one, two = (json.loads((tmp_path / x / "config.json").read_text()) for x in ("one", "two"))
    assert one == two and one["layout"] == "released"


def test_stage1_files_that_do_not_fit_are_refused_and_change_nothing(tmp_path) -> None:
    made = partial(tiny_model, layout="released")
    model, baseline = made(start_layer=2), made(start_layer=None)
    for suffix in ("bin", "safetensors"):
        save_stage1(model, tmp_path / f"two.{suffix}")
        save_stage1(baseline, tmp_path / f"none.{suffix}")
        save_stage1(made(start_layer=2, proxy_kind="learned"), tmp_path / f"learned.{suffix}")
        save_stage1(made(start_layer=2, guided_ratio=0.25), tmp_path / f"narrow.{suffix}")
        cases = [
            (tiny_model(start_layer=1), "two", "start_layer=2.*start_layer=1"),
            (baseline, "two", "(holds 2 guided updates|start_layer=2).*(null|None)"),
            (model, "none", "(baseline|start_layer=None).*"),
            (model, "learned", "learned proxies.*'spatial'"),
            (model, "narrow", r"output_proj.weight \(32, 8\) instead of \(32, 16\)"),
        ]
        for target, file, words in cases:
            before = {n: t.clone() for n, t in target.state_dict().items()}
            with pytest.raises(ValueError, match=words):
                load_stage1(target, tmp_path / f"{file}.{suffix}")
            assert_same(before, target.state_dict())


def test_a_stage1_file_and_backbones_become_a_folder(ours, tmp_path) -> None:
    trained = ProxyVForConditionalGeneration.from_pretrained(ours)
    save_stage1(trained, tmp_path / "stage1.safetensors")
    trained.model.vision_tower.save_pretrained(tmp_path / "vision")
    language = LlamaForCausalLM(trained.config.text_config)
    language.model.load_state_dict(
        {k: v for k, v in trained.model.language_model.state_dict().items()
         if "guided_update" not in k}
    )  # fmt: skip
    language.lm_head.load_state_dict(trained.lm_head.state_dict())
    language.save_pretrained(tmp_path / "language")
    character_tokenizer().save_pretrained(tmp_path / "language")
    convert(tmp_path / "stage1.safetensors", tmp_path / "run", "--vision", tmp_path / "vision",
            "--language", tmp_path / "language")  # fmt: skip
    assert_same(tensors(ours), tensors(tmp_path / "run"))
    built = {"layout": "released", "side_reduction": 2, "downsample": "average"}
    trained.config.update(built)
    save_stage1(trained, tmp_path / "stage1.safetensors")
    convert(tmp_path / "stage1.safetensors", tmp_path / "other", "--vision", tmp_path / "vision",
            "--language", tmp_path / "language")  # fmt: skip
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    assert {name: config[name] for name in built} == built
    card = (tmp_path / "run" / "README.md").read_text()
    assert "| `start_layer` | 1 |" in card and "pipeline_tag: image-text-to-text" in card


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{ours}", "{ours}"], ["OUT", "exists already"]),
        (["{tmp}/none.bin", "{tmp}/x.safetensors"], ["none.bin: no such file"]),
        (["{ours}", "{tmp}/x", "--start-layer", "1"], ["--start-layer is for stage-1 files"]),
        (["{ours}", "{tmp}/x", "--template", "tyni"], ["did you mean 'tiny'"]),
        (["{tmp}/s.safetensors", "{tmp}/x"], ["becomes a .safetensors or a .bin file"]),
        (["{tmp}/s.safetensors", "{tmp}/x", "--vision", "v"], ["--vision and --language"]),
        (["{tmp}/s.safetensors", "{tmp}/x.bin", "--start-layer", "2"], ["start_layer=1", "leave"]),
        (["{tmp}/s.bin", "{tmp}/x.safetensors"], ["holds 2 guided updates", "name the layer"]),
        (["{tmp}/n.safetensors", "{tmp}/x.bin"], ["layout='natural'", "write a .safetensors"]),
        (["{tmp}/llama", "{tmp}/x"], ["of type 'llama'", "llava_next"]),
        (["{tmp}/none", "{tmp}/x"], ["SOURCE", "/none: no such folder"]),
    ],
)
def test_mistakes_are_one_line(ours, tmp_path, arguments, words, capsys) -> None:
    model = ProxyVForConditionalGeneration.from_pretrained(ours)
    save_stage1(model, tmp_path / "n.safetensors")
    model.config.layout = "released"
    save_stage1(model, tmp_path / "s.safetensors")
    save_stage1(model, tmp_path / "s.bin")
    LlamaConfig().save_pretrained(tmp_path / "llama")
    given = [argument.format(ours=ours, tmp=tmp_path) for argument in arguments]
    capsys.readouterr()
    assert run_command(main, given) == 2
    captured = capsys.readouterr().err
    assert captured.startswith("error: ") and captured.count("\n") == 1
    for word in words:
        assert word in captured


def test_help_has_examples(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "craigwu/proxyv_vicuna_7b_layer12" in text and "mm_projector.bin" in text


def test_the_card_names_the_settings(tmp_path) -> None:
    card = model_card(tiny_model(start_layer=2, layout="released").config, "someone/model")
    card.save(tmp_path / "README.md")
    text = (tmp_path / "README.md").read_text()
    for line in ("| `start_layer` | 2 |", "| `layout` | released |", "| `guided_ratio` | null |"):
        assert line in text
    assert "from decoder layer 2 of 4 on" in " ".join(text.split())
    assert card.data.tags == ["proxyv"] and card.data.library_name == "transformers"
    assert "without proxies" in model_card(tiny_model(start_layer=None).config, "x").text


@pytest.mark.parametrize(
    ("reduction", "kept", "tokens"),
    [
        (None, "keeps every vision token", "16"),
        ({"method": "tokenpacker", "scale": 2, "heads": 2}, "tokens (tokenpacker)", "4"),
        ({"method": "prumerge"}, "tokens (prumerge)", "at most 16"),
        ({"method": "fastv", "layer": 1}, "tokens (fastv)", "at most 16"),
    ],
)
def test_the_card_counts_the_tokens_that_a_reduction_leaves(reduction, kept, tokens) -> None:
    options = {"proxy_kind": "learned", "learned_proxies": 3, "reduction": reduction}
    text = " ".join(model_card(tiny_config(**options), "x").text.split())
    assert ("keeps every vision token" in text) == (reduction is None) and kept in text
    assert f"computes with 3 proxy tokens for {tokens} tokens of a crop" in text
    assert f"| `crop` | 16 px, 4 x 4 patches, {tokens} tokens |" in text
