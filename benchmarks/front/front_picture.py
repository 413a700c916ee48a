# SPDX-License-Identifier: Apache-2.0
"""The picture of the front: accuracy over latency and over size, a panel for each network, as SVG."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from html import escape

from benchmarks.front.standings import Standing, front, made

WIDTH, HEIGHT = 620, 400
LEFT, RIGHT, TOP, BOTTOM = 62, 18, 46, 48
COLOURS = {
    "fxslim": "#1660c4",
    "Torch-Pruning": "#d9730d",
    "ONNX Runtime": "#2a8c4a",
    "torch.ao": "#8d3fb5",
    "torch": "#777777",
}
# Title of the axis, what is shown, its ticks' format.
Axis = tuple[str, Callable[[Standing], float], str]
AXES: tuple[Axis, ...] = (
    ("milliseconds for one image, one thread", lambda one: one.milliseconds(0), "g"),
    ("kilobytes of the file", lambda one: one.bytes / 1000, "g"),
)
# Below the best by more than this, rows are left out of the picture (they are in the table).
DEEPEST = 8.0


@dataclass(frozen=True, kw_only=True)
class _Scale:
    """A logarithmic axis across, a linear one upwards, in pixels of one panel."""

    low: float
    high: float
    bottom: float
    top: float

    @classmethod
    def around(cls, standings: list[Standing], measure: Callable[[Standing], float]) -> "_Scale":
        across = [measure(one) for one in standings]
        accuracies = [value for one in standings for value in one.accuracies]
        return cls(
            low=min(across) / 1.12, high=max(across) * 1.12,
            bottom=math.floor(min(accuracies) - 0.1), top=math.ceil(max(accuracies) + 0.1),
        )  # fmt: skip

    def x(self, value: float) -> float:
        return LEFT + math.log(value / self.low) / math.log(self.high / self.low) * (WIDTH - LEFT - RIGHT)

    def y(self, accuracy: float) -> float:
        return TOP + (self.top - accuracy) / (self.top - self.bottom) * (HEIGHT - TOP - BOTTOM)


def picture(nets: dict[str, list[Standing]]) -> str:
    """SVG of all panels; numbers beside the points are those of the table's rows."""
    panels = []
    for row, (net, standings) in enumerate(nets.items()):
        for column, axis in enumerate(AXES):
            inside = "\n".join(_panel(net, made(standings), axis))
            panels.append(f'<g transform="translate({column * WIDTH} {row * HEIGHT})">\n{inside}\n</g>')
    wide, high = len(AXES) * WIDTH, len(nets) * HEIGHT + 34
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{wide}" height="{high}" viewBox="0 0 {wide} {high}" '
        'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
    )
    return "\n".join([head, *panels, *_legend(high - 14), "</svg>", ""])


def _panel(net: str, standings: list[Standing], axis: Axis) -> list[str]:
    title, measure, ticks = axis
    best = max(one.accuracy for one in standings)
    shown = [one for one in standings if one.accuracy >= best - DEEPEST]
    scale = _Scale.around(shown, measure)
    lines = [_text(LEFT, TOP - 14, f"{net}: test accuracy in percent", size=14)]
    lines += _frame(scale, title, ticks)
    ours = [one for one in shown if one.by == "fxslim"]
    lines.append(_stairs(front(ours, measure), scale, measure))
    for one in shown:
        lines += _point(one, scale, measure)
    return lines


def _frame(scale: _Scale, title: str, ticks: str) -> list[str]:
    lines = []
    for step in (1, 2, 5):
        for power in range(-3, 6):
            value = step * 10.0**power
            if scale.low <= value <= scale.high:
                x = scale.x(value)
                lines += [_line(x, TOP, x, HEIGHT - BOTTOM), _text(x, HEIGHT - BOTTOM + 16, format(value, ticks))]
    for accuracy in range(int(scale.bottom), int(scale.top) + 1):
        y = scale.y(accuracy)
        lines += [_line(LEFT, y, WIDTH - RIGHT, y), _text(LEFT - 8, y + 4, str(accuracy), anchor="end")]
    return [*lines, _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 14, title)]


def _point(one: Standing, scale: _Scale, measure: Callable[[Standing], float]) -> list[str]:
    x, colour = scale.x(measure(one)), COLOURS[one.by]
    low, middle, high = (scale.y(value) for value in (min(one.accuracies), one.accuracy, max(one.accuracies)))
    return [
        f'<line x1="{x:.1f}" y1="{low:.1f}" x2="{x:.1f}" y2="{high:.1f}" stroke="{colour}" stroke-opacity="0.45"/>',
        f'<circle cx="{x:.1f}" cy="{middle:.1f}" r="4" fill="{colour}"><title>{escape(one.name)}</title></circle>',
        _text(x + 6, middle - 5, str(one.number), size=10, anchor="start", colour=colour),
    ]


def _stairs(steps: list[Standing], scale: _Scale, measure: Callable[[Standing], float]) -> str:
    """The edge of what fxslim reaches."""
    points: list[str] = []
    for before, one in zip([None, *steps], steps, strict=False):
        if before is not None:
            points.append(f"{scale.x(measure(one)):.1f},{scale.y(before.accuracy):.1f}")
        points.append(f"{scale.x(measure(one)):.1f},{scale.y(one.accuracy):.1f}")
    return (
        f'<polyline points="{" ".join(points)}" fill="none" stroke="{COLOURS["fxslim"]}" stroke-dasharray="4 3" '
        'stroke-opacity="0.6"/>'
    )


def _legend(y: float) -> list[str]:
    lines = []
    for place, (name, colour) in enumerate(COLOURS.items()):
        x = LEFT + 150 * place
        lines.append(f'<circle cx="{x}" cy="{y - 4}" r="5" fill="{colour}"/>')
        lines.append(_text(x + 12, y, name, anchor="start"))
    return [
        *lines,
        _text(LEFT + 150 * len(COLOURS), y, "bars: all trainings; numbers: the table's rows", anchor="start"),
    ]


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#e2e2e2"/>'


def _text(
    x: float, y: float, text: str, *, size: int = 12, anchor: str = "middle", colour: str = "#222222"
) -> str:  # fmt: skip
    anchor = "start" if size == 14 else anchor
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{colour}">{escape(text)}</text>'
    )
