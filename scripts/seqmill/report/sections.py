"""The sections of the report: figures to HTML."""

from __future__ import annotations

from html import escape
from typing import Any

from seqmill.base.words import decimal, many, percent
from seqmill.report.charts import bars, histogram, map_axes
from seqmill.report.shard_sections import computation, kinds_of
from seqmill.report.tables import facts, figure, table

LETTERS = {
    "lower_case": "lower case to upper case",
    "trailing_stop": "one * at the end stripped",
    "inner_stop_to_x": "* within a sequence to X",
    "j_to_x": "J to X",
    "u_to_t": "U to T",
    "n": "N kept, which the model does not know",
    "other_iupac": "other IUPAC codes kept, which the model does not know",
}
FATES = {
    "embedded": "embedded",
    "truncated": "truncated",
    "windowed": "in windows",
    "duplicate": "duplicate",
    "reused": "reused",
    "rejected": "rejected",
    "quarantined": "quarantined",
}
LEFT_OUT = {"rejected": "being too long", "quarantined": "having no finite embedding"}
PROVENANCE = (
    "source_sha256",
    "source_size",
    "model",
    "model_digest",
    "tokenizer",
    "long_sequences",
    "max_length",
    "window",
    "stride",
    "strand",
    "index_digest",
    "fingerprint",
)


def body(data: dict[str, Any], title: str) -> str:
    """Return the page's content as HTML."""
    sections = (_head(data, title), _records(data), _maps(data["points"]), computation(data), _audit(data["audit"]))
    return "\n".join(section for section in (*sections, _provenance(data)) if section)


def _head(data: dict[str, Any], title: str) -> str:
    attributes, counts = data["attributes"], data["counts"]
    version = attributes.get("seqmill_version")
    about = [f"Layer {data['layer']}, pooling {data['pooling']}", data["created"].replace("T", " ", 1)]
    about.append(f"seqmill {version}" if version else "")
    parts = [f"<h1>{escape(title)}</h1>", f'<p class="subtitle">{escape(" · ".join(filter(None, about)))}</p>']
    if warning := attributes.get("warning"):
        first, _, rest = str(warning).partition(": ")
        told = f"<strong>{escape(first)}</strong>{escape(rest[:1].upper() + rest[1:])}"
        parts.append(f'<div class="warning" role="alert">{told}</div>')
    if notes := _notes(data):
        items = "".join(f"<li>{escape(note)}</li>" for note in notes)
        parts.append(f'<div class="warning"><ul>{items}</ul></div>')
    figures = {
        "records": counts["records"],
        "unique sequences": counts["sequences"],
        "embeddings": counts["embeddings"],
        "dimensions": counts["dimensions"],
        f"{data['unit']} computed": counts.get("embedded"),
        "tokens": counts["tokens"],
    }
    shown = [f"<div><dt>{name}</dt><dd>{value:,}</dd></div>" for name, value in figures.items() if value is not None]
    parts.append(f'<dl class="figures">{"".join(shown)}</dl>')
    if data["outputs"] > 1:
        parts.append(f'<p class="note">The file holds {data["outputs"]} outputs; this page shows the first.</p>')
    return "\n".join(parts)


def _notes(data: dict[str, Any]) -> list[str]:
    """Return what a reader must not overlook, besides the warning about the weights."""
    notes = [
        f"{many(data['fates'][fate], 'record')} {fate}: left out, {why}"
        for fate, why in LEFT_OUT.items()
        if data["fates"].get(fate)
    ]
    for verdict in ("fail", "warn"):
        ranks = [str(shard["rank"]) for shard in data["shards"] if shard["audit"].get("verdict") == verdict]
        if ranks:
            notes.append(f"The audit's verdict on {many(len(ranks), 'shard')} is {verdict}: {', '.join(ranks[:20])}")
    if len(kinds := kinds_of(data)) > 1:
        notes.append(f"Computed by {len(kinds)} kinds of device or kernel: another run may differ by rounding")
    return notes


