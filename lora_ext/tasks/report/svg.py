"""Converts a matplotlib figure to SVG that is a part of the page.

matplotlib draws in the light colours of ``page.css``; each becomes its CSS variable, so that a chart follows the page
from light to dark. Only listed elements and attributes are copied: no inline style, id, link or script, which the
page's Content-Security-Policy would block, or which two charts would share.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import warnings
from collections.abc import Iterator
from importlib import resources
from xml.etree import ElementTree

from markupsafe import Markup
from matplotlib import style
from matplotlib.artist import Artist
from matplotlib.figure import Figure

from lora_ext.tasks.report.tables import printable

_CSS = resources.files(__package__).joinpath("page.css").read_text("utf-8")
COLOURS = dict(re.findall(r"--([\w-]+): (#\w{6})", _CSS.partition("@media")[0]))
_VARIABLES = {colour: f"var(--{name})" for name, colour in COLOURS.items()}
_STYLE = {
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # $ in a name is a dollar sign
    "font.size": 9,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": COLOURS["rule"],
    "axes.labelcolor": COLOURS["soft"],
    "text.color": COLOURS["ink"],
    "axes.labelpad": 6,
    "errorbar.capsize": 2.5,
    **{f"axes.spines.{side}": False for side in ("left", "right", "top", "bottom")},
    **{f"{axis}tick.labelcolor": COLOURS["ink"] for axis in "xy"},
    **{f"{axis}tick.{kind}.size": 0 for axis in "xy" for kind in ("major", "minor")},
}
_SVG = "{http://www.w3.org/2000/svg}"
_LINK = "{http://www.w3.org/1999/xlink}href"
_PLACES = ("d", "x", "y", "width", "height", "transform")
_LOOKS = ("fill", "fill-opacity", "stroke", "stroke-width", "stroke-dasharray", "text-anchor")


@contextlib.contextmanager
def page_style() -> Iterator[None]:
    """Draws with matplotlib's defaults and the page's style; ignores the user's matplotlibrc."""
    with style.context(["default", _STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a letter that matplotlib's font lacks: the browser has others
        yield


def give_titles(artist: Artist, *titles: str) -> None:
    """Gives each mark of the artist a tooltip, in the order of drawing."""
    artist.set_gid(json.dumps(titles))  # the SVG has it as the id of the mark, or of the marks' group


def to_svg(figure: Figure, class_: str, label: str) -> Markup:
    """Returns the ``<svg>`` element. ``label``: its description for screen readers."""
    for axes in figure.axes:
        for text in axes.texts:
            text.set_text(printable(text.get_text()))  # or the parser below refuses the SVG
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    source = ElementTree.fromstring(buffer.getvalue())
    shapes = {path.get("id"): path.get("d") for path in source.iter(f"{_SVG}path")}
    root = ElementTree.Element("svg", {"class": class_, "viewBox": source.get("viewBox"), "role": "img"})
    root.set("aria-label", printable(label))
    _copy(source, root, shapes, iter(()))
    return Markup(ElementTree.tostring(root, "unicode"))


def _copy(
    parent: ElementTree.Element, root: ElementTree.Element, shapes: dict[str, str], titles: Iterator[str]
) -> None:
    """Copies the marks in ``parent``, without their groups and definitions, as children of ``root``."""
    for child in parent:
        tag, name = child.tag.removeprefix(_SVG), child.get("id", "")
        own_titles = iter(json.loads(name)) if name.startswith("[") else titles
        if tag == "g":
            _copy(child, root, shapes, own_titles)
        elif tag in ("path", "use", "text", "image"):
            title, attributes = next(own_titles, None), _attributes(child, shapes)
            if attributes.get("fill") == "none" and "stroke" not in attributes:  # the grounds of figure and axes
                continue
            mark = ElementTree.SubElement(root, "path" if tag == "use" else tag, attributes)
            mark.text = child.text if tag == "text" else None
            if title is not None:
                ElementTree.SubElement(mark, "title").text = printable(title)


def _attributes(mark: ElementTree.Element, shapes: dict[str, str]) -> dict[str, str]:
    """Returns the place and look of a mark; a ``<use>`` gets the shape that it uses."""
    found = {name: mark.get(name) for name in _PLACES if name in mark.attrib}
    link = mark.get(_LINK, "")
    if link.startswith("#"):
        found = {"d": shapes[link[1:]], "transform": f"translate({found['x']} {found['y']})"}
    if found.get("transform", "").startswith("rotate(-0 "):
        del found["transform"]
    found = {name: re.sub(r"-?\d+\.\d+", _rounded, " ".join(value.split())) for name, value in found.items()}
    if "d" in found:
        found["d"] = re.sub(" ?([A-Za-z]) ?", r"\1", found["d"])
    look = dict(re.findall(r"([\w-]+): ([^;]+)", mark.get("style", "")))
    found |= {name: _VARIABLES.get(look[name], look[name]) for name in _LOOKS if name in look}
    return found | ({"href": "".join(link.split())} if link.startswith("data:") else {})


def _rounded(number: re.Match[str]) -> str:
    return f"{round(float(number[0]), 1) + 0:g}"  # + 0: no -0
