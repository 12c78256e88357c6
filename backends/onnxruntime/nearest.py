"""Which scheme to use instead of one that has no fast kernel here: of those whose kernel is, the one most like it."""

from __future__ import annotations

from .forms import FORMS
from .speeds import MARGIN, Speeds


def nearest_fast(kind: str, bits: float, activations: str, *, rows: int, speeds: Speeds, standard: bool) -> str:
    """The scheme to propose for a site of this kind and `rows` rows, or "" where none is fast.

    Nearest in the bits of a weight, then in how it rounds inputs: "static", "tensor", "token", "group32", "" (not at
    all); then one that needs no data. `standard`: of schemes that need no com.microsoft operators.
    """
    if kind == "conv":  # no form of ours: ONNX Runtime fuses what stands between two static ranges
        return "" if activations == "static" else "W8A8"
    if kind != "linear":
        return ""
    mode = "group" if activations.startswith("group") else activations
    schemes = (
        form.scheme
        for name, form in FORMS.items()
        if form.scheme and form.standard >= standard and speeds.of(name, rows) >= MARGIN
    )
    ordered = sorted(schemes, key=lambda s: (abs(s.bits - bits), s.activations != mode, s.activations == "static"))
    return ordered[0].name if ordered else ""
