"""Drawing a chart's content in a style: title, legend, axes, bars, lines and slices."""

from __future__ import annotations

from dataclasses import replace

from proxyv.synthetic.chart_canvas import Anchor, Box, Sheet, polar
from proxyv.synthetic.chart_data import Chart
from proxyv.synthetic.chart_style import Style

__all__ = ["draw"]

EDGE = 4.0  # pixels that stay free along the page's border


def draw(chart: Chart, style: Style, size_hw: tuple[int, int], ticks: bool) -> Sheet:
    """Lay a chart out on a new sheet.

    Args:
        chart: what is shown.
        style: how it looks.
        size_hw: height and width of the page in pixels.
        ticks: whether the value axis has numbers (always so where no values are printed).
    """
    sheet = Sheet(size_hw, style.paper)
    area = Box(EDGE, EDGE, size_hw[1] - EDGE, size_hw[0] - EDGE)
    area = _draw_title(sheet, chart, style, area)
    if chart.plan.num_series > 1:
        area = _draw_legend(sheet, chart, style, area)
    if chart.kind == "pie":
        _draw_pie(sheet, chart, style, area)
        return sheet
    area = _draw_names_of_axes(sheet, chart, style, area)
    if chart.kind == "hbar":
        _draw_horizontal(sheet, chart, style, area, ticks)
    else:
        _draw_vertical(sheet, chart, style, area, ticks)
    return sheet


def _contrast(fill: str) -> str:
    """Black or white, whichever can be read on a colour."""
    red, green, blue = (int(fill[i : i + 2], 16) for i in (1, 3, 5))
    return "#000000" if 0.3 * red + 0.59 * green + 0.11 * blue > 140 else "#ffffff"


def _write_value(
    sheet: Sheet, style: Style, text: str, x: float, middle: float, anchor: Anchor = "center"
) -> None:
    """Write a value on a patch of plain background, so that no line runs through it."""
    sheet.write(text, x, middle, style.small, style.ink, anchor, behind=style.plot)


def _draw_title(sheet: Sheet, chart: Chart, style: Style, area: Box) -> Box:
    face = style.title_face
    row = 1.45 * face.em
    if style.title in ("bottom", "foot"):
        centre, low = (area.left + area.right) / 2, area.bottom - row / 2
        if style.title == "foot":
            sheet.write(chart.title, area.left, low, face, style.ink, "left")
        else:
            sheet.write(chart.title, centre, low, face, style.ink)
        return replace(area, bottom=area.bottom - row - 1)
    middle, color = area.top + row / 2, style.ink
    if style.title in ("band", "shade"):
        strip = Box(0, 0, float(sheet.size_hw[1]), middle + row / 2)
        sheet.rectangle(strip, style.ink if style.title == "band" else style.grid_color)
        middle = (middle + row / 2) / 2
    if style.title == "band":
        color = "#ffffff"
    if style.title in ("left", "band"):
        sheet.write(chart.title, area.left, middle, face, color, "left")
    elif style.title == "right":
        sheet.write(chart.title, area.right, middle, face, color, "right")
    else:
        sheet.write(chart.title, (area.left + area.right) / 2, middle, face, color)
    return replace(area, top=area.top + row + 1)


def _draw_legend(sheet: Sheet, chart: Chart, style: Style, area: Box) -> Box:
    """Names of the series with their colours, in a row or in a column; returns what is left."""
    face = style.small
    key, row = 0.8 * face.em, 1.35 * face.em
    pairs = list(zip(chart.series, chart.colors, strict=True))

    def swatch(left: float, middle: float, fill: str) -> None:
        box = Box(left, middle - key / 2, left + key, middle + key / 2)
        sheet.rectangle(box, fill, style.edge, line=0.6)

    if style.legend in ("right", "side"):
        width = key + 4 + max(face.width(name) for name in chart.series)
        left = area.right - width if style.legend == "right" else area.left
        middle = (area.top + area.bottom - row * len(pairs)) / 2
        for name, (_, fill) in pairs:
            swatch(left, middle, fill)
            sheet.write(name, left + key + 3, middle, face, style.ink, "left")
            middle += row
        if style.legend == "side":
            return replace(area, left=left + width + 4)
        return replace(area, right=left - 4)
    widths = [key + 3 + face.width(name) for name in chart.series]
    gap = min(10.0, (area.width - sum(widths)) / max(1, len(pairs)))
    total = sum(widths) + gap * (len(pairs) - 1)
    left = (area.left + area.right - total) / 2
    below = style.legend == "bottom"
    middle = area.bottom - row / 2 if below else area.top + row / 2
    framed = style.legend == "framed"
    if framed:
        frame = Box(left - 2, middle - row / 2, left + total + 2, middle + row / 2)
        sheet.rectangle(frame, style.plot, style.ink, line=0.7)
    for (name, (_, fill)), width in zip(pairs, widths, strict=True):
        swatch(left + width - key if framed else left, middle, fill)
        sheet.write(name, left + (0 if framed else key + 3), middle, face, style.ink, "left")
        left += width + gap
    if below:
        return replace(area, bottom=area.bottom - row - 2)
    return replace(area, top=area.top + row + 2)


