"""The transformations, one a file, registered through the plugin hooks like everyone else's."""

from __future__ import annotations

from ..compiler.hookspecs import hook
from ..compiler.importance import Activation, Criterion, Magnitude, Obs, Random, Taylor
from ..compiler.passes import Pass
from ..compiler.protocols import Fitter, TokenRule
from .canonicalize import Canonicalize
from .center_stream import CenterStream
from .correct_bias import CorrectBias
from .fit import AdaRound, AdditiveFit, Awq, Gptq, Hqq, KMeans, LowRankFit, Mse, Rtn
from .low_rank import Factorize
from .merge_models import MergeModels
from .prune_depth import PruneDepth
from .prune_nm import PruneNM
from .prune_width import PruneWidth
from .quantize import Quantize
from .quantize_cache import QuantizeCache
from .reconstruct import Reconstruct
from .reduce_tokens import MergeTokens, PruneTokens, ReduceTokens
from .rotate import Rotate
from .smooth import Smooth
from .token_rules import Keep, Merge

__all__ = [
    "Canonicalize",
    "CenterStream",
    "CorrectBias",
    "Factorize",
    "MergeModels",
    "MergeTokens",
    "PruneDepth",
    "PruneNM",
    "PruneTokens",
    "PruneWidth",
    "Quantize",
    "QuantizeCache",
    "Reconstruct",
    "ReduceTokens",
    "Rotate",
    "Smooth",
]


@hook
def paretoc_passes() -> list[type[Pass]]:
    return [
        *(Canonicalize, MergeModels, PruneNM, PruneWidth, Rotate, Smooth, Quantize, QuantizeCache, CorrectBias),
        *(CenterStream, PruneDepth, Factorize, Reconstruct, ReduceTokens, MergeTokens, PruneTokens),
    ]


@hook
def paretoc_fitters() -> list[Fitter]:
    return [Rtn(), Mse(), Hqq(), Gptq(), Awq(), AdaRound(), KMeans(), AdditiveFit(), LowRankFit()]


@hook
def paretoc_criteria() -> list[Criterion]:
    return [Magnitude(), Activation(), Taylor(), Obs(), Random()]


@hook
def paretoc_token_rules() -> list[TokenRule]:
    return [Merge(), Keep()]
