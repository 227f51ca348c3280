"""The report: one page about a result, which contains all its data and needs no network."""

import logging
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from seqmill.base.files import refuse_shared, whole_or_absent
from seqmill.base.words import decimal, duration, many, percent
from seqmill.report.charts import bars, histogram, map_axes, spans, steps
from seqmill.report.data import Sources, gather
from seqmill.report.sections import by_shard, prepare

log = logging.getLogger(__name__)


def write_report(sources: Sources, output: Path) -> None:
    """Write the page. Its data is also in it as JSON, in the element `data`: see `seqmill.report.data.gather`.

    Raises:
        SeqmillError: a source is missing, damaged, or belongs to another result than the embeddings.
    """
    given = (sources.embeddings, sources.records, sources.manifest, sources.index, sources.metadata, *sources.statuses)
    refuse_shared([output], filter(None, given))
    data = gather(sources)
    with whole_or_absent(output) as temporary:
        temporary.write_text(_page(data), encoding="utf-8")
    points = data["points"]
    log.info("%s: %s of %s embeddings on its map", output, f"{points['shown']:,}", f"{points['total']:,}")


def _page(data: dict[str, Any]) -> str:
    environment = Environment(
        loader=PackageLoader("seqmill.report", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "allow_nan": False, "separators": (",", ":")}
    environment.filters.update(thousands="{:,}".format, decimal=decimal, duration=duration, many=many, percent=percent)
    environment.globals.update(
        bars=bars, by_shard=by_shard, histogram=histogram, map_axes=map_axes, spans=spans, steps=steps
    )
    assets = files("seqmill.report") / "assets"
    style, script = (assets.joinpath(name).read_text("utf-8").rstrip() for name in ("page.css", "map.js"))
    return environment.get_template("page.html").render(**data, **prepare(data), data=data, style=style, script=script)
