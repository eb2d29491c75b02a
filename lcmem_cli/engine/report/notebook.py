"""An audit as a notebook shows it: the finding, the plot, and the surest pairs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lcmem_cli.engine.data.images import load_image
from lcmem_cli.engine.errors import LcmemError
from lcmem_cli.engine.report.html import (
    Distribution,
    draw_distribution,
    environment,
    printable,
)
from lcmem_cli.engine.report.thumbnails import data_uri

TEMPLATE_NAME = "notebook.html.j2"
MAX_PAIRS = 6
_SIDE = 160


def render_audit(result: Any, scores: Distribution) -> str:
    """Return the result as a piece of HTML without scripts.

    Args:
        result: an ``AuditResult`` (this package knows results only by their fields).
        scores: to draw.
    """
    pairs = [
        {
            "match": match,
            "pictures": [
                (printable(name), _thumbnail(Path(images.folder) / name))
                for images, name in (
                    (result.generated, match.query),
                    (result.training, match.match),
                )
            ],
        }
        for match in result.flagged[:MAX_PAIRS]
    ]
    template = environment().get_template(TEMPLATE_NAME)
    return template.render(result=result, plot=draw_distribution(scores), pairs=pairs, side=_SIDE)


def _thumbnail(path: Path) -> str | None:
    """Return a small picture; none where there is no such file, as of an audit of features."""
    try:
        return data_uri(load_image(path, size=_SIDE), _SIDE)
    except (LcmemError, OSError):
        return None
