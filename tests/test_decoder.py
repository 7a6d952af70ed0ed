"""The ProxyV layers: no large mask, ordinary layers untouched, gradients, last layer."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tiny_models import IMAGE_TOKEN, collate, sample, tiny_config, tiny_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaModel

from proxyv.model.families import (
    ProxyVLlamaDecoderLayer,
    ProxyVLlamaModel,
    build_language_model,
)
from proxyv.model.parts import parameter_part
from proxyv.model.streams import DecoderOptions


class LargestMask(TorchDispatchMode):
    """Remembers the largest boolean tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dtype == torch.bool:
            self.largest = max(self.largest, out.numel())
        return out


@pytest.fixture
def attention_masks(monkeypatch) -> list:
    """Shapes of the masks that reach torch's attention (None where there is none)."""
    seen: list = []
    original = F.scaled_dot_product_attention

    def spy(query, key, value, attn_mask=None, **kwargs):
        seen.append(None if attn_mask is None else tuple(attn_mask.shape))
        return original(query, key, value, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    return seen


def long_model():
    text = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
    }
    vision = {"image_size": 48, "patch_size": 2, "num_hidden_layers": 1}
    return tiny_model(text=text, vision=vision, start_layer=1, side_reduction=4)


def test_no_mask_larger_than_needed_at_2880_vision_tokens(attention_masks, generator) -> None:
    model = long_model()
    batch = collate([sample([20, "5", 30], model.config, generator)])
    num_light, num_proxies, length = 55, 180, 2935
    assert batch["input_ids"].shape[1] == length
    attention_masks.clear()
    with torch.no_grad(), LargestMask() as watch:
        model(**batch)
    vision, language = attention_masks[:1], attention_masks[1:]
    light = (1, 1, num_light, length)
    proxy = (1, 1, num_proxies, num_proxies + num_light)
    assert vision == [None]
    assert language == [None, light, proxy, light, proxy, light]
    assert watch.largest == num_light * length


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("start_layer", "layout", "side", "masked"),
    [
        (2, "natural", "right", False),
        (2, "natural", "left", True),
        (2, "released", "right", True),
        (None, "natural", "right", False),
        (None, "natural", "left", True),
    ],
)
def test_ordinary_layers_get_a_mask_only_where_one_is_needed(
    attention_masks, generator, start_layer, layout, side, masked, training
) -> None:
    """Training has no cache, and transformers then looks at the positions too."""
    model = tiny_model(layout=layout, start_layer=start_layer).train(training)
    rows = [sample(parts, model.config, generator) for parts in ([2, "2", 3], [4, "1", 1])]
    batch = collate(rows, side)
    with torch.no_grad():
        model(**batch)
    length = batch["input_ids"].shape[1]
    tower = model.config.vision_config.num_hidden_layers
    ordinary = attention_masks[tower : tower + 2]
    assert ordinary == ([(2, 1, length, length)] * 2 if masked else [None, None])


def test_baseline_is_the_stock_decoder_bit_for_bit() -> None:
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    options = DecoderOptions(None, 2, "bilinear", 16, False)
    for name in ("eager", "sdpa"):
        config._attn_implementation = name
        stock = LlamaModel(config).eval()
        ours = ProxyVLlamaModel(config, options).eval()
        ours.load_state_dict(stock.state_dict())
        assert [type(layer) for layer in ours.layers] == [type(layer) for layer in stock.layers]
        ids = torch.randint(0, 50, (2, 9))
        with torch.no_grad():
            assert torch.equal(ours(ids).last_hidden_state, stock(ids).last_hidden_state)
            mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9])
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            left = stock(ids, attention_mask=mask, position_ids=positions).last_hidden_state
            assert torch.equal(ours(ids, attention_mask=mask).last_hidden_state, left)


def test_text_alone_runs_the_stock_layers_whatever_the_start_layer() -> None:
    model = tiny_model(start_layer=1).model.language_model
    stock = LlamaModel(model.config).eval()
    own = {k: v for k, v in model.state_dict().items() if "guided_update" not in k}
    stock.load_state_dict(own)
    ids = torch.randint(0, 50, (2, 9))
    with torch.no_grad():
        assert torch.equal(model(ids).last_hidden_state, stock(ids).last_hidden_state)