def _draw_names_of_axes(sheet: Sheet, chart: Chart, style: Style, area: Box) -> Box:
    row = 1.4 * style.small.em
    if chart.x_name:
        middle = area.bottom - row / 2
        sheet.write(chart.x_name, (area.left + area.right) / 2 + 8, middle, style.small, style.ink)
        area = replace(area, bottom=area.bottom - row)
    if chart.y_name:
        middle = area.top + row / 2
        sheet.write(chart.y_name, area.left, middle, style.small, style.ink, "left")
        area = replace(area, top=area.top + row)
    return area


def _draw_spines(sheet: Sheet, style: Style, plot: Box) -> None:
    ends = {
        "l": ((plot.left, plot.top), (plot.left, plot.bottom)),
        "b": ((plot.left, plot.bottom), (plot.right, plot.bottom)),
        "r": ((plot.right, plot.top), (plot.right, plot.bottom)),
        "t": ((plot.left, plot.top), (plot.right, plot.top)),
    }
    for side in style.spines:
        sheet.line(ends[side], style.ink, linewidth=0.8)


def _draw_vertical(sheet: Sheet, chart: Chart, style: Style, area: Box, ticks: bool) -> None:
    """Upright bars, groups of them, or lines, above names of categories."""
    labels = [chart.number(tick, short=True) for tick in chart.ticks]
    margin = max(style.small.width(label) for label in labels) + 4 if ticks else 2.0
    room = 1.25 * style.small.em if chart.plan.values_shown else 0.5 * style.small.em
    plot = Box(area.left + margin, area.top + room, area.right, area.bottom - 1.35 * style.face.em)
    sheet.rectangle(plot, style.plot)
    scale = plot.height / (chart.step * chart.num_ticks)
    for tick, label in zip(chart.ticks, labels, strict=True):
        y = plot.bottom - tick * scale
        if style.grid or not chart.plan.values_shown:
            sheet.line(
                ((plot.left, y), (plot.right, y)),
                style.grid_color,
                linewidth=0.7,
                linestyle=style.grid or "-",
            )
        if ticks:
            sheet.write(label, plot.left - 3, y, style.small, style.ink, "right")
    _draw_spines(sheet, style, plot)
    slot = plot.width / chart.plan.num_categories
    middles = [plot.left + (i + 0.5) * slot for i in range(chart.plan.num_categories)]
    if chart.kind == "line":
        _draw_lines(sheet, chart, style, plot, middles)
    else:
        _draw_bars(sheet, chart, style, plot, middles)
    for middle, name in zip(middles, chart.categories, strict=True):
        sheet.write(name, middle, area.bottom - 0.55 * style.face.em, style.face, style.ink)


def _draw_bars(sheet: Sheet, chart: Chart, style: Style, plot: Box, middles: list[float]) -> None:
    scale = plot.height / (chart.step * chart.num_ticks)
    share = style.bar_share if chart.plan.num_series == 1 else max(0.8, style.bar_share)
    width = share * plot.width / len(middles) / chart.plan.num_series
    row = 0.5 * style.small.cap + 2.5
    for j, values in enumerate(chart.values):
        for i, value in enumerate(values):
            fill = chart.colors[i if chart.vary_colors else j][1]
            x = middles[i] + (j - (chart.plan.num_series - 1) / 2) * width
            top = plot.bottom - value * scale
            bar = Box(x - width / 2, top, x + width / 2, plot.bottom)
            sheet.rectangle(bar, fill, style.edge, style.hatch, 0.7)
            if not chart.plan.values_shown:
                continue
            text = chart.printed(j, i)
            fits = style.small.width(text) + 2 <= width and bar.height > 2.5 * row
            if style.values_inside and fits and style.hatch is None:
                sheet.write(text, x, top + row + 0.5, style.small, _contrast(fill))
            else:
                _write_value(sheet, style, text, x, top - row)


def _draw_lines(sheet: Sheet, chart: Chart, style: Style, plot: Box, middles: list[float]) -> None:
    scale = plot.height / (chart.step * chart.num_ticks)
    for values, (_, color) in zip(chart.values, chart.colors, strict=True):
        points = [(x, plot.bottom - v * scale) for x, v in zip(middles, values, strict=True)]
        sheet.line(
            points,
            color,
            linewidth=1.6,
            linestyle=style.line_style,
            marker=style.marker,
            markersize=4.0,
        )
    if not chart.plan.values_shown:
        return
    row = 0.5 * style.small.cap + 4
    heights = [plot.bottom - v * scale for v in chart.values[0]]
    for i, (x, y) in enumerate(zip(middles, heights, strict=True)):
        around = heights[max(0, i - 1) : i] + heights[i + 1 : i + 2]
        valley = all(other < y for other in around) and y + 2 * row < plot.bottom
        middle = y + row if valley else y - row
        _write_value(sheet, style, chart.printed(0, i), x, middle)


