"""VisionZip and PruMerge against reference outputs and against slow restatements."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reduction_cases import golden_cases, read, settings_of
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from proxyv.reduction.attention import attention_rows
from proxyv.reduction.base import CLASS_TOKEN, MERGED, CropTokens, TowerStates
from proxyv.reduction.prumerge import PruMerge, class_attention, count_outliers
from proxyv.reduction.random_drop import RandomDrop
from proxyv.reduction.tower import tower_states
from proxyv.reduction.visionzip import VisionZip, zip_crops


def states(generator: torch.Generator, N: int = 3, n: int = 36, has_class: bool = True):
    c, H, h, W = int(has_class), 2, 6, 12
    rows = torch.randn(N, c + n, W, generator=generator)
    query = 2 * torch.randn(N, H, 1 if has_class else n, h, generator=generator)
    key = torch.randn(N, H, c + n, h, generator=generator)
    return TowerStates(rows, has_class, query, key)


def alone(all_states: TowerStates, crop: int) -> TowerStates:
    cut = slice(crop, crop + 1)
    assert all_states.query is not None and all_states.key is not None
    return TowerStates(
        all_states.features[cut], all_states.has_class, all_states.query[cut], all_states.key[cut]
    )


def assert_crops_are_independent(method, all_states: TowerStates) -> None:
    together = method.reduce(all_states)
    for crop in range(all_states.features.shape[0]):
        single = method.reduce(alone(all_states, crop))
        valid = together.valid[crop]
        assert single.valid.all()
        assert together.origin[crop][valid].tolist() == single.origin[0].tolist()
        torch.testing.assert_close(together.tokens[crop][valid], single.tokens[0])
        assert not together.tokens[crop][~valid].any()


# --- VisionZip


@pytest.mark.parametrize("path", golden_cases("visionzip"))
def test_visionzip_function_golden(path) -> None:
    case = read(path, "fn.")
    out = zip_crops(
        case["hidden_states"][:, 1:],
        case["cls_attention"][..., 1:],
        case["metric"][:, 1:],
        int(case["dominant_num"]),
        int(case["contextual_num"]),
        case["hidden_states"][:, :1],
    )
    kept = case["out_keep_index_unsorted"].sort(dim=1).values
    assert torch.equal(out.origin[:, : kept.shape[1]], kept - 1)
    torch.testing.assert_close(out.tokens, case["out_tokens"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("path", golden_cases("visionzip"))
def test_visionzip_in_a_tower_golden(path, attention) -> None:
    case = read(path, "e2e.")
    state = {k.removeprefix("vision_model."): v for k, v in read(path, "clip.").items()}
    config = CLIPVisionConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64,
        image_size=24, patch_size=4, hidden_act="quick_gelu", layer_norm_eps=1e-5,
        attn_implementation=attention,
    )  # fmt: skip
    tower = CLIPVisionModel(config).eval()
    expected_names = set(tower.state_dict())
    tower.load_state_dict({k: v for k, v in state.items() if k in expected_names})
    with torch.no_grad():
        hidden = tower(case["pixel_values"], output_hidden_states=True).hidden_states
        torch.testing.assert_close(hidden[-2], case["penultimate_hidden"], atol=1e-4, rtol=0)
        kept = case["out_keep_index_unsorted"].sort(dim=1).values
        method = VisionZip(kept.shape[1], case["out_tokens"].shape[1] - kept.shape[1])
        out = method.reduce(tower_states(tower, hidden, method, -2, True))
    assert torch.equal(out.origin[:, : kept.shape[1]], kept - 1)
    torch.testing.assert_close(out.tokens, case["out_tokens"], atol=1e-4, rtol=0)


def slow_visionzip(crop: TowerStates, dominant: int, contextual: int) -> Tensor:
    """One crop, patch by patch."""
    assert crop.query is not None and crop.key is not None
    x, n = crop.features[0], crop.features.shape[1] - 1
    score = torch.zeros(n)
    for head in range(crop.query.shape[1]):
        row = crop.query[0, head, 0] @ crop.key[0, head].T / crop.key.shape[-1] ** 0.5
        score += row.softmax(0)[1:]
    kept = sorted(sorted(range(n), key=lambda j: -score[j])[: dominant - 1])
    rest = [j for j in range(n) if j not in kept]
    out = [x[0]] + [x[j + 1] for j in kept]
    step = max(1, len(rest) // contextual) if contextual else 1
    targets = rest[::step][:contextual]
    metric = crop.key[0].mean(dim=0)[1:]
    groups: dict[int, list[Tensor]] = {t: [] for t in targets}
    for j in rest:
        if targets and j not in targets:
            cos = [torch.cosine_similarity(metric[j], metric[t], dim=0) for t in targets]
            groups[targets[int(torch.stack(cos).argmax())]].append(x[j + 1])
    for t, members in groups.items():
        out.append(x[t + 1] + (torch.stack(members).mean(0) if members else 0))
    return torch.stack(out)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 30), st.integers(0, 6), st.integers(0, 10**6))
def test_visionzip_equals_slow_oracle(dominant: int, contextual: int, seed: int) -> None:
    crop = states(torch.Generator().manual_seed(seed), N=1)
    out = VisionZip(dominant, contextual).reduce(crop)
    assert out.tokens.shape[1] == dominant + contextual
    torch.testing.assert_close(out.tokens[0], slow_visionzip(crop, dominant, contextual))


@pytest.mark.parametrize("has_class", [True, False])
@pytest.mark.parametrize("include_class", [True, False])
def test_visionzip_crops_are_independent(generator, has_class, include_class) -> None:
    method = VisionZip(9, 4, include_class)
    given_states = states(generator, has_class=has_class)
    assert_crops_are_independent(method, given_states)
    out = method.reduce(given_states)
    assert out.tokens.shape[1] == method.tokens_per_crop(36) == 13
    assert (out.origin[:, 0] == CLASS_TOKEN).all() == (has_class and include_class)


def test_visionzip_refuses_more_tokens_than_patches(generator) -> None:
    with pytest.raises(ValueError, match=r"visionzip.dominant=30.*contextual=7.*37.*36"):
        VisionZip(30, 7).reduce(states(generator))
    with pytest.raises(ValueError, match=r"visionzip.dominant.*at least 1.*0"):
        VisionZip(0, 7)


# --- PruMerge


def reduced(case: dict[str, Tensor], method: PruMerge) -> CropTokens:
    """The reference has one head of the full width and patches only."""
    patches = case["features"]
    rows = torch.cat([patches[:, :1], patches], dim=1)
    return method.reduce(TowerStates(rows, True, case["q"][:, None, :1], case["k"][:, None]))


@pytest.mark.parametrize("variant", ["prumerge", "prumerge_plus"])
@pytest.mark.parametrize("path", golden_cases("prumerge"))
def test_prumerge_adaptive_golden(path, variant) -> None:
    case = read(path, "adaptive.")
    counts = count_outliers(class_attention(case["q"][:, :1], case["k"]))
    assert counts.item() / case["features"].shape[1] == case["ratio"].item()
    out = reduced(case, PruMerge(plus=variant.endswith("plus")))
    index = case[f"{variant}.index"]
    assert out.origin.tolist() == [[*index[0].tolist(), MERGED]]
    torch.testing.assert_close(out.tokens, case[f"{variant}.out"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("path", golden_cases("prumerge"))
def test_prumerge_fixed_golden(path) -> None:
    for (part,) in settings_of(path, r"fixed(\d+)\."):
        case = read(path, f"fixed{part}.")
        out = reduced(case, PruMerge(plus=False, ratio=1 / part))
        assert torch.equal(out.origin[:, :-1], case["prumerge.index"])
        torch.testing.assert_close(out.tokens, case["prumerge.out"], atol=1e-5, rtol=0)


def slow_prumerge(crop: TowerStates, method: PruMerge) -> tuple[list[int], Tensor]:
    """One crop, patch by patch."""
    assert crop.query is not None and crop.key is not None
    x, n = crop.features[0, 1:], crop.features.shape[1] - 1
    q = torch.cat(list(crop.query[0, :, 0]))
    k = torch.cat([crop.key[0, head] for head in range(crop.key.shape[1])], dim=-1)
    a = (k @ q / len(q) ** 0.5).softmax(0)[1:]
    if method.ratio is None:
        ordered = sorted(a.double().tolist())

        def quartile(p: float) -> float:
            low = int(p * (n - 1))
            return ordered[low] + (p * (n - 1) - low) * (ordered[low + 1] - ordered[low])

        limit = quartile(0.75) + 1.5 * (quartile(0.75) - quartile(0.25))
        count = sum(value > limit for value in a.double().tolist())
    else:
        count = int(n * method.ratio)
    count = max(1, count)
    kept = sorted(range(n), key=lambda j: -a[j])[:count]
    if method.plus:
        step = max(1, int(int(n / count) / 3))
        kept += [j for j in range(0, n - 1, step) if j not in kept]
    if method.order == "raster":
        kept.sort()
    out = []
    for i in kept:
        others = sorted(
            (j for j in range(n) if j != i),
            key=lambda j: -float(torch.cosine_similarity(k[j + 1], k[i + 1], dim=0)),
        )
        out.append(x[i] + sum(a[j] * x[j] for j in others[: method.neighbours]))
    pruned = [j for j in range(n) if j not in kept]
    if pruned:
        out.append(sum((a[j] * x[j] for j in pruned), torch.zeros_like(x[0])))
        return [*kept, MERGED], torch.stack(out)
    return kept, torch.stack(out)


@settings(max_examples=12, deadline=None)
@given(
    st.booleans(),
    st.sampled_from([None, 0.0, 0.1, 0.5, 1.0]),
    st.sampled_from(["score", "raster"]),
    st.integers(0, 10**6),
)
def test_prumerge_equals_slow_oracle(plus, ratio, order, seed) -> None:
    crop = states(torch.Generator().manual_seed(seed), N=1, n=20)
    method = PruMerge(plus=plus, ratio=ratio, neighbours=5, order=order)
    out = method.reduce(crop)
    kept, tokens = slow_prumerge(crop, method)
    assert out.valid.all() and out.tokens.shape[1] <= 20
    assert out.origin[0].tolist() == kept
    torch.testing.assert_close(out.tokens[0], tokens, atol=1e-5, rtol=1e-4)
    if ratio is not None and not plus:
        assert method.tokens_per_crop(20) == len(kept)


def test_prumerge_never_leaves_more_tokens_than_patches() -> None:
    """576 patches with 111 outliers, the last among them: all others are evenly spaced."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(576, generator=generator) * 0.2
    scores[torch.randperm(575, generator=generator)[:110]] = 3.0
    scores[-1] = 3.0
    key = torch.zeros(2, 1, 577, 4)
    key[0, 0, 1:, 0] = scores
    key[:, 0, :, 1] = torch.rand(577, generator=generator) * 1e-3
    query = torch.tensor([2.0, 0, 0, 0]).expand(2, 1, 1, 4)
    features = torch.randn(2, 577, 8, generator=generator)
    out = PruMerge().reduce(TowerStates(features, True, query, key))
    kept = out.origin[0].tolist()
    assert sorted(kept) == list(range(576)) and out.valid[0].all()
    flat = int(out.valid[1].sum())  # another crop, without outliers
    assert (
        1 < flat < 576 and out.origin[1, flat - 1] == MERGED and (out.tokens[1, flat:] == 0).all()
    )


