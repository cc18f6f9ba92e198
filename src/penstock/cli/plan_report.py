"""What `penstock plan` says, for programs and for people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from penstock.cli.plan_measured import comparisons
from penstock.plan.fit import plan_on
from penstock.plan.memory import human
from penstock.plan.sbatch import flags
from penstock.plan.weights import HALVES, PACKINGS, packing, weight_bytes

if TYPE_CHECKING:
    from penstock.cli.plan_model import Described
    from penstock.plan.fit import Plan
    from penstock.plan.sbatch import Place
    from penstock.plan.site import Site


def plan_report(
    described: Described,
    best: Plan,
    site: Site,
    place: Place | None,
    time_limit: str | None,
    files: tuple[str, ...],
    disk: float,
    batch: int | None,
) -> dict[str, Any]:
    """The report for programs. files: of the benchmark, to compare with; disk: bytes a second; batch: as asked."""
    shape = described.shape
    formats = {}
    halves = () if {best.form, described.stored} & set(HALVES) else ("bfloat16",)
    eighths = ("fp8",) if best.device.runs("fp8") else ()
    for name in dict.fromkeys([best.form, described.stored, *halves, *eighths, "int8", "int4"]):
        other = plan_on(shape, name, best.device, best.cards, best.tokens, disk, batch)
        formats[name] = {
            "weight_bytes": other.weights,
            "fits": other.fits,
            "max_sequences": other.sequences,
            "tokens_per_second": round(other.tokens_per_second, 2),
        }
    return {
        "model": described.name,
        "family": shape.family,
        "exact": shape.exact,
        "from": described.origin,
        "parameters": shape.parameters,
        "layers": shape.layers,
        "max_positions": shape.max_positions,
        "format": best.form,
        "stored_format": described.stored,
        "weight_bytes": best.weights,
        "stored_weight_bytes": described.stored_bytes(),
        "disk_bytes": described.disk_bytes,
        "weight_bytes_by_format": {name: weight_bytes(shape, name) for name in PACKINGS},
        "resident_bytes": best.resident,
        "kv_bytes_per_token": best.kv_token,
        "kv_cache_dtype": shape.kv_dtype or packing(best.form).kept,
        "activation_bytes": best.activations,
        "overhead_bytes": best.overhead,
        "hardware": best.device.title,
        "gpu": None if best.device.is_cpu else best.device.name,
        "gpus": 0 if best.device.is_cpu else best.cards,
        "memory_bytes": best.have,
        "need_bytes": best.need,
        "fits": best.fits,
        "sequence_tokens": best.tokens,
        "max_sequences": best.sequences,
        "tokens_per_second": round(best.tokens_per_second, 2),
        "batch": best.batch,
        "batch_tokens_per_second": round(best.batch_tokens_per_second, 2),
        "first_token_seconds": round(best.first_token_seconds, 4),
        "load_seconds": round(best.load_seconds, 2),
        "formats": formats,
        "measured": comparisons(described, best, files),
        "sbatch": flags(best, site, place, time_limit),
    }


def plan_text(r: dict[str, Any]) -> str:
    """The report for people."""
    where = f"{r['gpus']}x {r['hardware']}" if r["gpus"] else r["hardware"]
    guess = "" if r["exact"] else " (a family that is not in the table: counted as a Llama)"
    lines = [
        f"{r['model']}: {r['family']}, {r['parameters'] / 1e9:.3g} B parameters, {r['layers']} layers, "
        f"{r['max_positions']:,} positions{guess}",
        f"weights      {human(r['weight_bytes'])} in {r['format']}"
        + (f" (the checkpoint: {human(r['stored_weight_bytes'])} in {r['stored_format']})"
           if r["format"] != r["stored_format"] else "")
        + (f"; on disk {human(r['disk_bytes'])}" if r["disk_bytes"] else ""),
        f"KV cache     {human(r['kv_bytes_per_token'])} a token, "
        f"{human(r['kv_bytes_per_token'] * r['sequence_tokens'])} a sequence of {r['sequence_tokens']:,}",
        f"besides      {human(r['activation_bytes'])} for a step, {human(r['overhead_bytes'])} for the runtime",
        f"on           {where}: {human(r['memory_bytes'])} to use",
    ]  # fmt: skip
    if r["fits"]:
        lines += [
            f"fits         yes: {r['max_sequences']:,} sequences of {r['sequence_tokens']:,} tokens",
            f"speed        {r['tokens_per_second']:.3g} tokens/s one stream, "
            f"{r['batch_tokens_per_second']:,.0f} with {r['batch']} side by side (predicted)",
            f"start        {r['load_seconds']:.0f} s to read the weights; first token of "
            f"{r['sequence_tokens'] // 2:,} after {r['first_token_seconds']:.2g} s",
        ]
    else:
        others = [name for name, other in r["formats"].items() if other["fits"]]
        lines.append(
            f"fits         no: one sequence needs {human(r['need_bytes'])}"
            + (f"; it would in {', '.join(others)} (--format)" if others else "; take more or larger cards (--gpus)")
        )
    for name, other in r["formats"].items():
        fit = (
            f"{other['max_sequences']:,} sequences, {other['tokens_per_second']:.3g} tokens/s"
            if other["fits"]
            else "does not fit"
        )
        lines.append(f"  {name:<10} {human(other['weight_bytes']):>9}  {fit}")
    for m in r["measured"]:
        lines.append(
            f"measured     {m['measured']:.4g} tokens/s, predicted {m['predicted']:.4g} ({m['error']:+.0%}): "
            f"{m['what']}, {m['source']}"
        )
    lines.append(f"sbatch       {' '.join(r['sbatch'])}")
    return "\n".join(lines)
