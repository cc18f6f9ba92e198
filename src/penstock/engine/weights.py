"""A model's weights in memory: out of the packed copy of an earlier start, else out of the checkpoint."""

from __future__ import annotations

import torch

from penstock.engine.config import EngineConfig
from penstock.engine.copies import copy_of
from penstock.formats import FORMATS
from penstock.hub.checkpoint import TensorEntry
from penstock.models.config import DecoderConfig, WeightMap
from penstock.models.decoder import Decoder
from penstock.models.encoder_decoder.config import EncoderDecoderConfig
from penstock.models.encoder_decoder.model import EncoderDecoder
from penstock.models.smoothing import smooth

_EIGHT_BIT_ROWS = ("int8", "int4")  # formats that quantize activations


def load_weights(
    config: EngineConfig,
    described: DecoderConfig | EncoderDecoderConfig,
    names: WeightMap,
    entries: dict[str, TensorEntry] | None,
    dtype: torch.dtype,
    form: str,
    positions: int,
    weight_bytes: int,
    device: torch.device,
) -> tuple[Decoder | EncoderDecoder, str]:
    """The model in a format, and what is to be said of it, after a semicolon. entries: None for random weights;
    positions: the longest context; weight_bytes: of all of it, as planned. Raises ModelError."""
    copy = None
    if device.type == "cpu":
        copy = copy_of(config, described, entries, dtype, form, positions, weight_bytes)
    if copy is not None and (kept := copy.read()) is not None:
        weights, remark = kept
        remark += "; mapped from its packed copy"
        if isinstance(described, EncoderDecoderConfig):
            return EncoderDecoder(described, weights, dtype), remark
        return Decoder(described, weights, dtype, positions), remark
    decoder: Decoder | EncoderDecoder
    remark = ""
    if isinstance(described, EncoderDecoderConfig):
        decoder = EncoderDecoder.load(entries, described, dtype, positions, FORMATS[form], device)
    else:
        decoder = Decoder.load(entries, described, names, dtype, positions, FORMATS[form], device)
        if entries is not None and form in _EIGHT_BIT_ROWS and device.type == "cpu":
            smoothed = smooth(decoder, entries, names, FORMATS[form])
            remark = f"; {smoothed} products share their outlier channels with the norm before them" if smoothed else ""
    if copy is not None and copy.write_beside(decoder.weights, remark):
        remark += "; a packed copy for the next start is written meanwhile (--packed-copy)"
    return decoder, remark
