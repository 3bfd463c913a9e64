"""One self-contained web page about a run or a comparison: it needs no network, no extra and no server.

Everything is in the file: text, tables, pictures as inline SVG, one style sheet for light and dark, and a script of a
few lines for the sliders, without which all is still there, one below the other.
"""

from newton_summary.report.page import render, write

__all__ = ["render", "write"]
