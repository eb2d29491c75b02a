"""The audit's page: one file that opens offline and runs nothing from outside."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from lcmem_cli import __version__

if TYPE_CHECKING:
    import jinja2

TEMPLATE_NAME = "report.html.j2"
MAX_PAIRS = 5000
"""Flagged pairs that the page holds."""
MAX_ALTERED = 10
_MOST_IN_ONE = 0.5
"""Share of a set in one bin from which heights are drawn on a root scale."""
_ROOT_TICKS = (0.0, 0.01, 0.05, 0.2, 0.5, 1.0)
_NUM_BINS = 48
_WORD_STARTS = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
"""Where words begin in a name such as ``JPEGCompression``."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pictures:
    """The pictures of the page.

    Attributes:
        uris: data URIs, ``None`` where a picture cannot be shown.
        generated: place among them of each generated image, by its name in the result.
        training: place of each training image.
        laid_over: place of each generated image as it lies on its training image, where both show
            one picture.
        real: place of the real images that are shown, by name.
    """

    uris: Sequence[str | None]
    generated: Mapping[str, int]
    training: Mapping[str, int]
    laid_over: Mapping[str, int]
    real: Mapping[str, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distribution:
    """Best-match scores to draw.

    Attributes:
        generated: ``[n]`` on a linear scale.
        null: ``[m]`` on the same scale.
        threshold: on the same scale, if there is one.
        as_logit: whether the scale is the logit of the scores, which are probabilities.
    """

    generated: NDArray[np.float64]
    null: NDArray[np.float64]
    threshold: float | None
    as_logit: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bar:
    """One bin of the plot: its range and the share of each set in it, and its place in pixels."""

    low: float
    high: float
    generated: float
    null: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plot:
    """The geometry of the distribution plot, in the units of its view box."""

    width: ClassVar[int] = 960
    height: ClassVar[int] = 300
    left: ClassVar[int] = 56
    right: ClassVar[int] = 16
    top: ClassVar[int] = 16
    bottom: ClassVar[int] = 52
    bars: tuple[Bar, ...]
    generated_path: str
    null_path: str
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    threshold_x: float | None
    label: str
    is_root: bool


def render_report(
    result: Any,
    pictures: Pictures,
    distribution: Distribution,
    *,
    curve: Path | None = None,
    max_lines: int = 200,
) -> str:
    """Return the page as HTML.

    Names are escaped wherever they occur; scripts and styles are allowed by their hashes alone.

    Args:
        result: an ``AuditResult`` (this package knows results only by their fields). Of its flagged
            images the first ``MAX_PAIRS`` are shown.
        pictures: of these, their matches, and the most-copied training images.
        distribution: scores to draw.
        curve: plot of the groups, as PNG.
        max_lines: the most lines of a list (duplicates, unreadable images) to write out.
    """
    pairs = [
        {
            "q": printable(match.query),
            "m": printable(match.match),
            "id": printable(match.match_id),
            "s": match.score,
            "p": match.p_value,
            "k": match.tier,
            "e": match.edit,
            "a": pictures.generated[match.query],
            "b": pictures.training[match.match],
            "w": pictures.laid_over.get(match.query),
            "o": [round(side, 4) for place in match.outline for side in place],
        }
        for match in result.flagged[:MAX_PAIRS]
    ]
    assets = {name: _asset(name) for name in ("report.css", "report.js")}
    assets["report.css"] += _sheet_heads(result)
    template = environment().get_template(TEMPLATE_NAME)
    return template.render(
        result=result,
        num_pairs=len(pairs),
        pictures=pictures,
        plot=draw_distribution(distribution),
        curve=None if curve is None else _png_uri(curve),
        data=script_json(
            {
                "word": result.word.capitalize(),
                "pairs": pairs,
                "pictures": list(pictures.uris),
            }
        ),
        altered=altered_among(result.null),
        css=assets["report.css"],
        js=assets["report.js"],
        policy=content_policy(assets["report.js"], assets["report.css"]),
        max_lines=max_lines,
        version=__version__,
    )


def _sheet_heads(result: Any) -> str:
    """Return the style that puts date, sets and settings at the head of each printed sheet."""
    sets = [f"{result.word} {Path(result.generated.source).name}"]
    sets.append(f"training {Path(result.training.source).name}")
    if result.held_out is not None:
        sets.append(f"held-out {Path(result.held_out.source).name}")
    kind = {"fpr": "false-positive rate", "fdr": "false-discovery rate"}[result.rule.kind]
    about = f"{result.times.started[:10]} | {', '.join(sets)}"
    settings = f"{Path(result.detector).name} | {kind} {100 * result.rule.rate:.3g} %"
    return (
        f"@page {{ @top-left {{ content: {_css_text(about)} }} "
        f"@top-right {{ content: {_css_text(settings)} }} }}\n"
    )


def _css_text(text: str) -> str:
    """Return a string of CSS; what is no letter or number is escaped, so that nothing ends it."""
    shown = printable(text)
    return '"' + "".join(c if c.isalnum() else f"\\{ord(c):x} " for c in shown[:120]) + '"'


def altered_among(null: Any) -> list[Any]:
    """Return the first images that left the null as altered copies, which are shown as pictures.

    Args:
        null: a ``NullSummary``.
    """
    return [item for item in null.removed if item.kind == "altered"][:MAX_ALTERED]


def content_policy(script: str, style: str) -> str:
    """Return a Content-Security-Policy that allows this script, this style and data pictures."""
    return (
        "default-src 'none'; img-src data:; "
        f"script-src {_source_hash(script)}; style-src {_source_hash(style)}; "
        "base-uri 'none'; form-action 'none'"
    )


def script_json(value: Any) -> str:
    """Return JSON that may stand inside a ``<script>`` element, whatever text it holds."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def printable(text: str) -> str:
    """Return a name that can be shown: control and direction characters become escapes."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode("ascii")
        for c in text
    )


