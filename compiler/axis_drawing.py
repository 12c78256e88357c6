"""The axes of a model as rows of a table, and one axis on its way through the model as SVG."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from torch import fx

from .axes import ACTIONS, Axes, Axis
from .errors import OptionError
from .markup import Markup, join, tag
from .program import module_path

#: uses and reasons that a cell names before it counts the others
_NAMED = 3
#: in units of the picture: its width, where the axis runs, the first operator, from one operator to the next
_WIDTH, _LINE, _TOP, _STEP = 1200, 480, 64, 24
_ARROW = "h24m-6 -4l6 4l-6 4"
_STYLE = """
svg { background: #fff; font: 13px system-ui, sans-serif; }
text { fill: #1b1f24; } .quiet { fill: #5b6470; } .end { text-anchor: end; } .pin { fill: #b8500f; }
path { stroke: #2364aa; stroke-width: 2; fill: none; } circle { fill: #2364aa; } circle.quiet { fill: #c2cad3; }
circle.pin { fill: #b8500f; }
"""


def rows(axes: Axes) -> Iterator[tuple[str, str, str, str, str]]:
    """(number, size, parameters × dimension, free for, what forbids the rest); axes that nothing may be done to stand
    at the end, one row a reason."""
    stuck: dict[str, list[Axis]] = defaultdict(list)
    for number, axis in enumerate(axes):
        if free := _free(axis):
            yield str(number), str(axis.size), _named(axis.uses), free, _reasons(axis)
        else:
            stuck[axis.atom.pins["permute"].why].append(axis)
    for why, held in stuck.items():
        uses = [use for axis in held for use in axis.uses]
        yield "", _named(sorted({axis.size for axis in held})), _named(uses), "", why


def _free(axis: Axis) -> str:
    return ", ".join(action for action in ACTIONS if action != "zero" and axis.free(action))


def _named(items: Sequence[object]) -> str:
    more = f" + {len(items) - _NAMED} more" if len(items) > _NAMED else ""
    return ", ".join(map(str, items[:_NAMED])) + more


def _reasons(axis: Axis) -> str:
    """Actions by what forbids them."""
    reasons: dict[str, list[str]] = defaultdict(list)
    for action in ACTIONS:
        if action != "zero" and (pin := axis.why(action)) is not None:
            reasons[str(pin)].append(action)
    return "; ".join(f"{', '.join(actions)}: {reason}" for reason, actions in reasons.items())


def pictured(axes: Axes, number: int | None) -> Axis:
    """The axis of this number; without one, the axis in most parameters among those that something may be done to."""
    if number is None:
        return max(axes, key=lambda axis: (any(map(axis.free, ACTIONS)), len(axis.uses)))
    if not 0 <= number < len(axes):
        raise OptionError(
            f"there is no axis {number}",
            where="drawing an axis",
            fix=f"choose a number below {len(axes)} from the table",
        )
    return axes[number]


def picture(axes: Axes, axis: Axis) -> str:
    """An SVG document: the axis runs down the middle, what makes it stands left of it, what reads it to the right.

    Operators without a weight on the axis are grey, those that forbid an action red.
    """
    pins = {pin.node: f": {pin.why}" for action in reversed(ACTIONS) if (pin := axis.why(action)) is not None}
    nodes = {node for node, _ in axes.holders(axis) if node.op == "call_function"}
    nodes |= {*axis.readers, *axis.writers, *pins}
    drawn = [node for node in axes.program.graph.nodes if node in nodes]
    bottom = _TOP + _STEP * len(drawn)
    shapes = [
        tag("style", Markup(_STYLE)),
        tag("text", f"{axis}, free for {_free(axis) or 'nothing'}", x=20, y=28),
        tag("path", d=f"M{_LINE} {_TOP}V{bottom - _STEP}"),
    ]
    for y, node in zip(range(_TOP, bottom, _STEP), drawn, strict=True):
        shapes += _operator(axis, node, y, pins.get(node, ""))
    view = f"0 0 {_WIDTH} {bottom}"
    return str(tag("svg", join(shapes), xmlns="http://www.w3.org/2000/svg", viewBox=view, width=_WIDTH))


def _operator(axis: Axis, node: fx.Node, y: int, pin: str) -> Iterator[Markup]:
    """One operator: an arrow to or from each of its parameters along the axis, and its name on the right."""
    names = {str(source.target) for source in node.all_input_nodes if source.op == "get_attr"}
    uses = [use for use in axis.uses if use.parameter in names]
    made, summed = ([str(use) for use in uses if use.sums is sums] for sums in (False, True))
    style = "pin" if pin else "" if uses else "quiet"
    yield tag("circle", cx=_LINE, cy=y, r=4, class_=style)
    if made:
        yield tag("path", d=f"M{_LINE - 30} {y}{_ARROW}")
        yield tag("text", ", ".join(made), x=_LINE - 36, y=y + 4, class_="end")
    if summed:
        yield tag("path", d=f"M{_LINE + 6} {y}{_ARROW}")
    if summed or pin or not made:
        path = module_path(node)
        operator = node.name if path == "" else f"{node.name} in {path}"
        yield tag("text", ", ".join(summed) or operator, pin, x=_LINE + 36, y=y + 4, class_=style)