def test_every_layer_is_built_once_and_knows_its_place() -> None:
    model = tiny_model(start_layer=1).model.language_model
    layers = list(model.layers)
    assert [isinstance(layer, ProxyVLlamaDecoderLayer) for layer in layers] == [False] + [True] * 3
    assert [layer.self_attn.layer_idx for layer in layers] == [0, 1, 2, 3]
    assert [layer.is_last for layer in layers[1:]] == [False, False, True]
    assert model.config.num_hidden_layers == 4


def test_an_unknown_family_is_named_with_the_known_ones() -> None:
    config = LlamaConfig()
    config.model_type = "mamba"
    with pytest.raises(ValueError, match=r"'mamba' .* llama"):
        build_language_model(config, DecoderOptions(None, 2, "bilinear", 16, False))


def loss_and_gradients(model, batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE_TOKEN, -100)
    model.zero_grad()
    loss = model(**batch, labels=labels).loss
    loss.backward()
    named = model.named_parameters()
    return loss, {n: p.grad.clone() for n, p in named if p.grad is not None}


@pytest.mark.parametrize("kind", ["spatial", "learned"])
def test_gradient_checkpointing_changes_nothing_and_reentrant_is_refused(kind, generator) -> None:
    model = tiny_model(start_layer=1, proxy_kind=kind).train()
    rows = [sample(parts, model.config, generator) for parts in ([2, "2", 3], [3, "1", 4])]
    batch = collate(rows)
    loss, gradients = loss_and_gradients(model, batch)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again, same = loss_and_gradients(model, batch)
    torch.testing.assert_close(again, loss)
    assert same.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(same[name], gradient, msg=name)
    with pytest.raises(ValueError, match=r"use_reentrant=True .*'use_reentrant': False"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})


def test_only_the_last_guided_update_is_frozen_and_everything_else_learns(generator) -> None:
    model = tiny_model(start_layer=1).train()
    batch = collate([sample([2, "2", 3], model.config, generator)])
    _, gradients = loss_and_gradients(model, batch)
    frozen = model.freeze_unused()
    assert len(frozen) == 6 and all(".layers.3.guided_update." in name for name in frozen)
    assert not any(p.requires_grad for n, p in model.named_parameters() if n in frozen)
    language = [n for n, _ in model.named_parameters() if ".vision_tower." not in n]
    for name in language:
        if name not in frozen:
            assert float(gradients[name].abs().max()) > 0, name


@pytest.mark.parametrize("kind", ["spatial", "learned"])
def test_folding_changes_nothing_but_the_work(kind, generator) -> None:
    model = tiny_model(start_layer=1, proxy_kind=kind, spread=0.2)
    batch = collate([sample([2, "2", 3], model.config, generator)])
    names = set(model.state_dict())
    with torch.no_grad():
        plain = model(**batch).logits
        assert model.fuse() is model
        update = model.model.language_model.layers[1].guided_update
        assert tuple(update.fused_input.shape) == (16, 32)
        update.merge_input.weight.data.mul_(2)  # only what is folded is read
        folded = model(**batch).logits
        update.merge_input.weight.data.div_(2)
    torch.testing.assert_close(folded, plain, atol=1e-5, rtol=0)
    assert set(model.state_dict()) == names
    assert model.model.language_model.layers[3].guided_update.fused_input is None
    assert model.eval().model.language_model.layers[1].guided_update.fused_input is not None
    assert (
        model.double().model.language_model.layers[1].guided_update.fused_input.dtype.itemsize == 8
    )
    model.float().train()
    assert update.fused_input is update.fused_context is None
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**batch).logits, plain)
    model.fuse().load_state_dict(model.state_dict())
    assert update.fused_input is None


def test_folding_is_refused_in_training_and_over_adapters() -> None:
    model = tiny_model(start_layer=1)
    with pytest.raises(ValueError, match=r"eval\(\) first"):
        model.train().fuse()
    assert tiny_model(start_layer=None).fuse()
    update = model.eval().model.language_model.layers[1].guided_update
    update.input_proj = torch.nn.Sequential(update.input_proj)
    with pytest.raises(ValueError, match=r"weight of a Sequential: merge adapters"):
        model.fuse()


