"""One page that shows what a model looked at while it answered: self-contained, without a network.

Shapes: T tokens that were read, H heads.
"""

import base64
import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trivium.report.figures import save
from trivium.report.html import templates
from trivium.report.storage import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXPLAINED = {
    "weights": "What a query weighs each token that it reads with: the softmax's own weights, rows sum to 1 (of a "
    "product of two softmaxes to less).",
    "signed": "What a token's value counts in the output: the derivative of output t by value s, exactly, since a "
    "linear memory is linear in its values. It may be negative.",
    "derivative": "Effective attention: how much output t changes with input s, the size of the derivative.",
}
WORDS = (
    "One row for each layer, one column for each head. Of recurrent and scan models, and of the whole model, the map "
    "is the effective attention, a derivative."
)


def write_attention_page(
    path: Path, *, title: str, subtitle: str, described: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> Path:
    """Write the page of one trace, as `evaluate.trace` describes it, to `path` and return that.

    Raises OSError naming `path`, where a page of before then stays.
    """
    folder = Path(__file__).parent
    data = {**described, "panels": [], "explained": EXPLAINED}
    for index, panel in enumerate(described["panels"]):
        stored = {"weights": "weights_HTT", "second": "second_HTT", "pairs": "pairs_HTTT"}
        found = {key: arrays.get(f"panel{index}.{name}") for key, name in stored.items()}
        data["panels"].append({**panel, **{key: _packed(array) for key, array in found.items() if array is not None}})
    data["read"] = int(arrays["panel0.weights_HTT"].shape[1])
    # What stands in a script ends at the first closing tag, even inside quotes.
    text = json.dumps(data, ensure_ascii=True).replace("<", "\\u003c")
    ahead = 1 + described.get("shift", 0)  # traces that older versions stored have none
    told = f" What a token tells is the one {ahead} places behind it: {ahead} come from a pass." if ahead > 1 else ""
    page = templates().get_template("attention.html.jinja")
    css = (folder / "page.css").read_text() + (folder / "attention.css").read_text()
    markup = import_module("markupsafe").Markup
    write_whole(
        path,
        page.render(
            title=title,
            subtitle=subtitle,
            words=WORDS + told,
            css=markup(css),
            js=markup((folder / "attention.js").read_text()),
            data=markup(text),
        ),
    )
    return path


def _packed(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array, dtype="<f4").tobytes()).decode()


def save_panels(folder: Path, *, described: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> list[Path]:
    """Write every map of a trace, head by head, as PNG and SVG into `folder`; return the files."""
    written = []
    for index, panel in enumerate(described["panels"]):
        for name, what in (("weights_HTT", ""), ("second_HTT", "-second")):
            for head, weights_TT in enumerate(arrays.get(f"panel{index}.{name}", ())):
                signed = panel["kind"] == "signed"
                title = f"{panel['layer']}, head {head + 1}: {panel['mixer']}{what.replace('-', ', ')}"
                figure = token_map(weights_TT, described=described, signed=signed, title=title)
                stem = f"{panel['layer'].replace(' ', '-')}-head-{head + 1}{what}"
                written += [save(figure, folder / f"{stem}{suffix}") for suffix in (".png", ".svg")]
    return written


def hue_of(significance: int) -> str:
    """Return the colour of digits of one significance, 1 the least; grey for 0, which is no digit."""
    from matplotlib.colors import hsv_to_rgb, to_hex

    hue = (200 + 47 * (significance - 1)) % 360 / 360
    red, green, blue = hsv_to_rgb((hue, 0.9, 0.6)).tolist()
    return to_hex((red, green, blue)) if significance else "#4D4D4D"


def token_map(weights_TT: np.ndarray, *, described: Mapping[str, Any], signed: bool, title: str) -> "Figure":
    """Return one map (reader, read) for a paper: axes labelled by tokens, digits of one significance in one colour."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tokens = len(weights_TT)
    side = 1.2 + max(2.4, 0.24 * tokens)
    figure = Figure(figsize=(side, side), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    largest = float(np.abs(weights_TT).max()) or 1.0
    colours = matplotlib.colormaps["RdBu" if signed else "Blues"]
    axes.imshow(weights_TT, cmap=colours, vmin=-largest if signed else 0.0, vmax=largest, interpolation="nearest")
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
    axes.set_xlabel("is read")
    axes.set_ylabel("reads")
    names = ["␣" if token == " " else token for token in described["tokens"][:tokens]]
    axes.set_xticks(range(tokens), names, rotation=90 if max(map(len, names)) > 1 else 0)
    axes.set_yticks(range(tokens), names)
    for place, rank in enumerate(described["significance"][:tokens]):
        for tick in (axes.get_xticklabels()[place], axes.get_yticklabels()[place]):
            tick.set_color(hue_of(rank))
            tick.set_fontweight("bold" if place >= described["prompt"] else "normal")
    if described["prompt"] < tokens:
        for line in (axes.axhline, axes.axvline):
            line(described["prompt"] - 0.5, color="#999999", linewidth=0.8, linestyle=(0, (3, 3)))
    return figure
