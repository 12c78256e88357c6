"""Part "mixed" of quantization_grid.py: a budget of bits against the same bits everywhere; `max_drop` on held-out data.

stories260k, one scale a channel. A budget beats uniform widths when it lies below the line between their points of
(bytes, nats/token).
"""

from __future__ import annotations

from dataclasses import replace

import paretoc as pc
from _quality import Stories, compiled_by, decoded, stored_bytes

BUDGETS = (3.25, 3.5, 3.75)
DROPS = (0.3, 0.1, 0.03)


def mixed(bench: Stories) -> None:
    print(f"mixed precision, {bench.title}")
    for fitter in ("mse", "gptq"):
        base = pc.Quantize("W4A16", weights="Affine(bits=4, scale='float16')", fitter=fitter, targets=("Linear",))
        few, low = point(bench, replace(base, weights="Affine(bits=3, scale='float16')"))
        many, high = point(bench, base)
        for bits in BUDGETS:
            stored, loss = point(bench, replace(base, effective_bits=bits))
            line = low + (high - low) * (stored - few) / (many - few)
            print(
                f"    {'holds' if loss < line else 'does not hold'} below {line:.4f}, the line between uniform widths"
            )
    for drop in DROPS:
        max_drop(bench, drop)


def point(bench: Stories, step: pc.Pass) -> tuple[int, float]:
    """(bytes, nats/token), printed."""
    compiled = compiled_by(bench, [step])
    losses, (stored, dense) = bench.score(decoded(compiled)), stored_bytes(compiled)
    print(f"  {step.describe()}: {32 * stored / dense:.3f} bits, {stored} bytes, {bench.show(losses)}", flush=True)
    return stored, float(losses.mean())


def max_drop(bench: Stories, drop: float) -> None:
    """The bound is kept on batches held out of the calibration data; the stories of the score are new altogether."""
    step = pc.Quantize("W4A16", weights="Affine(bits=3)", targets=("Linear",), max_drop=drop)
    compiled = compiled_by(bench, [step])
    entry = compiled.report(latency=False).passes[-1]
    found = entry["metrics"]["drop"]
    print(
        f"  max_drop={drop} (relative error of the logits): {found:.4f} on held-out batches, "
        f"{'holds' if found <= drop else 'does not hold'}; {len(entry['matched'])} weights of 3 bits, "
        f"{bench.show(bench.score(decoded(compiled)))}",
        flush=True,
    )
