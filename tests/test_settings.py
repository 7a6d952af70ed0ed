"""Settings: files that build on others, overrides, refusals, and no setting that nothing reads."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from proxyv.files import write_text
from proxyv.train.arguments import (
    accumulation_steps,
    deepspeed_config,
    total_steps,
    training_arguments,
)
from proxyv.train.config_files import describe_settings, load_settings, preset_file, settings_yaml
from proxyv.train.settings import Settings, walk

ROOT = Path(__file__).resolve().parents[1]
GATHER = "gather_16bit_weights_on_model_save"


def load(tmp_path: Path, text: str = "", *overrides: str) -> Settings:
    path = tmp_path / "config.yaml"
    path.write_text(text or "model: {name: a}\n")
    return load_settings(path, overrides)


def test_the_last_word_counts(tmp_path):
    (tmp_path / "deep.yaml").write_text("optim: {lr: 1e-3, beta2: 0.95}\n")
    (tmp_path / "middle.yaml").write_text("base: deep.yaml\noptim: {lr: 2e-3, epochs: 2}\n")
    settings = load(tmp_path, "base: middle.yaml\noptim: {epochs: 3}\n", "optim.warmup_ratio=0.5")
    optim = settings.optim
    assert (optim.lr, optim.beta2, optim.epochs, optim.warmup_ratio) == (2e-3, 0.95, 3.0, 0.5)


def test_override_values_are_yaml(tmp_path):
    settings = load(
        tmp_path,
        "",
        "model.start_layer=null",
        "optim.lr=4e-5",
        "data.image_grid_pinpoints=[[336,672]]",
    )
    assert settings.model.start_layer is None
    assert settings.optim.lr == 4e-5
    assert settings.data.image_grid_pinpoints == [[336, 672]]


@pytest.mark.parametrize(
    "text",
    ["2026_10_01", "/tmp/a #b", "no", "1e3", "007", "a: b", "[x", "0x10", "a=b", "None", " "],
)
def test_text_on_the_command_line_is_taken_as_it_is(tmp_path, text):
    settings = load(tmp_path, "", f"run.output_dir={text}", f"model.name={text}")
    assert (settings.run.output_dir, settings.model.name) == (text, text)
    quoted = load(tmp_path, "", f"run.output_dir={json.dumps(text)}", f"model.name='{text}'")
    assert (quoted.run.output_dir, quoted.model.name) == (text, text)


def test_null_and_nothing_are_no_text(tmp_path):
    (tmp_path / "base.yaml").write_text("data: {images: a}\n")
    for override, images in (("null", None), ("", None), ('"null"', "null"), ("NULL", "NULL")):
        settings = load(tmp_path, "base: base.yaml\n", f"data.images={override}")
        assert settings.data.images == images
    with pytest.raises(ValueError, match=r"model\.name=null': model\.name: .*not Optional"):
        load(tmp_path, "", "model.name=null")


def test_a_mapping_is_replaced_as_a_whole(tmp_path):
    (tmp_path / "base.yaml").write_text("model: {reduction: {method: fastv, layer: 2}}\n")

    def reduction(text: str, *overrides: str):
        return load(tmp_path, f"base: base.yaml\n{text}", *overrides).model.reduction

    pooled = {"method": "average_pool", "block": 2}
    assert reduction("") == {"method": "fastv", "layer": 2}
    assert reduction("model: {reduction: {}}\n") == {}
    assert reduction("", "model.reduction={}") == {}
    assert reduction("model: {reduction: {method: average_pool, block: 2}}\n") == pooled
    assert reduction("", "model.reduction={method: average_pool, block: 2}") == pooled
    only = reduction("", "model.reduction.layer=3", "model.reduction.ratio=0.5")
    assert only == {"method": "fastv", "layer": 3, "ratio": 0.5}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.epochs=0", r"optim\.epochs=0\.0 is out of range: it must be at least 1e-06"),
        ("optim.epochs=.inf", r"optim\.epochs=inf is out of range: it must be finite"),
        ("optim.lr=.inf", r"optim\.lr=inf is out of range: it must be finite"),
        ("model.vision_feature_layer=abc", r"model\.vision_feature_layer=abc: expected the number"),
        ("model.vision_feature_layer=[-2, x]", r"vision_feature_layer=\[-2, 'x'\]: expected"),
        ("optim.lr.x=1", r"optim\.lr is one value, and has no 'x'"),
        (
            "model.reductn.x=1",
            r"unknown setting 'model\.reductn\.x': did you mean 'model\.reduction",
        ),
        ("data.image_grid_pinpoints=[[336", "override .*: not valid YAML"),
        ("optim.lrr=1", r"unknown setting 'optim\.lrr': did you mean 'optim\.lr'"),
        ("optm.lr=1", r"no section 'optm': did you mean 'optim\.lr'"),
        ("lr=1", r"no section 'lr': did you mean 'optim\.lr'"),
        ("zzz.yyy=1", r"unknown section 'zzz' \(one of data, deepspeed, lora, model"),
        ("optim=1", "section 'optim' needs settings, got 1"),
        ("optim.lr", r"override 'optim\.lr': expected section\.name=value"),
        ("optim.lr=fast", r"override 'optim\.lr=fast': optim\.lr: Value 'fast'"),
        ("optim.micro_batch=2.5", r"optim\.micro_batch: Value '2\.5'"),
        ("optim.lr=-1", r"optim\.lr=-1\.0 is out of range: it must be at least 0"),
        ("optim.warmup_ratio=2", r"optim\.warmup_ratio=2\.0 is out of range: .* from 0 to 1"),
        ("model.layout=naturl", r"model\.layout: unknown value 'naturl': did you mean 'natural'"),
        ("stage.name=finetune", r"model\.init_from=null with stage\.name=finetune"),
        ("model.init_from=auto", r"model\.init_from=auto with stage\.name=pretrain"),
        ("optim.micro_batch=48", r"512 is not a multiple of optim\.micro_batch=48"),
        ("run.wandb_mode=online", r"run\.wandb_mode=online with run\.tracker=jsonl"),
        ("data.image_grid_pinpoints=[[336]]", r"expected pairs \[height, width\]"),
    ],
)
def test_refusals_name_the_setting_and_what_to_do(tmp_path, override, message):
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path, "", override)
    assert "\n" not in str(caught.value)


def test_unknown_keys_in_files_name_the_file(tmp_path):
    with pytest.raises(ValueError, match=r"config\.yaml: unknown setting 'model\.nam'"):
        load(tmp_path, "model: {nam: a}\n")
    with pytest.raises(ValueError, match=r"config\.yaml: not valid YAML"):
        load(tmp_path, "model: [\n")
    with pytest.raises(FileNotFoundError, match=r"no config file .*gone\.yaml \(base of"):
        load(tmp_path, "base: gone.yaml\n")
    with pytest.raises(ValueError, match="leads back to itself"):
        load(tmp_path, "base: config.yaml\n")


def test_resolved_settings_read_back(tmp_path):
    settings = load(tmp_path, "", "model.start_layer=null", "optim.lr=3e-4")
    write_text(tmp_path / "run.yaml", "# comment\n" + settings_yaml(settings))
    assert load_settings(tmp_path / "run.yaml") == settings
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "run.yaml"]


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ValueError, match="unknown preset 'tinny': did you mean 'tiny'"):
        preset_file("tinny", "pretrain")
    only = r"'vicuna-7b-L20': did you mean 'vicuna-7b-L16'\? \(one of vicuna-7b, vicuna-7b-24gb,"
    with pytest.raises(ValueError, match=only) as refused:  # variants of that model alone
        preset_file("vicuna-7b-L20", "pretrain")
    assert "vicuna-13b" not in str(refused.value)
    assert preset_file("tiny-baseline", "finetune").name == "finetune-baseline.yaml"


def test_every_setting_has_help_and_a_check_that_fits_its_default():
    text = describe_settings()
    for key, value, item in walk(Settings()):
        assert item.metadata["help"], key
        assert f"{key}=" in text
        choices = item.metadata["choices"]
        null = value is None and "None" in str(item.type)
        assert choices is None or null or value in choices, key


def test_every_setting_is_read_by_code():
    read: set[tuple[str, str]] = set()
    for path in [*ROOT.glob("proxyv/train/*.py"), *ROOT.glob("proxyv/data/*.py")]:
        if path.name == "settings.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                owner = getattr(node.value, "attr", getattr(node.value, "id", ""))
                read.add((owner, node.attr))
    keys = [key for key, _, _ in walk(Settings())]
    assert not [key for key in keys if tuple(key.split(".")) not in read]


@pytest.mark.parametrize(
    ("rows", "ranks", "drop_last", "steps"),
    [(1_246_000, 8, False, 2434), (100, 1, False, 7), (100, 1, True, 6)],
)
def test_steps(tmp_path, rows, ranks, drop_last, steps):
    batch = "optim.global_batch=512" if ranks == 8 else "optim.global_batch=16"
    settings = load(tmp_path, "", batch, f"data.drop_last={drop_last}")
    assert total_steps(settings, rows, ranks) == steps


@pytest.mark.parametrize(("epochs", "steps"), [(1.5, 11), (0.5, 4), (2, 14), (0.01, 1)])
def test_a_step_that_a_part_of_a_pass_begins_is_made(tmp_path, epochs, steps):
    """Of seven steps a pass."""
    settings = load(tmp_path, "", "optim.global_batch=16", f"optim.epochs={epochs}")
    assert total_steps(settings, 100, 1) == steps


def test_a_warmup_of_less_than_a_step_is_one(tmp_path):
    more = ("optim.global_batch=16", "optim.warmup_ratio=0.03", "deepspeed.config=null")
    settings = load(tmp_path, "", "model.dtype=float32", *more)
    assert training_arguments(settings, tmp_path, 100, 1).warmup_steps == 1


def test_limits_may_be_infinite_and_layers_several(tmp_path):
    given = ("optim.max_grad_norm=.inf", "data.max_megapixels=.inf")
    settings = load(tmp_path, "", *given, "model.vision_feature_layer=[12, 16]")
    assert settings.optim.max_grad_norm == settings.data.max_megapixels == float("inf")
    assert settings.model.vision_feature_layer == [12, 16]


@pytest.mark.parametrize("more", [[], ["optim.max_steps=3"]])
def test_dropping_the_last_rows_may_not_drop_all(tmp_path, more):
    settings = load(tmp_path, "", "data.drop_last=true", *more)
    assert total_steps(settings, 32, 2) == (3 if more else 1)
    with pytest.raises(ValueError, match=r"data\.drop_last=true: 31 rows .* of 16 .* of 2 ranks"):
        total_steps(settings, 31, 2)


def test_global_batch_must_be_dealt_evenly(tmp_path):
    settings = load(tmp_path, "", "optim.global_batch=64")
    assert accumulation_steps(settings, 2) == 2
    with pytest.raises(ValueError, match=r"optim\.global_batch=64 .*=16 x 3 ranks = 48"):
        accumulation_steps(settings, 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"scheduler": {"type": "WarmupLR"}}, "a section 'scheduler'.*remove it from the file"),
        ({"optimizer": {"type": "AdamW"}}, "a section 'optimizer'.*remove it from the file"),
        ({"zero_optimization": {"stage": 3}}, "set .*_16bit_weights_on_model_save to true"),
        (
            {"zero_optimization": {"stage": 3, f"stage3_{GATHER}": "auto"}},  # false, that is
            "set .*_16bit_weights_on_model_save to true",
        ),
        ([], "must hold a JSON object"),
    ],
)
def test_a_deepspeed_file_that_would_undo_a_run_is_refused(tmp_path, content, message):
    path = tmp_path / "zero.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"deepspeed\.config={path}.*{message}"):
        deepspeed_config(load(tmp_path, "", f"deepspeed.config={path}"))


def test_a_stage_three_in_the_words_of_llava_is_taken(tmp_path):
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, GATHER: True}}))
    assert deepspeed_config(load(tmp_path, "", f"deepspeed.config={path}"))


def test_every_shipped_deepspeed_file_is_taken(tmp_path):
    files = sorted((ROOT / "configs/deepspeed").glob("*.json"))
    assert len(files) >= 5
    for path in files:
        config = deepspeed_config(load(tmp_path, "", f"deepspeed.config={path}"))
        assert config["zero_optimization"]["stage"] in (1, 2, 3)