def test_learned_proxies_learn_unless_nothing_reads_them(generator) -> None:
    for start_layer, names in ((1, set()), (3, {"queries", "key_proj.weight"})):
        model = tiny_model(start_layer=start_layer, proxy_kind="learned", learned_proxies=3)
        batch = collate([sample([2, "2", 3], model.config, generator)])
        _, gradients = loss_and_gradients(model.train(), batch)
        frozen = {n.split("initializer.")[1] for n in model.freeze_unused() if "initializer" in n}
        assert frozen == names
        prefix = f"model.language_model.layers.{start_layer}.proxy_initializer."
        learned = {n for n in gradients if "initializer" in n}
        assert learned == (set() if names else {prefix + "queries", prefix + "key_proj.weight"})
        assert all(float(gradients[name].abs().max()) > 0 for name in learned)


FASTV = {"method": "fastv", "layer": 1}
VARIANTS = [
    {},
    {"proxy_kind": "learned"},
    {"skip": "atn_ffn"},
    {"skip": "atn"},
    {"reduction": {"method": "tokenpacker", "scale": 2, "heads": 2}},
    {"proxy_kind": "learned", "reduction": FASTV},
]


@pytest.mark.parametrize("options", VARIANTS)
def test_a_batch_without_images_gives_the_new_modules_zero_gradients(options, generator) -> None:
    model = tiny_model(start_layer=1, **options).train()
    batch = collate([sample([5], model.config, generator)])
    loss, gradients = loss_and_gradients(model, batch)
    expected = {
        n
        for n, p in model.named_parameters()
        if p.requires_grad and parameter_part(n) in ("proxyv", "projector", "newline")
    }
    assert len(expected) > 3 and expected <= gradients.keys()
    assert all(float(gradients[name].abs().max()) == 0 for name in expected)
    with torch.no_grad():
        assert torch.equal(loss, model(**batch, labels=batch["input_ids"]).loss)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", VARIANTS)
def test_sharded_layers_train_with_and_without_images(options, generator) -> None:
    """FSDP2: outside of their layer's forward its parameters are shards that cannot be mixed."""
    plain = tiny_model(start_layer=1, **options).train()
    model = tiny_model(start_layer=1, **options).train()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for layer in model.model.language_model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model.model.multi_modal_projector, mesh=mesh)
        fully_shard(model, mesh=mesh)
        for parts in ([2, "2", 3], [6]):
            batch = collate([sample(parts, model.config, generator)])
            if options.get("reduction") == FASTV:
                with pytest.raises(ValueError, match=r"inside the decoder.*fully_shard"):
                    model(**batch)
                continue
            labels = batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE_TOKEN, -100)
            for one in (plain, model):
                one.zero_grad()
                one(**batch, labels=labels, loss_only=True).loss.backward()
            shards = {n: p.grad for n, p in model.named_parameters()}
            for name, parameter in plain.named_parameters():
                if parameter.grad is not None:
                    torch.testing.assert_close(shards[name].full_tensor(), parameter.grad)
    finally:
        dist.destroy_process_group()


def test_hidden_states_and_attentions_are_natural_rows(generator) -> None:
    model = tiny_model(attention="eager", start_layer=1)
    rows = [sample(parts, model.config, generator) for parts in ([2, "2", 3], [3, "1", 4])]
    batch = collate(rows)
    length = batch["input_ids"].shape[1]
    with torch.no_grad():
        outputs = model(**batch, output_hidden_states=True, output_attentions=True)
        plain = model(**batch)
    torch.testing.assert_close(outputs.logits, plain.logits)
    assert [state.shape for state in outputs.hidden_states] == [(2, length, 32)] * 5
    assert [weights.shape for weights in outputs.attentions] == [(2, 4, length, length)] * 4
    is_full = torch.zeros(length, dtype=torch.bool)
    is_full[2:18] = is_full[19:35] = True
    for weights in outputs.attentions[1:]:
        sums = weights[0].sum(-1)
        assert sums[:, is_full].abs().max() == 0
        torch.testing.assert_close(sums[:, ~is_full], torch.ones_like(sums[:, ~is_full]))
        assert weights.triu(1).abs().max() == 0
    again = model.lm_head(outputs.hidden_states[-1])
    torch.testing.assert_close(again, outputs.logits)


