"""First-party plugins: one file per published method, written only against the public API."""

from __future__ import annotations

from ..compiler.encodings import Encoding
from ..compiler.hookspecs import hook
from ..compiler.passes import Pass
from ..compiler.protocols import Fitter
from .adaptive_computation import AdaptiveComputation
from .aqlm import Aqlm
from .bf16_or_death import BF16OrDeath
from .core_neurons import CoreNeurons
from .double_rounding import DoubleRounding
from .feature_multiplexing import FeatureMultiplexing, UnifiedEmbedding
from .format_advisor import FormatAdvisor
from .jlcm import ClusteredCodebook, Jlcm, JlcmFit
from .matformer import MatFormer
from .nupes import Nupes, NupesFit
from .powerquant import Power, PowerQuant
from .rsq import Rsq
from .stable_rps import Folded, StableRps
from .zeroquant_fp import ZeroQuantFP

__all__ = [
    "AdaptiveComputation",
    "Aqlm",
    "BF16OrDeath",
    "ClusteredCodebook",
    "CoreNeurons",
    "DoubleRounding",
    "FeatureMultiplexing",
    "Folded",
    "FormatAdvisor",
    "Jlcm",
    "JlcmFit",
    "MatFormer",
    "Nupes",
    "NupesFit",
    "Power",
    "PowerQuant",
    "Rsq",
    "StableRps",
    "UnifiedEmbedding",
    "ZeroQuantFP",
]


@hook
def paretoc_passes() -> list[type[Pass]]:
    return [
        *(Aqlm, BF16OrDeath, DoubleRounding, FormatAdvisor, Rsq, ZeroQuantFP, PowerQuant),
        *(Nupes, Jlcm, MatFormer, CoreNeurons, AdaptiveComputation),
        *(StableRps, FeatureMultiplexing),
    ]


@hook
def paretoc_encodings() -> list[type[Encoding]]:
    return [Power, ClusteredCodebook, Folded]


@hook
def paretoc_fitters() -> list[Fitter]:
    return [NupesFit(), JlcmFit()]
