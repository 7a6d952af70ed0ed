"""The method again, slow and obvious, to compare the package with.

One sequence at a time, every token an object with a kind and a position, visibility decided pair
by pair, the concatenation of the guided update really built, proxies by ``interpolate``. Nothing
of ``proxyv.model`` is used but the names of its weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Token:
    """One row: "full", "proxy", "newline" or "text", its position, and a proxy's image.

    ``turn`` is the position that turns queries and keys, where it is another one.
    """

    kind: str
    position: int
    image: int = -1
    turn: int | None = None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def rope(x: Tensor, positions: list[int], theta: float, share: float = 1.0) -> Tensor:
    """(N, H, h) -> the same; of the first ``share`` of a head, pair i is (i, i + half)."""
    half = int(x.shape[-1] * share) // 2
    out = []
    for row, position in zip(x, positions, strict=True):
        angle = position / theta ** (torch.arange(half, device=x.device, dtype=x.dtype) / half)
        a, b, rest = row[:, :half], row[:, half : 2 * half], row[:, 2 * half :]
        turned = [a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin(), rest]
        out.append(torch.cat(turned, -1))
    return torch.stack(out)


def sees(query: Token, key: Token) -> bool:
    """Whether a query may look at a key in a ProxyV layer."""
    if key.position > query.position:
        return False
    if query.kind == "proxy":
        return key.kind in ("proxy", "newline", "text")
    return key.kind in ("full", "newline", "text")


def sees_in_ordinary_layer(query: Token, key: Token) -> bool:
    return key.position <= query.position


def image_features(
    weights: Mapping[str, Tensor], tower: Any, config: Any, pixels: Tensor, pool: int = 1
):
    """(C, 3, height, width) -> (C, (s/pool)^2, D): stock tower, pool, projector by hand."""
    states = tower(pixels, output_hidden_states=True).hidden_states
    x = states[config.vision_feature_layer][:, 1:]
    side = math.isqrt(x.shape[1])
    grid = F.avg_pool2d(x.transpose(1, 2).unflatten(2, (side, side)), pool)
    x = grid.flatten(2).transpose(1, 2)
    for name in ("linear_1", "linear_2"):
        weight = weights[f"model.multi_modal_projector.{name}.weight"]
        x = x @ weight.T + weights[f"model.multi_modal_projector.{name}.bias"]
        x = F.gelu(x) if name == "linear_1" else x
    return x


def lay_out(
    ids: list[int], shapes: list[tuple[int, int]], config: Any
) -> tuple[list[Token], list[int]]:
    """Tokens of the natural sequence, and the position where each image starts.

    ``shapes`` are crops and full tokens of a crop, for each image.
    """
    tokens, starts = [], []
    image, column = 0, 0
    while column < len(ids):
        if ids[column] != config.image_token_index:
            tokens.append(Token("text", column))
            column += 1
            continue
        starts.append(column)
        crops, per_crop = shapes[image]
        for crop in range(crops):
            for _ in range(per_crop):
                tokens.append(Token("full", column, image))
                column += 1
            position = column
            if config.layout == "released" and crop > 0:
                position -= per_crop + 1
            tokens.append(Token("newline", position))
            column += 1
        image += 1
    return tokens, starts


class Oracle:
    """A language model with ProxyV layers, from a dictionary of weights.

    Args:
        weights: ``dict(model.named_parameters())`` or a state dict.
        config: a ``ProxyVConfig``.
        isolate_images: proxies do not see those of other images, as when every image comes in a
            turn of its own on a cache.
    """

    def __init__(
        self, weights: Mapping[str, Tensor], config: Any, isolate_images: bool = False
    ) -> None:
        self.weights, self.config, self.text = weights, config, config.text_config
        self.isolate_images = isolate_images

    def sees(self, query: Token, key: Token) -> bool:
        if self.isolate_images and query.kind == key.kind == "proxy" and query.image != key.image:
            return False
        return sees(query, key)

    def layer(self, index: int, name: str) -> Tensor:
        return self.weights[f"model.language_model.layers.{index}.{name}.weight"]

    def project(self, index: int, x: Tensor) -> list[Tensor]:
        """(N, D) -> query, key and value, (N, heads, width) each, as the family projects."""
        heads = [self.text.num_attention_heads] + [self.text.num_key_value_heads] * 2
        attn = f"model.language_model.layers.{index}.self_attn."
        if self.text.model_type == "phi3":
            joint = (x @ self.weights[attn + "qkv_proj.weight"].T).view(len(x), sum(heads), -1)
            return list(joint.split(heads, dim=1))
        parts = []
        for name, count in zip("qkv", heads, strict=True):
            rows = x @ self.weights[f"{attn}{name}_proj.weight"].T
            rows = rows + self.weights.get(f"{attn}{name}_proj.bias", 0)
            rows = rows.view(len(x), count, -1)
            if self.text.model_type == "qwen3" and name != "v":
                weight = self.weights[f"{attn}{name}_norm.weight"]
                rows = rms_norm(rows, weight, self.text.rms_norm_eps)
            parts.append(rows)
        return parts

    def attention(self, index, x, queries: list[int], tokens: list[Token], rule) -> Tensor:
        """Attention of some rows over all rows; x is normalised (N, D)."""
        H, K = self.text.num_attention_heads, self.text.num_key_value_heads
        q, k, v = self.project(index, x)
        width = q.shape[-1]
        turn = self.text.rope_parameters
        positions = [token.position if token.turn is None else token.turn for token in tokens]
        share = turn.get("partial_rotary_factor", 1.0)
        q, k = (rope(rows, positions, turn["rope_theta"], share) for rows in (q, k))
        rows = []
        for row in queries:
            keys = [i for i, token in enumerate(tokens) if rule(tokens[row], token)]
            heads = []
            for head in range(H):
                group = head // (H // K)
                scores = k[keys, group] @ q[row, head] / math.sqrt(width)
                heads.append(scores.softmax(-1) @ v[keys, group])
            rows.append(torch.cat(heads))
        return torch.stack(rows) @ self.layer(index, "self_attn.o_proj").T

    def feed_forward(self, index: int, x: Tensor) -> Tensor:
        h = rms_norm(x, self.layer(index, "post_attention_layernorm"), self.text.rms_norm_eps)
        if self.text.model_type == "phi3":
            gate, up = (h @ self.layer(index, "mlp.gate_up_proj").T).chunk(2, dim=-1)
        else:
            gate = h @ self.layer(index, "mlp.gate_proj").T
            up = h @ self.layer(index, "mlp.up_proj").T
        return x + (F.silu(gate) * up) @ self.layer(index, "mlp.down_proj").T

    def attend(self, index, x, queries, tokens, rule) -> Tensor:
        """Both residual steps for some rows; (N, D) -> (len(queries), D)."""
        h = rms_norm(x, self.layer(index, "input_layernorm"), self.text.rms_norm_eps)
        out = x[queries] + self.attention(index, h, queries, tokens, rule)
        return self.feed_forward(index, out)

    def make_proxies(self, image: Tensor) -> Tensor:
        """One image's full tokens (C, s*s, D) -> (C*(s/r)^2, D)."""
        r, side = self.config.side_reduction, math.isqrt(image.shape[1])
        grid = image.unflatten(1, (side, side)).permute(0, 3, 1, 2)
        if self.config.downsample == "average":
            small = F.avg_pool2d(grid, r)
        else:
            small = F.interpolate(grid, scale_factor=1 / r, mode="bilinear", align_corners=False)
        return small.permute(0, 2, 3, 1).reshape(-1, image.shape[-1])

    def turn(self, first: int, number: int, per_crop: int) -> int | None:
        """Rotary position of a proxy where it is not its place in the order."""
        if self.config.proxy_positions == "consecutive":
            return None
        r, side = self.config.side_reduction, math.isqrt(per_crop)
        crop, place = divmod(number, (side // r) ** 2)
        y, x = divmod(place, side // r)
        return first + crop * (per_crop + 1) + (y * r + r // 2) * side + x * r + r // 2

    def learn_proxies(self, index: int, image: Tensor) -> tuple[Tensor, Tensor]:
        """(C, n, D) -> proxies (C*m, D) and each token's shares of its crop's (C*n, m)."""
        queries = self.weights[f"model.language_model.layers.{index}.proxy_initializer.queries"]
        keys = self.layer(index, "proxy_initializer.key_proj")
        proxies, shares = [], []
        for crop in image:
            scores = queries @ (crop @ keys.T).T / math.sqrt(queries.shape[1])  # (m, n)
            proxies.append(scores.softmax(-1) @ crop)
            shares.append(scores.T.softmax(-1))
        return torch.cat(proxies), torch.cat(shares)

    def context(self, number: int, proxies: Tensor, shares: Tensor | None, per_crop: int) -> Tensor:
        """What an image's proxies tell one full token: its own one, or its mixture of them."""
        crop, place = divmod(number, per_crop)
        if shares is not None:
            m = shares.shape[1]
            return shares[number] @ proxies[crop * m : (crop + 1) * m]
        r, side = self.config.side_reduction, math.isqrt(per_crop)
        y, z = divmod(place, side)
        return proxies[crop * (side // r) ** 2 + (y // r) * (side // r) + z // r]

    def guided_update(self, index: int, full: Tensor, proxies: Tensor, shares, per_crop: int):
        """One image, token by token."""
        merge = torch.cat(
            [
                self.layer(index, "guided_update.merge_input"),
                self.layer(index, "guided_update.merge_context"),
            ],
            dim=1,
        )
        out = []
        for number, x in enumerate(full):
            proxy = self.context(number, proxies, shares, per_crop)
            joined = torch.cat(
                [
                    self.layer(index, "guided_update.input_proj") @ x,
                    self.layer(index, "guided_update.context_proj") @ proxy,
                ]
            )
            u = self.layer(index, "guided_update.output_proj") @ F.silu(merge @ joined)
            out.append(x + u)
        norm = self.layer(index, "guided_update.norm")
        return rms_norm(torch.stack(out), norm, self.text.rms_norm_eps)

    def __call__(self, ids: list[int], features: list[Tensor]) -> tuple[Tensor, list[Token]]:
        """Logits of one sequence.

        Args:
            ids: natural sequence with image tokens.
            features: for each image (C, s*s, D); ``s`` may differ.

        Returns:
            Logits (S, vocabulary); rows of full tokens are NaN. And the tokens.
        """
        config = self.config
        shapes = [(image.shape[0], image.shape[1]) for image in features]
        tokens, starts = lay_out(ids, shapes, config)
        vision = [
            row
            for image in features
            for crop in image
            for row in [*crop, self.weights["model.image_newline"]]
        ]
        table = self.weights["model.language_model.embed_tokens.weight"]
        supply = iter(vision)
        x = torch.stack(
            [
                table[i] if token.kind == "text" else next(supply)
                for i, token in zip(ids, tokens, strict=True)
            ]
        )
        depth = self.text.num_hidden_layers
        start = depth if config.start_layer is None or not features else config.start_layer
        for index in range(start):
            x = self.attend(index, x, list(range(len(x))), tokens, sees_in_ordinary_layer)
        if start < depth:
            x = self.run_proxyv_layers(start, x, tokens, starts, shapes)
        x = rms_norm(x, self.weights["model.language_model.norm.weight"], self.text.rms_norm_eps)
        logits = x @ self.weights["lm_head.weight"].T
        if start < depth:
            hidden = torch.tensor([token.kind == "full" for token in tokens])
            logits = logits.masked_fill(hidden[:, None], math.nan)
        return logits, tokens

    def run_proxyv_layers(self, start, x, tokens, starts, shapes) -> Tensor:
        """(S, D) -> (S, D) through all layers from ``start`` on."""
        others = [i for i, token in enumerate(tokens) if token.kind != "full"]
        fulls = [
            [i for i, token in enumerate(tokens) if token.kind == "full" and token.image == which]
            for which in range(len(shapes))
        ]
        made = []
        for rows, (crops, per_crop) in zip(fulls, shapes, strict=True):
            image = x[rows].view(crops, per_crop, -1)
            if self.config.proxy_kind == "learned":
                made.append(self.learn_proxies(start, image))
            else:
                made.append((self.make_proxies(image), None))
        proxies = [rows for rows, _ in made]
        proxy_tokens = [
            Token("proxy", first + number, which, self.turn(first, number, per_crop))
            for which, (first, rows, (_, per_crop)) in enumerate(
                zip(starts, proxies, shapes, strict=True)
            )
            for number in range(len(rows))
        ]
        for index in range(start, self.text.num_hidden_layers):
            everything = torch.cat([x, *proxies])
            queries = [*others, *range(len(x), len(everything))]
            out = self.attend(index, everything, queries, [*tokens, *proxy_tokens], self.sees)
            light, proxies = (
                out[: len(others)],
                list(out[len(others) :].split([len(rows) for rows in proxies])),
            )
            rows = [light]
            for which, (_, per_crop) in enumerate(shapes):
                shares = made[which][1]
                full = x[fulls[which]]
                rows.append(self.guided_update(index, full, proxies[which], shares, per_crop))
            order = torch.tensor([*others, *(row for rows in fulls for row in rows)]).argsort()
            x = torch.cat(rows)[order]
        return x