def draw_distribution(distribution: Distribution) -> Plot:
    """Turn scores into the outline of two histograms over the same bins.

    The height of a bin is the share of its set, so that sets of different sizes compare; where most
    stand in one bin it is the root of that, so that single images still show.
    """
    values = np.concatenate([distribution.generated, distribution.null])
    if distribution.threshold is not None:
        values = np.append(values, distribution.threshold)
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    edges = _bin_edges(low, high, distribution.threshold)
    low, high = float(edges[0]), float(edges[-1])
    shares = [_shares(part, edges) for part in (distribution.generated, distribution.null)]
    peak = max(0.01, *(float(share.max()) for share in shares))

    inner_width = Plot.width - Plot.left - Plot.right
    inner_height = Plot.height - Plot.top - Plot.bottom

    def x(value: float) -> float:
        return round(Plot.left + (value - low) / (high - low) * inner_width, 2)

    is_root = peak > _MOST_IN_ONE

    def y(share: float) -> float:
        height = math.sqrt(share / peak) if is_root else share / peak
        return round(Plot.height - Plot.bottom - height * inner_height, 2)

    def outline(share: NDArray[np.float64]) -> str:
        steps = [f"M{x(low)},{y(0)}"]
        for index, value in enumerate(share):
            steps.append(f"V{y(float(value))}H{x(float(edges[index + 1]))}")
        return "".join([*steps, f"V{y(0)}Z"])

    bars = tuple(
        Bar(
            low=_score(float(a), distribution.as_logit),
            high=_score(float(b), distribution.as_logit),
            generated=float(g),
            null=float(n),
        )
        for a, b, g, n in zip(edges[:-1], edges[1:], *shares, strict=True)
        if g or n
    )
    steps_up = [s for s in _ROOT_TICKS if s <= peak] if is_root else _ticks(0.0, peak, 4)
    if distribution.as_logit:
        ticks = _probability_ticks(low, high, 8)
    else:
        ticks = _labelled(_ticks(low, high, 8))
    return Plot(
        bars=bars,
        generated_path=outline(shares[0]),
        null_path=outline(shares[1]),
        x_ticks=tuple((x(tick), label) for tick, label in ticks),
        y_ticks=tuple((y(tick), f"{100 * tick:g} %") for tick in steps_up),
        is_root=is_root,
        threshold_x=None if distribution.threshold is None else x(distribution.threshold),
        label="best-match score" + (", on a logit scale" if distribution.as_logit else ""),
    )


