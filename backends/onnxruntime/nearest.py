"""Which scheme to use instead of one that has no fast kernel here."""

from __future__ import annotations

#: scheme → the kinds of sites it makes faster, and how it rounds their inputs; the first that fits is nearest
FAST = {
    "W8A8-dynamic": (("linear",), ("", "tensor", "token")),
    "W8A8": (("linear", "conv"), ("", "static", "tensor", "token")),
}


def nearest_fast(kind: str, activations: str) -> str:
    """The scheme with a fast kernel for sites of this kind that is nearest to one that rounds their inputs like this,
    "static", "tensor", "token", in groups or not at all; nothing when there is none."""
    activations = "token" if activations.startswith("group") else activations
    fitting = (name for name, (kinds, modes) in FAST.items() if kind in kinds and activations in modes)
    return next(fitting, "")