def _draw_horizontal(sheet: Sheet, chart: Chart, style: Style, area: Box, ticks: bool) -> None:
    """Bars that lie, to the right of the names of their categories."""
    labels = [chart.number(tick, short=True) for tick in chart.ticks]
    widest = max(style.face.width(name) for name in chart.categories)
    printed = [chart.printed(0, i) for i in range(chart.plan.num_categories)]
    shown = chart.plan.values_shown
    room = max(style.small.width(text) for text in printed) + 4 if shown else 0.0
    room = max(room, style.small.width(labels[-1]) / 2 if ticks else 2.0)
    below = 1.3 * style.small.em if ticks else 2.0
    plot = Box(area.left + widest + 4, area.top + 2, area.right - room, area.bottom - below)
    sheet.rectangle(plot, style.plot)
    scale = plot.width / (chart.step * chart.num_ticks)
    for tick, label in zip(chart.ticks, labels, strict=True):
        x = plot.left + tick * scale
        if style.grid or not shown:
            sheet.line(
                ((x, plot.top), (x, plot.bottom)),
                style.grid_color,
                linewidth=0.7,
                linestyle=style.grid or "-",
            )
        if ticks:
            sheet.write(label, x, area.bottom - 0.5 * style.small.em, style.small, style.ink)
    _draw_spines(sheet, style, plot)
    slot = plot.height / chart.plan.num_categories
    for i, (name, value) in enumerate(zip(chart.categories, chart.values[0], strict=True)):
        y, half = plot.top + (i + 0.5) * slot, style.bar_share * slot / 2
        end = plot.left + value * scale
        fill = chart.colors[i if chart.vary_colors else 0][1]
        sheet.rectangle(Box(plot.left, y - half, end, y + half), fill, style.edge, style.hatch, 0.7)
        sheet.write(name, plot.left - 3, y, style.face, style.ink, "right")
        if shown:
            inside = style.values_inside and style.hatch is None and half > 0.6 * style.small.em
            if inside and end - plot.left > style.small.width(printed[i]) + 5:
                color = _contrast(fill)
                sheet.write(printed[i], end - 3, y, style.small, color, "right")
            else:
                _write_value(sheet, style, printed[i], end + 3, y, "left")


def _draw_pie(sheet: Sheet, chart: Chart, style: Style, area: Box) -> None:
    """Slices with their names around them, or in a list beside them."""
    listed = style.legend in ("right", "bottom")
    face = style.small if listed else style.face
    widest = max(face.width(name) for name in chart.categories)
    key, row = 0.8 * face.em, 1.35 * face.em
    side = widest + key + 8 if listed else 0.0
    if listed:
        radius = min(area.width - side, area.height) / 2 - 1
        centre = (area.left + radius + 1, (area.top + area.bottom) / 2)
    else:
        radius = min((area.width - 2 * widest) / 2 - 4, area.height / 2 - 1.2 * face.em)
        centre = ((area.left + area.right) / 2, (area.top + area.bottom) / 2)
    ring = None if style.ring is None else style.ring * radius
    start = 90.0
    middle = centre[1] - row * (chart.plan.num_categories - 1) / 2
    for i, (name, share) in enumerate(zip(chart.categories, chart.values[0], strict=True)):
        end = start - 3.6 * share
        half, fill = (start + end) / 2, chart.colors[i][1]
        edge = style.paper if style.edge == "none" else style.edge
        sheet.wedge(centre, radius, (end, start), fill, edge, ring)
        if chart.plan.values_shown:
            reach = 0.66 * radius if ring is None else radius - ring / 2
            x, y = polar(centre, reach, half)
            sheet.write(chart.printed(0, i), x, y, style.small, _contrast(fill))
        if listed:
            left = area.right - side + 5
            box = Box(left, middle - key / 2, left + key, middle + key / 2)
            sheet.rectangle(box, fill)
            sheet.write(name, left + key + 3, middle, face, style.ink, "left")
        else:
            x, y = polar(centre, radius + 3 + 0.5 * face.em * abs((half % 180) - 90 < 45), half)
            turn = x - centre[0]
            if abs(turn) < 0.25 * radius:
                y += (-0.4 if y < centre[1] else 0.4) * face.em
                sheet.write(name, x, y, face, style.ink)
            else:
                sheet.write(name, x, y, face, style.ink, "left" if turn > 0 else "right")
        start, middle = end, middle + row