def _bin_edges(low: float, high: float, threshold: float | None) -> NDArray[np.float64]:
    """Return edges of bins of equal width, one of them the threshold."""
    if threshold is None:
        return np.linspace(low, high, _NUM_BINS + 1)
    width = (high - low) / _NUM_BINS
    left = math.ceil((threshold - low) / width - 1e-9)
    right = math.ceil((high - threshold) / width - 1e-9)
    return np.asarray(threshold + width * np.arange(-left, right + 1), dtype=np.float64)


def _shares(scores: NDArray[np.float64], edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the share of scores in each bin; a score at an edge is in the bin below."""
    inside = np.clip(scores, edges[0], edges[-1])
    counts = np.histogram(-inside, -edges[::-1])[0][::-1]
    return np.asarray(counts / max(1, len(scores)), dtype=np.float64)


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Return at most about ``count`` round numbers within a range."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def _score(value: float, as_logit: bool) -> float:
    return 1 / (1 + math.exp(-value)) if as_logit else value


def _probability_ticks(low: float, high: float, count: int) -> list[tuple[float, str]]:
    """Return at most about ``count`` round probabilities, each at its logit, with their labels."""
    lowest, highest = _score(low, True), _score(high, True)
    small = [*(10.0**-power for power in range(9, 1, -1)), 0.02, 0.05]
    tenths = [place / 10 for place in range(1, 10)]
    far = [*small, *tenths, *(1 - share for share in reversed(small))]

    def apart(shares: list[float]) -> list[tuple[float, str]]:
        ticks: list[tuple[float, str]] = []
        for share in shares:
            if lowest <= share <= highest and 0 < share < 1:
                place = math.log(share / (1 - share))
                label = f"{share:.10g}"
                if not ticks or (
                    place - ticks[-1][0] >= (high - low) / (1.5 * count) and label != ticks[-1][1]
                ):
                    ticks.append((place, label))
        return ticks

    even = _ticks(lowest, highest, count) if highest > lowest else []
    return max(apart(far), apart(even), key=len)


def _labelled(ticks: list[float]) -> list[tuple[float, str]]:
    """Return ticks with labels of as many digits as tell neighbours apart."""
    digits = 6
    if len(ticks) > 1:
        largest = max(abs(tick) for tick in ticks)
        digits = max(digits, 1 + math.ceil(math.log10(largest / (ticks[1] - ticks[0]))))
    return [(tick, f"{tick:.{digits}g}") for tick in ticks]


def _png_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


def _source_hash(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"


def _asset(name: str) -> str:
    return (resources.files("lcmem_cli") / "assets" / name).read_text(encoding="utf-8")


@cache
def environment() -> jinja2.Environment:
    """Return what fills templates of the assets; names are escaped wherever they occur."""
    import jinja2

    made = jinja2.Environment(
        loader=jinja2.FunctionLoader(_asset),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["printable"] = printable
    made.filters["percent"] = lambda share: f"{100 * share:.3g}\N{NO-BREAK SPACE}%"
    made.filters["prose"] = lambda text: printable(text).replace(" %", "\N{NO-BREAK SPACE}%")
    made.filters["number"] = lambda value: f"{value:,}"
    made.filters["spaced"] = lambda name: _WORD_STARTS.sub(" ", name)
    made.filters["short"] = lambda value: "–" if value is None else f"{value:.4g}"
    return made
