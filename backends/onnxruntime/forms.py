"""The forms a linear layer can take on ONNX Runtime: what each needs, and the operators it becomes.

A form is exact with respect to the eager reference up to float rounding: it never rounds what the program does not
round. Among those that fit a layer, `speeds.py` says which is fastest on this machine.

| form | weights | activations | operators |
|---|---|---|---|
| DynamicMatMul | int8 per channel | 8 bit per tensor, one reader | DynamicQuantizeMatMul |
| SharedMatMul | int8 per channel | 8 bit per tensor, static or shared | quantise once, MatMulIntegerToFloat |
| ShiftedMatMul | int8 per channel | 8 bit, static | as RoundedMatMul, the activations' zero point in the bias |
| RoundedMatMul | int8 per channel | 8 bit, static | QuantizeLinear, DequantizeLinear, MatMul ("QDQ") |
| IntegerMatMul | int8 per channel | 8 or 4 bit, also per token | quantise once, MatMulInteger, scale |
| GroupMatMul | int8, int4, int3, int2 in blocks | int8 in the same blocks | MatMulNBits, accuracy level 4 |
| BlockMatMul | int4, int3 in blocks | floating | MatMulNBits, accuracy level 1 |
| StoredMatMul | any integers | any | DequantizeLinear, MatMul: understood by any runtime |
| FoldedMatMul | any integers | any | decoded to fp32 when the session starts, MatMul |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
import onnx_ir as ir

from ...compiler.dialect.activations import FLOATS, UNSIGNED, group_of
from .integers import Integers, pack_bits
from .rule import number_of

if TYPE_CHECKING:
    from .lower import Lowering

MICROSOFT = "com.microsoft"
#: block sizes the MatMulNBits kernel takes
BLOCKS = (16, 32, 64, 128, 256)
#: bits → block sizes that run with floating activations
_FLOATING_BLOCKS = {3: BLOCKS, 4: BLOCKS}


@dataclass(frozen=True)
class Linear:
    """One linear layer on its way to ONNX: x·Wᵀ + b with W stored as integers, x perhaps behind a quantiser."""

    node: ir.Node
    x: ir.Value
    stored: Integers
    bias: ir.Value | None
    site: str
    quantiser: ir.Node | None
    code: str = ""
    granularity: str = ""
    #: whether other layers read the same quantised input
    shared: bool = False


@dataclass(frozen=True)
class Scheme:
    """A scheme of `quantize`: its name, the bits of a weight, how inputs are rounded ("": not at all)."""

    name: str
    bits: int
    activations: str


class Form(Protocol):
    #: whether target="onnx" may use it
    standard: bool

    @property
    def scheme(self) -> Scheme | None:
        """Whose layers it runs; None for what any scheme falls back to."""

    def refusal(self, linear: Linear) -> str:
        """Why the form does not fit this layer, or ""."""

    def emit(self, lowering: Lowering, linear: Linear) -> ir.Value: ...


def _integer_refusal(linear: Linear) -> str:
    if linear.quantiser is None or linear.code in FLOATS:
        return "its activations are not integers"
    if group_of(linear.granularity):
        return "its activations have several scales a row"
    if linear.granularity == "token" and linear.code in UNSIGNED:
        return "its activations have a zero point for each token"
    if not linear.stored.per_channel or linear.stored.zero is not None:
        return "its weights are not symmetric with one scale a channel"
    return ""


def _channel_scale(lowering: Lowering, linear: Linear) -> tuple[ir.Value, ir.Value]:
    """(codes int8 [I, O], scale float32 [O])"""
    stored, site = linear.stored, linear.site
    codes = lowering.constant(f"{site}.weight.codes_transposed", stored.codes.T.astype(np.int8))
    scale = np.broadcast_to(stored.scale.ravel(), (stored.codes.shape[0],))
    return codes, lowering.constant(f"{site}.weight.scale_channel", scale)


class DynamicMatMul:
    standard = False
    scheme = Scheme("W8A8-dynamic", 8, "tensor")

    def refusal(self, linear: Linear) -> str:
        if reason := _integer_refusal(linear):
            return reason
        if linear.code != "int8" or linear.granularity != "tensor":
            return "the kernel finds an 8 bit range of the whole tensor"
        return "several layers read this input: it is quantised once for all" if linear.shared else ""

    def emit(self, lowering: Lowering, linear: Linear) -> ir.Value:
        assert linear.quantiser is not None
        inputs = [linear.quantiser.inputs[0], *_channel_scale(lowering, linear), None, linear.bias]
        return lowering.emit(linear.node, "DynamicQuantizeMatMul", inputs, domain=MICROSOFT, name=linear.site)


class SharedMatMul:
    standard = False
    scheme = Scheme("W8A8", 8, "static")

    def refusal(self, linear: Linear) -> str:
        return _integer_refusal(linear) or (
            "the kernel has one scale for all tokens" if linear.granularity == "token" else ""
        )

    def emit(self, lowering: Lowering, linear: Linear) -> ir.Value:
        assert linear.quantiser is not None
        codes, x_scale, x_zero = lowering.quantised_input(linear.quantiser)
        weight, scale = _channel_scale(lowering, linear)
        inputs = [codes, weight, x_scale, scale, x_zero, None, linear.bias]
        return lowering.emit(linear.node, "MatMulIntegerToFloat", inputs, domain=MICROSOFT, name=linear.site)


class RoundedMatMul:
    """Every value with its scale, the product between floats: what quantised operators are fused from, by ONNX Runtime
    and by compilers of other vendors. To whoever does not, it is a product of rounded floats."""

    standard = True
    scheme = Scheme("W8A8", 8, "static")

    def refusal(self, linear: Linear) -> str:
        if linear.quantiser is None or linear.quantiser.op_type != "StaticQuantize":
            return "the range of its activations is not known beforehand"
        return _integer_refusal(linear)

    def emit(self, lowering: Lowering, linear: Linear) -> ir.Value:
        return FORMS["StoredMatMul"].emit(lowering, linear)


class ShiftedMatMul:
    """s·(q − z)·Wᵀ + b = s·q·Wᵀ + (b − s·z·Σ W): the product of codes whose zero is 0, which OpenVINO has a faster
    kernel for."""

    standard = True
    scheme = Scheme("W8A8", 8, "static")

    def refusal(self, linear: Linear) -> str:
        if reason := FORMS["RoundedMatMul"].refusal(linear):
            return reason
        assert linear.quantiser is not None
        added = [value for value in (*linear.quantiser.inputs[1:], linear.bias) if value is not None]
        return "its range or its bias is computed" if any(value.const_value is None for value in added) else ""

    def emit(self, lowering: Lowering, linear: Linear) -> ir.Value:
        assert linear.quantiser is not None
        codes, scale, zero = lowering.quantised_input(linear.quantiser)
        nought = lowering.constant("codes.nought", np.array(0, dtype=np.uint8))
        values = lowering.emit(linear.node, "DequantizeLinear", [codes, scale, nought])
        sums = linear.stored.codes.sum(1) * linear.stored.scale.ravel().astype(np.float64)
        own = 0.0 if linear.bias is None or linear.bias.const_value is None else linear.bias.const_value.numpy()
        bias = own - (number_of(scale) or 0.0) * (number_of(zero) or 0.0) * sums
        shifted = lowering.constant(f"{linear.site}.bias.shifted", bias.astype(np.float32)) if bias.any() else None
        return FORMS["StoredMatMul"].emit(lowering, replace(linear, x=values, bias=shifted))


class IntegerMatMul:
    standard = True
    scheme = Scheme("W8A8-dynamic", 8, "token")

    def refusal(self, linear: Linear) -> str:
        return _integer_refusal(linear)

    def emit(self, lowering: Lowering, linear: Linear) -> ir.Value:
        assert linear.quantiser is not None
        node = linear.node
        codes, x_scale, x_zero = lowering.quantised_input(linear.quantiser)
        weight, scale = _channel_scale(lowering, linear)
        product = lowering.emit(node, "MatMulInteger", [codes, weight, x_zero], name=linear.site)
        product = lowering.emit(node, "Cast", [product], {"to": int(ir.DataType.FLOAT)})
        if linear.granularity == "token":
            product = lowering.emit(node, "Mul", [lowering.emit(node, "Mul", [product, x_scale]), scale])
        else:
            product = lowering.emit(node, "Mul", [product, lowering.emit(node, "Mul", [x_scale, scale])])
        return lowering.add_bias(node, product, linear.bias)


def _block_refusal(linear: Linear, widths: Mapping[int, Sequence[int]]) -> str:
    """`widths`: bits → block sizes the kernel takes."""
    stored = linear.stored
    if stored.bits not in widths:
        return f"ONNX Runtime has no fast kernel for {stored.bits} bit here"
    blocks = widths[stored.bits]
    if stored.block not in blocks or stored.codes.shape[1] % stored.block:
        return f"its scales do not stand in blocks of {', '.join(map(str, blocks))} that fill the row"
    return ""


def _emit_blocks(lowering: Lowering, linear: Linear, x: ir.Value | None, bits: int, level: int) -> ir.Value:
    """MatMulNBits: codes unsigned and packed, low bits first, in blocks along the input axis."""
    stored, site = linear.stored, linear.site
    rows, width = stored.codes.shape
    offset = 1 << bits - 1 if stored.zero is None else 0
    blocks = (stored.codes + offset).reshape(rows, width // stored.block, stored.block)
    inputs = [
        x,
        lowering.constant(f"{site}.weight.codes_blocks", pack_bits(blocks, bits)),
        lowering.constant(f"{site}.weight.scale_blocks", stored.scale),
    ]
    if stored.zero is not None:
        padded = np.pad(stored.zero, ((0, 0), (0, -stored.zero.shape[1] % (8 // bits))))
        inputs.append(lowering.constant(f"{site}.weight.zero_blocks", pack_bits(padded, bits)))
    attributes = {"K": width, "N": rows, "bits": bits, "block_size": stored.block, "accuracy_level": level}
    product = lowering.emit(linear.node, "MatMulNBits", inputs, attributes, domain=MICROSOFT, name=site)
    return lowering.add_bias(linear.node, product, linear.bias)


class GroupMatMul:
    standard = False
    scheme = Scheme("W4A8", 4, "group")

    def refusal(self, linear: Linear) -> str:
        if linear.quantiser is None or linear.code != "int8" or group_of(linear.granularity) != linear.stored.block:
            return "its activations are not int8 in the groups of its weights"
        return _block_refusal(linear, {2: (32, 64, 128), 3: BLOCKS, 4: BLOCKS, 8: BLOCKS})

    def emit(self, lowering: Lowering, linear: Linear) -> ir.Value:
        assert linear.quantiser is not None
        bits = 4 if linear.stored.bits == 3 else linear.stored.bits
        return _emit_blocks(lowering, linear, linear.quantiser.inputs[0], bits, level=4)


class BlockMatMul:
    standard = False
    scheme = Scheme("W4A16", 4, "")

    def refusal(self, linear: Linear) -> str:
        if linear.quantiser is not None:
            return "at accuracy level 1 its activations are floating"
        return _block_refusal(linear, _FLOATING_BLOCKS)

    def emit(self, lowering: Lowering, linear: Linear) -> ir.Value:
        return _emit_blocks(lowering, linear, linear.x, bits=4, level=1)


class FoldedMatMul:
    standard = False
    scheme = None

    def refusal(self, linear: Linear) -> str:
        return ""

    def emit(self, lowering: Lowering, linear: Linear) -> ir.Value:
        weight = lowering.folded_weight(linear.node, linear.stored, linear.site)
        return lowering.float_linear(linear.node, linear.x, weight, linear.bias, linear.site)


class StoredMatMul:
    standard = True
    scheme = None

    def refusal(self, linear: Linear) -> str:
        return ""

    def emit(self, lowering: Lowering, linear: Linear) -> ir.Value:
        weight = lowering.stored_weight(linear.node, linear.stored.transposed(), linear.site)
        product = lowering.emit(linear.node, "MatMul", [linear.x, weight], name=linear.site)
        return lowering.add_bias(linear.node, product, linear.bias)


#: in the order of the memory they take when they run
FORMS: dict[str, Form] = {
    form.__name__: form()
    for form in (
        DynamicMatMul,
        SharedMatMul,
        ShiftedMatMul,
        RoundedMatMul,
        IntegerMatMul,
        GroupMatMul,
        BlockMatMul,
        StoredMatMul,
        FoldedMatMul,
    )
}


def runs_as(name: str, linear: Linear) -> str:
    """The form whose kernel ONNX Runtime runs: it fuses the DequantizeLinear of 4-bit blocks with their MatMul."""
    return "BlockMatMul" if name == "StoredMatMul" and not _block_refusal(linear, _FLOATING_BLOCKS) else name