def _records(data: dict[str, Any]) -> str:
    parts, unit = ["<h2>Records</h2>"], data["unit"]
    if total := sum(data["fates"].values()):
        counts = {name: data["fates"].get(fate, 0) for fate, name in FATES.items()}
        rows = [(name, n, f"{n:,} ({percent(n / total)})" if n else "0") for name, n in counts.items()]
        parts.append(figure(bars(rows, "records by fate"), f"What became of {many(total, 'record')}."))
    if lengths := data["lengths"]:
        edges, limit = lengths["edges"], int(data["attributes"].get("max_length", 0))
        mark = (limit, f"max_length {limit:,}") if limit else None
        title = f"length ({unit})"
        chart = histogram(edges, lengths["counts"], title, lengths["of"], lengths["log"], mark)
        caption = (
            f"Lengths of all {lengths['of']}: {lengths['min']:,} to {lengths['max']:,} {unit}, median "
            f"{decimal(lengths['median'])}, mean {decimal(lengths['mean'])}."
            + (" The axis is logarithmic, as are the bins." if lengths["log"] else "")
        )
        parts.append(figure(chart, caption))
    if data["letters"]:
        rows = [(LETTERS.get(name, name), f"{count:,}") for name, count in data["letters"].items()]
        parts.extend(("<h3>Letters</h3>", table(("what was done", "letters"), rows)))
        if policy := data["attributes"].get("letter_policy"):
            parts.append(f'<p class="note">Policy: {escape(str(policy))}.</p>')
    return "\n".join(parts)


def _maps(points: dict[str, Any]) -> str:
    parts = ["<h2>Map of the embeddings</h2>"]
    if not points["maps"]:
        parts.append("<p>There is none: fewer than three embeddings, or all are alike.</p>")
        return "\n".join(parts)
    for number, drawn in enumerate(points["maps"]):
        axes, place = map_axes(*((axis["title"], axis["low"], axis["high"]) for axis in drawn["axes"]))
        where = ";".join(f"{name}:{place[name]:.3f}%" for name in ("left", "top", "width", "height"))
        if drawn["shown"] == points["total"]:
            told = f"{drawn['title']} of all {points['total']:,} embeddings"
        else:
            told = (
                f"{drawn['title']} of {drawn['shown']:,} of {points['total']:,} embeddings, evenly spread over the file"
            )
        hover = "id" if points["ids"] else "row in the file"
        parts.append(
            f'<figure><div class="legend"></div><div class="plot">{axes}<canvas data-map="{number}" '
            f'data-inset="{place["inset"] / 100:.5f}" style="{where}"></canvas></div>'
            f"<figcaption>{escape(told)}. Point at one to see its {hover}.</figcaption></figure>"
        )
    parts.append('<noscript><p class="note">The points are drawn by a script.</p></noscript>')
    parts.append('<div id="tip" hidden></div><div id="ring" hidden></div>')
    return "\n".join(parts)


def _audit(audit: dict[str, Any]) -> str:
    if not audit:
        return ""
    found = [("sequences recomputed", f"{audit.get('sequences', 0):,}"), ("by", str(audit.get("reference", "")))]
    if "worst_cosine" in audit:
        found.append(("worst cosine", f"{audit['worst_cosine']:.9f}"))
        found.append(("worst relative error", f"{audit['worst_relative_error']:.2e}"))
    about = (
        '<p class="note">Each shard has a few of its sequences recomputed by a reference, in float32. The relative '
        "error is the length of the difference (L2), by that of the reference.</p>"
    )
    return "\n".join(("<h2>Audit</h2>", facts(found), about))


def _provenance(data: dict[str, Any]) -> str:
    known = {"FASTA": data["fasta"], **{name: data["attributes"].get(name) or "" for name in PROVENANCE}}
    rows = [
        (name.replace("_", " "), f"{value:,}" if isinstance(value, int) else str(value))
        for name, value in known.items()
    ]
    rows.append(("versions", ", ".join(f"{name} {version}" for name, version in data["versions"].items() if version)))
    return "\n".join(("<h2>Provenance</h2>", facts(rows, code=True)))