def test_full_rows_hold_the_norm_of_what_entered_the_last_layer(generator) -> None:
    model = tiny_model(start_layer=1)
    batch = collate([sample([2, "1", 3], model.config, generator)])
    with torch.no_grad():
        outputs = model(**batch, output_hidden_states=True)
        expected = model.model.language_model.norm(outputs.hidden_states[3][:, 2:18])
    torch.testing.assert_close(outputs.hidden_states[4][:, 2:18], expected)


def test_the_cache_holds_natural_rows_and_no_proxy(generator) -> None:
    model = tiny_model(start_layer=0)
    rows = [sample(parts, model.config, generator) for parts in ([2, "2", 3], [3, "1", 4])]
    batch = collate(rows)
    with torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values
        alone = model(**collate(rows[1:]), use_cache=True).past_key_values
    length = batch["input_ids"].shape[1]
    real = len(rows[1][0])
    for mine, single in zip(cache.layers, alone.layers, strict=True):
        assert mine.keys.shape == mine.values.shape == (2, 2, length, 8)
        torch.testing.assert_close(mine.keys[1, :, :real], single.keys[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(mine.values[1, :, :real], single.values[0], atol=1e-5, rtol=1e-4)


def test_a_prepared_mask_is_refused_with_images(generator) -> None:
    model = tiny_model()
    batch = collate([sample([2, "1", 3], model.config, generator)])
    batch["attention_mask"] = torch.ones(1, 1, 22, 22, dtype=torch.bool)
    with pytest.raises(ValueError, match="attention_mask has 4 dimensions"):
        model(**batch)


def test_an_unknown_attention_is_an_error_not_a_fallback() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="no_such_attention"):
        model.set_attn_implementation("no_such_attention")
    assert model.config.text_config._attn_implementation == "sdpa"


PLAIN = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlavaNextForConditionalGeneration
from transformers.models.llama import modeling_llama
from transformers.models.llava_next import modeling_llava_next
from transformers import cache_utils, masking_utils

def functions():
    found = {}
    for module in (modeling_llama, modeling_llava_next, cache_utils, masking_utils):
        for name, value in vars(module).items():
            found[module.__name__, name] = value
            if isinstance(value, type):
                for key, member in vars(value).items():
                    if callable(member):
                        found[module.__name__, name, key] = member
    return found

torch.manual_seed(0)
config = LlamaConfig(vocab_size=60, hidden_size=32, intermediate_size=40, num_hidden_layers=3,
                     num_attention_heads=4)
plain = LlamaForCausalLM(config).eval()
ids = torch.randint(0, 60, (2, 7))
before, known, classes = plain(ids).logits, functions(), [type(m) for m in plain.modules()]

from tiny_models import tiny_model, collate, sample
model = tiny_model(start_layer=0)
generator = torch.Generator().manual_seed(0)
batch = collate([sample([2, "1", 3], model.config, generator)])
model.train()
labels = batch["input_ids"].clone()
model(**batch, labels=labels).loss.backward()
model.eval().generate(**batch, max_new_tokens=2)

assert torch.equal(plain(ids).logits, before)
assert functions() == known
assert [type(m) for m in plain.modules()] == classes
assert not any("forward" in vars(m) for m in [*plain.modules(), *model.modules()])
another = LlamaForCausalLM(config)
assert [type(m) for m in another.modules()] == classes
print("unchanged")
"""


def test_nothing_of_transformers_is_changed(request) -> None:
    folder = request.path.parent
    result = subprocess.run(
        [sys.executable, "-c", PLAIN],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**__import__("os").environ, "PYTHONPATH": f"{folder.parent}:{folder}"},
    )
    assert result.stdout.strip().endswith("unchanged"), result.stderr[-2000:]


def test_tiny_config_is_what_the_tests_assume() -> None:
    assert tiny_config().rows_per_crop == 17
