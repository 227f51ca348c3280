"""The report: one page on a result, with its figures inside, that opens without a network."""

from __future__ import annotations

import json
import logging
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from seqmill.base.files import refuse_to_replace, whole_or_absent
from seqmill.report.data import Sources, gather
from seqmill.report.sections import body

log = logging.getLogger(__name__)


def write_report(sources: Sources, output: Path) -> None:
    """Write the page. What it shows lies in it as JSON as well, in the element `data`: see `report_data.gather`.

    Raises:
        SeqmillError: a source is absent, damaged, or of another result than the embeddings.
    """
    given = (sources.embeddings, sources.records, sources.manifest, sources.index, sources.metadata, *sources.statuses)
    for source in given:
        if source:
            refuse_to_replace(source, output)
    data = gather(sources)
    with whole_or_absent(output) as temporary:
        temporary.write_text(_page(data), encoding="utf-8")
    points = data["points"]
    log.info("%s: %s of %s embeddings on its map", output, f"{points['shown']:,}", f"{points['total']:,}")


def _page(data: dict[str, Any]) -> str:
    folder = files("seqmill.report") / "assets"
    template, style, script = ((folder / name).read_text("utf-8") for name in ("page.html", "page.css", "map.js"))
    title = f"{Path(data['fasta']).name or 'embeddings'} by {data['attributes'].get('model', 'an unnamed model')}"
    return Template(template).substitute(
        title=escape(title),
        style=style.rstrip(),
        body=body(data, title),
        # Inside of a script element only `</` and `<!--` have a meaning; without `<` there is neither.
        data=json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
        script=script.rstrip(),
    )
