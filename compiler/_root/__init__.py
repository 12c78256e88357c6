"""paretoc: turns a trained PyTorch model into the cheapest model that still does its job, and proves it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

#: public name → the module that defines it; loaded on first use, so that `import paretoc` stays light
_PUBLIC = {
    "compile": "driver",
    "CompiledModel": "driver",
    "load": "artifact",
    "save": "driver",
    "capture": "capture",
    "rebuild": "plain",
    "CausalLM": "causal",
    "Program": "program",
    "Pass": "passes",
    "SitePass": "passes",
    "EncodePass": "reencode",
    "Composite": "passes",
    "PassResult": "passes",
    "Context": "passes",
    "Phase": "passes",
    "Sensitivity": "sensitivity",
    "Statistic": "statistics",
    "Derived": "statistics",
    "Hessian": "statistics",
    "WeightedHessian": "statistics",
    "AttentionReceived": "statistics",
    "ChannelMean": "statistics",
    "ChannelMax": "statistics",
    "Histogram": "statistics",
    "MinMax": "statistics",
    "Sample": "statistics",
    "Encoding": "encodings",
    "Dense": "encodings",
    "Affine": "encodings",
    "Float": "encodings",
    "Binary": "encodings",
    "Ternary": "encodings",
    "Nested": "encodings",
    "Scaled": "encodings",
    "Parameters": "encodings",
    "innermost": "encodings",
    "NM": "encodings",
    "NF4": "encodings",
    "Codebook": "encodings",
    "Additive": "encodings",
    "LowRank": "encodings",
    "Sum": "encodings",
    "Arrays": "encodings",
    "Fit": "encodings",
    "parse_encoding": "encodings",
    "register_encoding": "encodings",
    "pack": "encodings",
    "unpack": "encodings",
    "packed_size": "encodings",
    "Site": "sites",
    "Axes": "axes",
    "Axis": "axes",
    "find_axes": "axes",
    "TokenRule": "protocols",
    "TokenState": "protocols",
    "Reduced": "protocols",
    "Fitter": "protocols",
    "DataFree": "protocols",
    "Evidence": "protocols",
    "Adaptive": "protocols",
    "Backend": "backend",
    "Executable": "backend",
    "Row": "backend",
    "Explanation": "backend",
    "Report": "report",
    "hook": "hookspecs",
    "ParetocError": "errors",
    "OptionError": "errors",
    "CaptureError": "errors",
    "CalibrationError": "errors",
    "PassError": "errors",
    "ScheduleError": "errors",
    "VerificationError": "errors",
    "LoweringError": "errors",
    "ArtifactError": "errors",
    "PluginError": "errors",
    "ConformanceError": "errors",
}
#: pass classes, from the package of built-in passes
_PASSES = (
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
)

if TYPE_CHECKING:
    from paretoc.compiler.artifact import load as load
    from paretoc.compiler.axes import Axes as Axes
    from paretoc.compiler.axes import Axis as Axis
    from paretoc.compiler.axes import find_axes as find_axes
    from paretoc.compiler.backend import Backend as Backend
    from paretoc.compiler.backend import Executable as Executable
    from paretoc.compiler.backend import Explanation as Explanation
    from paretoc.compiler.backend import Row as Row
    from paretoc.compiler.capture import capture as capture
    from paretoc.compiler.causal import CausalLM as CausalLM
    from paretoc.compiler.driver import CompiledModel as CompiledModel
    from paretoc.compiler.driver import compile as compile
    from paretoc.compiler.driver import save as save
    from paretoc.compiler.encodings import NF4 as NF4
    from paretoc.compiler.encodings import NM as NM
    from paretoc.compiler.encodings import Additive as Additive
    from paretoc.compiler.encodings import Affine as Affine
    from paretoc.compiler.encodings import Arrays as Arrays
    from paretoc.compiler.encodings import Binary as Binary
    from paretoc.compiler.encodings import Codebook as Codebook
    from paretoc.compiler.encodings import Dense as Dense
    from paretoc.compiler.encodings import Encoding as Encoding
    from paretoc.compiler.encodings import Fit as Fit
    from paretoc.compiler.encodings import Float as Float
    from paretoc.compiler.encodings import LowRank as LowRank
    from paretoc.compiler.encodings import Nested as Nested
    from paretoc.compiler.encodings import Parameters as Parameters
    from paretoc.compiler.encodings import Scaled as Scaled
    from paretoc.compiler.encodings import Sum as Sum
    from paretoc.compiler.encodings import Ternary as Ternary
    from paretoc.compiler.encodings import innermost as innermost
    from paretoc.compiler.encodings import pack as pack
    from paretoc.compiler.encodings import packed_size as packed_size
    from paretoc.compiler.encodings import parse_encoding as parse_encoding
    from paretoc.compiler.encodings import register_encoding as register_encoding
    from paretoc.compiler.encodings import unpack as unpack
    from paretoc.compiler.errors import ArtifactError as ArtifactError
    from paretoc.compiler.errors import CalibrationError as CalibrationError
    from paretoc.compiler.errors import CaptureError as CaptureError
    from paretoc.compiler.errors import ConformanceError as ConformanceError
    from paretoc.compiler.errors import LoweringError as LoweringError
    from paretoc.compiler.errors import OptionError as OptionError
    from paretoc.compiler.errors import ParetocError as ParetocError
    from paretoc.compiler.errors import PassError as PassError
    from paretoc.compiler.errors import PluginError as PluginError
    from paretoc.compiler.errors import ScheduleError as ScheduleError
    from paretoc.compiler.errors import VerificationError as VerificationError
    from paretoc.compiler.hookspecs import hook as hook
    from paretoc.compiler.passes import Composite as Composite
    from paretoc.compiler.passes import Context as Context
    from paretoc.compiler.passes import Pass as Pass
    from paretoc.compiler.passes import PassResult as PassResult
    from paretoc.compiler.passes import Phase as Phase
    from paretoc.compiler.passes import SitePass as SitePass
    from paretoc.compiler.plain import rebuild as rebuild
    from paretoc.compiler.program import Program as Program
    from paretoc.compiler.protocols import Adaptive as Adaptive
    from paretoc.compiler.protocols import DataFree as DataFree
    from paretoc.compiler.protocols import Evidence as Evidence
    from paretoc.compiler.protocols import Fitter as Fitter
    from paretoc.compiler.protocols import Reduced as Reduced
    from paretoc.compiler.protocols import TokenRule as TokenRule
    from paretoc.compiler.protocols import TokenState as TokenState
    from paretoc.compiler.reencode import EncodePass as EncodePass
    from paretoc.compiler.report import Report as Report
    from paretoc.compiler.sensitivity import Sensitivity as Sensitivity
    from paretoc.compiler.sites import Site as Site
    from paretoc.compiler.statistics import AttentionReceived as AttentionReceived
    from paretoc.compiler.statistics import ChannelMax as ChannelMax
    from paretoc.compiler.statistics import ChannelMean as ChannelMean
    from paretoc.compiler.statistics import Derived as Derived
    from paretoc.compiler.statistics import Hessian as Hessian
    from paretoc.compiler.statistics import Histogram as Histogram
    from paretoc.compiler.statistics import MinMax as MinMax
    from paretoc.compiler.statistics import Sample as Sample
    from paretoc.compiler.statistics import Statistic as Statistic
    from paretoc.compiler.statistics import WeightedHessian as WeightedHessian
    from paretoc.passes import Canonicalize as Canonicalize
    from paretoc.passes import CenterStream as CenterStream
    from paretoc.passes import CorrectBias as CorrectBias
    from paretoc.passes import Factorize as Factorize
    from paretoc.passes import MergeModels as MergeModels
    from paretoc.passes import MergeTokens as MergeTokens
    from paretoc.passes import PruneDepth as PruneDepth
    from paretoc.passes import PruneNM as PruneNM
    from paretoc.passes import PruneTokens as PruneTokens
    from paretoc.passes import PruneWidth as PruneWidth
    from paretoc.passes import Quantize as Quantize
    from paretoc.passes import QuantizeCache as QuantizeCache
    from paretoc.passes import Reconstruct as Reconstruct
    from paretoc.passes import ReduceTokens as ReduceTokens
    from paretoc.passes import Rotate as Rotate
    from paretoc.passes import Smooth as Smooth


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(importlib.import_module(f"paretoc.compiler.{_PUBLIC[name]}"), name)
    elif name in _PASSES:
        value = getattr(importlib.import_module("paretoc.passes"), name)
    elif name == "testing":
        value = importlib.import_module("paretoc.compiler.testing")
    else:
        raise AttributeError(f"module 'paretoc' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC, *_PASSES, "testing"])
