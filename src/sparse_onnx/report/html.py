"""Reports as pages that need nothing else: one HTML file, no network, no other file, no script to be read.

All text comes from files that nobody vouches for, so the templates escape everything, and the content policy in a page
allows its own style and script, by their hashes, and nothing more.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from markupsafe import Markup

from sparse_onnx.printable import printable
from sparse_onnx.report.comparison import comparison_rows, comparison_verdict
from sparse_onnx.report.notes import run_notes
from sparse_onnx.report.view.page import report_view
from sparse_onnx.units import format_bytes, format_error, format_ms, format_number, format_share
from sparse_onnx.yaml_text import write_yaml

__all__ = ["render_comparison", "render_html", "write_html"]


def write_html(report: Mapping[str, Any], path: Path) -> None:
    """Write ``report`` (the content of ``report.json``) as a page to ``path``, in UTF-8."""
    path.write_text(render_html(report), encoding="utf-8")


def render_html(report: Mapping[str, Any]) -> str:
    """The page for ``report``, the content of ``report.json``. Values that were not measured may be None."""
    return _render(
        "report.html.j2",
        report=report,
        notes=run_notes(report),
        recipe=write_yaml(report["recipe"]),
        **report_view(report),
    )


def render_comparison(comparison: Mapping[str, Any]) -> str:
    """The page for what :func:`sparse_onnx.report.comparison.compare_reports` found."""
    changed, total = len(comparison["decisions"]), comparison["layers"]["b"]["all"]
    close = sum(row["close"] for row in comparison["decisions"])
    decisions = f"{changed} of {total} layers ship otherwise" if changed else "Every layer ships as before"
    return _render(
        "comparison.html.j2",
        comparison=comparison,
        verdict=comparison_verdict(comparison),
        rows=comparison_rows(comparison),
        figures_answer="What was measured in both runs",
        decisions_answer=decisions
        + (f", {close} of them {'was a close call' if close == 1 else 'were close calls'}" if close else ""),
        recipe_answer=_differing(comparison["recipe"], "The recipes are the same", "in the recipe"),
        environment_answer=_differing(
            comparison["environment"],
            "Both ran on the same machine and software",
            "of machine and software",
        ),
    )


def _differing(rows: Sequence[Any], same: str, where: str) -> str:
    if not rows:
        return same
    return f"{len(rows)} other values {where}" if len(rows) > 1 else f"One other value {where}"


def _render(template: str, **values: Any) -> str:
    import jinja2

    engine = jinja2.Environment(
        loader=jinja2.FunctionLoader(_template),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    engine.filters.update(
        breakable=_breakable,
        if_known=lambda value: "" if value is None else value,
        bytes=format_bytes,
        error=format_error,
        ms=format_ms,
        number=format_number,
        share=format_share,
    )
    style, script = _template("page.css"), _template("page.js")
    page = engine.get_template(template).render(
        style=Markup(style),
        script=Markup(script),
        policy=f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'; "
        "form-action 'none'",
        **values,
    )
    return printable(page)


def _breakable(text: str) -> Markup:
    """``text``, which may go on in the next line after a dot or slash, if that stands in no number."""
    return Markup("<wbr>").join(re.split(r"(?<=[./])(?=\D)|(?<=\D[./])(?=\d)", text))


def _template(name: str) -> str:
    return resources.files("sparse_onnx.report").joinpath("templates", name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """How a content policy names an inline text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
