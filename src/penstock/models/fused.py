"""A layer whose norms are computed by the products behind them: two calls less, and a pass over each row where it is
quantized. The sum that a norm takes is made by the product before it."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar, cast

from penstock.formats.dense import Gated, GatedPanels, Linear, Panels
from penstock.formats.smoothed import Smoothed, SmoothedGated
from penstock.kernels import products
from penstock.kernels.products import Packed
from penstock.models.attention import FusedQkv
from penstock.models.config import DecoderConfig
from penstock.models.mlp import GatedMlp, Mlp, PlainMlp
from penstock.models.norms import Norm, row_norm
from penstock.models.weights import LayerWeights

P = TypeVar("P", Linear, Gated)


def fused(layer: LayerWeights, config: DecoderConfig) -> LayerWeights:
    """The layer with its norms inside its products, where nobody else needs what a norm gives and our kernels do both.

    The matrices are those of `layer`, not copies.
    """
    if config.parallel or config.residual_normed:
        return layer
    qkv = layer.attention.qkv
    if isinstance(qkv, FusedQkv) and (product := _behind(layer.attention_norm, qkv.product)) is not None:
        attention = replace(layer.attention, qkv=replace(qkv, product=product))
        layer = replace(layer, attention_norm=None, attention=attention)
    if (mlp := _mlp(layer.mlp_norm, layer.mlp)) is not None:
        layer = replace(layer, mlp_norm=None, mlp=mlp)
    return layer


def _mlp(norm: Norm | None, mlp: Mlp) -> Mlp | None:
    if isinstance(mlp, GatedMlp) and (gate_up := _behind(norm, mlp.gate_up)) is not None:
        return replace(mlp, gate_up=gate_up)
    if isinstance(mlp, PlainMlp) and (up := _behind(norm, mlp.up)) is not None:
        return replace(mlp, up=up)
    return None


def _behind(norm: Norm | None, product: P) -> P | None:
    """The product with a norm before it; None where it cannot have one."""
    rows = row_norm(norm)
    if rows is not None and isinstance(product, (Smoothed, SmoothedGated)):
        rows, product = rows.scaled(product.inverse), product.product
    if rows is None or not isinstance(product, (Panels, GatedPanels)) or not isinstance(product.packed, Packed):
        return None
    return cast(P, replace(product, packed=products.behind(rows, product.packed)))
