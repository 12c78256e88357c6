"""w → scale · table[code]: each weight is the nearest of 2^bits values, times the scale of its group.

`Codebook` learns the table by k-means (Han et al. 2016, "Deep Compression", section 3; one table for each row as in
SqueezeLLM, Kim et al. 2024, section 4.1). `NF4` has a fixed one, quantiles of the normal distribution (Dettmers et
al. 2023, "QLoRA", section 3 and appendix E). Lossy; a tensor of at most 2^bits values, unscaled, is stored exactly.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import OptionError, did_you_mean
from .base import Arrays, Shape
from .packing import pack, packed_size, unpack
from .scaled import Scaled
from .scales import SCALES, Parameters

#: Lloyd's algorithm stops after so many rounds, or when the error shrinks by less than this share
_LLOYD_ROUNDS, _LLOYD_STOP = 100, 1e-4
#: quantiles of N(0, 1), seven below and eight above an exact zero, divided by the largest
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


class LookUp(Scaled):
    """Codes into ascending tables of 2^bits values. Subclasses say where the tables are.

    Stored: `codes` uint8 `[O, ceil(I·bits/8)]`, the scales as `scale` says, and what the subclass adds.
    """

    bits: int

    @property
    def unscaled(self) -> bool:
        return self.scale == "none"

    @abstractmethod
    def table_of(self, parameters: Parameters) -> Tensor:
        """The table `[2^bits]`, or one for each row and group `[R, G, 2^bits]`."""

    @abstractmethod
    def stored_table(self, arrays: Arrays) -> Tensor:
        """The table `[1, 2^bits]`, or one for each row `[O, 2^bits]`."""

    def layout(self, shape: Shape) -> dict[str, tuple[Shape, torch.dtype]]:
        rows, groups, _ = self.grid(shape)
        codes = ((shape[0], packed_size(prod(shape[1:]), self.bits)), torch.uint8)
        return {"codes": codes} | ({} if self.unscaled else SCALES[self.scale].layout(rows, groups))

    def scales(self, grouped: Tensor, shrink: Tensor | float = 1.0) -> Parameters:
        """`[R, G]`: the largest magnitude of each group times `shrink`, as it can be stored."""
        if self.unscaled:
            return {"scale": grouped.new_ones(grouped.shape[:-1])}
        return self.round_scale(grouped.abs().amax(-1), 1.0, shrink)

    def quantize(self, grouped: Tensor, parameters: Parameters) -> Tensor:
        elements = (grouped / parameters["scale"].unsqueeze(-1)).float()
        return nearest(elements, self.table_of(parameters)).float()

    def dequantize(self, codes: Tensor, parameters: Parameters) -> Tensor:
        return self.elements(codes, parameters) * parameters["scale"].unsqueeze(-1)

    def elements(self, codes: Tensor, parameters: Parameters) -> Tensor:
        """Codes `[R, G, n]` → the values of the table, not yet scaled."""
        table = self.table_of(parameters)
        if table.ndim == 1:
            return table.index_select(0, codes.flatten().int()).reshape(codes.shape)
        return table.expand(*codes.shape[:-1], -1).gather(-1, codes.long())

    def store(self, codes: Tensor, parameters: Parameters, shape: Shape) -> Arrays:
        arrays = {"codes": pack(codes.reshape(shape[0], -1).to(torch.uint8), self.bits)}
        return arrays | ({} if self.unscaled else SCALES[self.scale].pack(parameters))

    def load(self, arrays: Arrays, shape: Shape) -> tuple[Tensor, Parameters]:
        grid = self.grid(shape)
        codes = unpack(arrays["codes"], self.bits, prod(shape[1:])).reshape(grid)
        if self.unscaled:
            return codes, {"scale": torch.ones(grid[:2], device=codes.device)}
        return codes, SCALES[self.scale].unpack(arrays)

    def decode(self, arrays: Arrays, shape: Shape) -> Tensor:
        elements = self._look_up(arrays, prod(shape[1:])).reshape(self.grid(shape))
        if not self.unscaled:
            elements = elements * SCALES[self.scale].unpack(arrays)["scale"].unsqueeze(-1)
        return elements.reshape(shape)

    def _look_up(self, arrays: Arrays, count: int) -> Tensor:
        """The elements, in as few look-ups as can be: backends run them one by one."""
        codes, table = arrays["codes"], self.stored_table(arrays)
        if len(table) == 1 and 8 % self.bits == 0:  # all codes of a byte at once
            octets = torch.arange(256, dtype=torch.uint8, device=codes.device).unsqueeze(1)
            fields = table.flatten().index_select(0, unpack(octets, self.bits, 8 // self.bits).flatten())
            return fields.reshape(256, -1).index_select(0, codes.flatten().int()).reshape(len(codes), -1)[:, :count]
        places = unpack(codes, self.bits, count)
        if len(table) > 1:  # all tables in a line
            places = places + (torch.arange(len(table), dtype=torch.int32, device=codes.device) << self.bits)[:, None]
        return table.flatten().index_select(0, places.flatten())


@dataclass(frozen=True)
class NF4(LookUp):
    """The 4-bit NormalFloat: 16 values that standard normal weights, divided by their largest, take equally often."""

    group: int = 64
    scale: str = "float32"
    bits: ClassVar[int] = 4  # type: ignore[misc]  # fixed here, an option elsewhere
    summary: ClassVar[str] = "normal float"

    def __post_init__(self) -> None:
        self.check_options()

    def table_of(self, parameters: Parameters) -> Tensor:
        return torch.tensor(_NF4, device=parameters["scale"].device)

    def stored_table(self, arrays: Arrays) -> Tensor:
        return torch.tensor([_NF4], device=arrays["codes"].device)

    def parameters(self, grouped: Tensor, shrink: Tensor | float = 1.0) -> Parameters:
        return self.scales(grouped, shrink)


@dataclass(frozen=True)
class Codebook(LookUp):
    """A table that k-means finds: one for the tensor, or with `per="row"` one for each output channel.

    `scale="none"` leaves the scales out: a table a row needs none but those of groups. Stored besides codes and
    scales: `table` float32 `[1 or O, 2^bits]`, ascending. As a parameter it is repeated for each row and group,
    `[R, G, 2^bits]`.
    """

    bits: int = 4
    group: int = 0
    per: str = "tensor"
    scale: str = "float32"
    summary: ClassVar[str] = "codebook"

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise OptionError(
                f"Codebook has 1 to 8 bits, not {self.bits}",
                where="Codebook(bits=…)",
                fix="use 1 … 8; for longer codes, Additive()",
            )
        if self.per not in ("tensor", "row"):
            raise OptionError(
                f"per={self.per!r} is not known",
                where="Codebook(per=…)",
                fix=did_you_mean(self.per, ("tensor", "row")),
            )
        if self.unscaled and self.group != 0:
            raise OptionError(
                f"group={self.group} needs a scale for each group, scale='none' has none",
                where="Codebook(group=…, scale='none')",
                fix="leave group out, or use scale='float16'",
            )
        if self.per == "row" and self.group == -1:
            raise OptionError(
                "one scale a tensor adds nothing to one table a row",
                where="Codebook(group=-1, per='row')",
                fix="use scale='none'",
            )
        if not self.unscaled:
            self.check_options()

    @property
    def local(self) -> bool:
        return False

    def layout(self, shape: Shape) -> dict[str, tuple[Shape, torch.dtype]]:
        return super().layout(shape) | {"table": ((self._tables(shape[0]), 1 << self.bits), torch.float32)}

    def _tables(self, rows: int) -> int:
        return rows if self.per == "row" else 1

    def table_of(self, parameters: Parameters) -> Tensor:
        table = parameters["table"]
        return table if self.per == "row" else table[0, 0]

    def stored_table(self, arrays: Arrays) -> Tensor:
        return arrays["table"]

    def parameters(self, grouped: Tensor, shrink: Tensor | float = 1.0) -> Parameters:
        # the table is that of the full range: a clip search then compares ranges under one table
        return self.scales(grouped, shrink) | self.learn(grouped, self.scales(grouped)["scale"])

    def learn(self, grouped: Tensor, scale: Tensor, importance: Tensor | None = None) -> Parameters:
        """The parameter "table", which minimises Σ importance · (w − ŵ)² under the given scales `[R, G]`; `importance`
        broadcasts to `[R, G, n]`."""
        rows = self._tables(grouped.shape[0])
        # an error in w / scale is one of w, times the scale
        weights = scale.double().square().unsqueeze(-1) * (1.0 if importance is None else importance.double())
        values = (grouped / scale.unsqueeze(-1)).reshape(rows, -1)
        table = kmeans(values, weights.expand(grouped.shape).reshape(rows, -1), 1 << self.bits)
        return {"table": table.unsqueeze(1).expand(*scale.shape, -1)}

    def store(self, codes: Tensor, parameters: Parameters, shape: Shape) -> Arrays:
        table = parameters["table"][: self._tables(shape[0]), 0].contiguous()
        return super().store(codes, parameters, shape) | {"table": table}

    def load(self, arrays: Arrays, shape: Shape) -> tuple[Tensor, Parameters]:
        codes, parameters = super().load(arrays, shape)
        return codes, parameters | {"table": arrays["table"].unsqueeze(1).expand(*codes.shape[:2], -1)}


def nearest(values: Tensor, table: Tensor) -> Tensor:
    """The index of the nearest entry of an ascending table, the lower of two equally near ones.

    `table` is `[L]`, or has the leading axes of `values`.
    """
    middle = table[..., 1:] / 2 + table[..., :-1] / 2
    if table.ndim > 1:
        middle = middle.expand(*values.shape[:-1], -1)
    return torch.searchsorted(middle.contiguous(), values.contiguous())


def kmeans(values: Tensor, weights: Tensor, levels: int) -> Tensor:
    """Weighted 1-D k-means: the table that minimises Σ weight · (value − nearest entry)², a local optimum.

    Lloyd's algorithm from two starts, of which each row keeps the better: quantiles; and even steps over the range,
    so that the result is never worse than a uniform grid. A row that has no more different values than levels is
    stored exactly. Sorted once, every step is a look-up in running sums.

    Values and weights `[T, n]` → float32 `[T, levels]`, ascending.
    """
    values, order = values.double().contiguous().sort(-1)
    weights = weights.double().gather(-1, order)
    sums = _Sums(values, _running(weights), _running(weights * values), (weights * values.square()).sum(-1))
    first, second = (_lloyd(start, sums) for start in (_quantiles(sums, levels), _even(values, levels)))
    table = torch.where((first[1] <= second[1]).unsqueeze(-1), first[0], second[0])
    rank = _running((values[:, 1:] != values[:, :-1]).long())
    distinct = values[:, -1:].repeat(1, levels).scatter(-1, rank.clamp(max=levels - 1), values)
    return torch.where(rank[:, -1:] < levels, distinct, table).float()


@dataclass(frozen=True)
class _Sums:
    """Values, ascending, `[T, n]`; Σ weight and Σ weight · value over the first 0, 1, …, n of them; Σ weight · value²
    over all."""

    values: Tensor
    mass: Tensor
    moment: Tensor
    energy: Tensor


def _running(terms: Tensor) -> Tensor:
    return torch.nn.functional.pad(terms.cumsum(-1), (1, 0))


def _quantiles(sums: _Sums, levels: int) -> Tensor:
    shares = (torch.arange(levels, dtype=torch.float64, device=sums.mass.device) + 0.5) / levels
    places = torch.searchsorted(sums.mass, shares * sums.mass[:, -1:]) - 1
    return sums.values.gather(-1, places.clamp(min=0))


def _even(values: Tensor, levels: int) -> Tensor:
    low, high = values[:, :1], values[:, -1:]
    return low + (high - low) * torch.linspace(0, 1, levels, dtype=values.dtype, device=values.device)


def _lloyd(table: Tensor, sums: _Sums) -> tuple[Tensor, Tensor]:
    """(table `[T, levels]`, its error `[T]`)"""
    error = torch.full_like(sums.energy, torch.inf)
    for _ in range(_LLOYD_ROUNDS):
        cuts = torch.searchsorted(sums.values, table[:, 1:] / 2 + table[:, :-1] / 2, right=True)
        ends = torch.nn.functional.pad(torch.nn.functional.pad(cuts, (1, 0)), (0, 1), value=sums.values.shape[-1])
        mass, moment = sums.mass.gather(-1, ends).diff(), sums.moment.gather(-1, ends).diff()
        table = torch.where(mass > 0, moment / mass, table)
        before, error = error, sums.energy - (mass * table.square()).sum(-1)
        if (before - error <= _LLOYD_STOP * error).all():
            break
    return table, error
