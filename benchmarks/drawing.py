# SPDX-License-Identifier: MIT
"""A few shapes of SVG, in colours that colour-blind readers can tell apart (Okabe and Ito)."""

from html import escape

BLUE, ORANGE, GREEN, PINK, SKY, YELLOW = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#F0E442",
)  # fmt: skip
PALE, GREY, INK = "#ECECEC", "#777777", "#222222"
EXPERTS = (BLUE, ORANGE, GREEN, PINK)  # the colour of an expert in every picture
MARKER = (
    '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
    f'orient="auto"><path d="M0 0L8 4L0 8z" fill="{INK}"/></marker>'
)


class Drawing:
    """Shapes in the order in which they are drawn, on white, whatever the page's colours are."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height = width, height
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" font-family="sans-serif" font-size="12" role="img">',
            f"<title>{escape(title)}</title><defs>{MARKER}</defs>",
            f'<rect width="{width}" height="{height}" rx="6" fill="#FFFFFF"/>',
        ]

    def box(self, x: float, y: float, w: float, h: float, fill: str = PALE, text: str = "") -> None:
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="2" fill="{fill}" '
            f'stroke="{INK}" stroke-width="0.6"/>'
        )
        if text:
            ink = INK if fill in (PALE, YELLOW, SKY, "#FFFFFF") else "#FFFFFF"
            self.text(x + w / 2, y + h / 2 + 4, text, anchor="middle", fill=ink)

    def text(
        self, x: float, y: float, text: str, *, anchor: str = "start", fill: str = INK,
        size: int = 12,
    ) -> None:  # fmt: skip
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="{fill}" font-size="{size}">'
            f"{escape(text)}</text>"
        )

    def line(
        self, x: float, y: float, to_x: float, to_y: float, color: str = INK, *,
        tip: bool = False, dash: bool = False, width: float = 1,
    ) -> None:  # fmt: skip
        more = ' marker-end="url(#tip)"' if tip else ""
        more += ' stroke-dasharray="4 3"' if dash else ""
        self.parts.append(
            f'<line x1="{x:g}" y1="{y:g}" x2="{to_x:g}" y2="{to_y:g}" stroke="{color}" '
            f'stroke-width="{width:g}"{more}/>'
        )

    def arrow(self, x: float, y: float, to_x: float, to_y: float) -> None:
        self.line(x, y, to_x, to_y, tip=True)

    def curve(self, points: list[tuple[float, float]], color: str) -> None:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.parts.append(
            f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.6"/>'
        )

    def svg(self) -> str:
        return "\n".join([*self.parts, "</svg>\n"])

    @staticmethod
    def stacked(drawings: "list[Drawing]") -> str:
        """Below each other, in one file."""
        if len(drawings) == 1:
            return drawings[0].svg()
        width, height = max(d.width for d in drawings), sum(d.height for d in drawings)
        parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">']
        y = 0
        for drawing in drawings:
            parts.append(drawing.svg().replace("<svg ", f'<svg y="{y}" ', 1))
            y += drawing.height
        return "\n".join([*parts, "</svg>\n"])