@pytest.mark.parametrize("plus", [True, False])
def test_prumerge_crops_are_independent_and_ragged(generator, plus) -> None:
    given_states = states(generator, N=6)
    method = PruMerge(plus=plus, neighbours=4)
    assert_crops_are_independent(method, given_states)
    assert not method.reduce(given_states).valid.all(), "the crops keep different numbers"


def test_prumerge_uniform_attention_keeps_one_patch(generator) -> None:
    given_states = states(generator, N=1)
    flat = TowerStates(
        given_states.features, True, torch.zeros_like(given_states.query), given_states.key
    )
    assert PruMerge(plus=False).reduce(flat).tokens.shape[1] == 2


def test_prumerge_refusals(generator) -> None:
    with pytest.raises(ValueError, match=r"prumerge.*class token.*visionzip"):
        PruMerge().reduce(states(generator, has_class=False))
    with pytest.raises(ValueError, match=r"prumerge.ratio.*0 to 1.*1.5"):
        PruMerge(ratio=1.5)
    with pytest.raises(ValueError, match=r"prumerge.order.*score, raster.*'index'"):
        PruMerge(order="index")


# --- from a tower


SIZES = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 24,
    "patch_size": 4,
    "attn_implementation": "eager",
}


@pytest.mark.parametrize("feature_layer", [-2, 2, -1, [-2]])
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_attention_is_that_of_the_layer_named(kind, feature_layer) -> None:
    tower = (
        CLIPVisionModel(CLIPVisionConfig(**SIZES))
        if kind == "clip"
        else SiglipVisionModel(SiglipVisionConfig(**SIZES, vision_use_head=False))
    ).eval()
    has_class = kind == "clip"
    with torch.no_grad():
        out = tower(torch.randn(2, 3, 24, 24), output_hidden_states=True, output_attentions=True)
        number = feature_layer if isinstance(feature_layer, int) else feature_layer[0]
        for method, weights in (
            (VisionZip(3, 2), out.attentions[number if number < 0 else number - 1]),
            (PruMerge(), out.attentions[-1]),
        ):
            given_states = tower_states(tower, out.hidden_states, method, feature_layer, has_class)
            assert torch.equal(given_states.features, out.hidden_states[number])
            scaling = given_states.key.shape[-1] ** -0.5
            ours = attention_rows(given_states.query, given_states.key, scaling)
            expected = weights[:, :, :1] if has_class else weights
            torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)


def test_tower_refusals() -> None:
    tower = CLIPVisionModel(CLIPVisionConfig(**SIZES))
    hidden = tower(torch.randn(1, 3, 24, 24), output_hidden_states=True).hidden_states
    with pytest.raises(ValueError, match=r"vision_feature_layer=\[1, 2\].*'prumerge'"):
        tower_states(tower, hidden, PruMerge(), [1, 2], True)
    with pytest.raises(ValueError, match=r"vision_feature_layer=0.*'visionzip'"):
        tower_states(tower, hidden, VisionZip(), 0, True)
    assert tower_states(tower, hidden, RandomDrop(4), 0, True).key is None
