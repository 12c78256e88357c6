"""Fitters: how the stored values of an encoding are chosen."""

from .adaround import AdaRound
from .additive import AdditiveFit
from .awq import Awq
from .gptq import Gptq
from .hqq import Hqq
from .kmeans import KMeans
from .lowrank import LowRankFit
from .mse import Mse
from .rtn import Rtn

__all__ = ["AdaRound", "AdditiveFit", "Awq", "Gptq", "Hqq", "KMeans", "LowRankFit", "Mse", "Rtn"]
