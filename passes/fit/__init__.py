"""Fitters: how the stored values of an encoding are chosen."""

from .mse import Mse
from .rtn import Rtn

__all__ = ["Mse", "Rtn"]
