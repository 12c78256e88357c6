"""The dialect: `paretoc::` operators, one file per family, each with schema, shape rule and ATen reference."""

from . import activations, tokens, weights

__all__ = ["activations", "tokens", "weights"]
