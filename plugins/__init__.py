"""First-party plugins: one file per published method, written only against the public API."""

from __future__ import annotations

from ..compiler.encodings import Encoding
from ..compiler.hookspecs import hook
from ..compiler.passes import Pass
from ..compiler.protocols import Fitter
from .aqlm import Aqlm
from .bf16_or_death import BF16OrDeath
from .double_rounding import DoubleRounding
from .format_advisor import FormatAdvisor
from .jlcm import ClusteredCodebook, Jlcm, JlcmFit
from .nupes import Nupes, NupesFit
from .powerquant import Power, PowerQuant
from .rsq import Rsq
from .zeroquant_fp import ZeroQuantFP

__all__ = [
    "Aqlm",
    "BF16OrDeath",
    "ClusteredCodebook",
    "DoubleRounding",
    "FormatAdvisor",
    "Jlcm",
    "JlcmFit",
    "Nupes",
    "NupesFit",
    "Power",
    "PowerQuant",
    "Rsq",
    "ZeroQuantFP",
]


@hook
def paretoc_passes() -> list[type[Pass]]:
    return [Aqlm, BF16OrDeath, DoubleRounding, FormatAdvisor, Rsq, ZeroQuantFP, PowerQuant, Nupes, Jlcm]


@hook
def paretoc_encodings() -> list[type[Encoding]]:
    return [Power, ClusteredCodebook]


@hook
def paretoc_fitters() -> list[Fitter]:
    return [NupesFit(), JlcmFit()]
