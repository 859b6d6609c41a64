"""Pages of reports in a real browser: layout, contrast, sorting and filtering, print, and that nothing leaves them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from sparse_onnx.report.html import render_html

Report = dict[str, Any]
Show = Callable[..., Any]

pytestmark = pytest.mark.browser

WIDE = """[...document.querySelectorAll("main, main *")]
  .filter(e => e.getClientRects().length && !e.closest("thead") && !(e instanceof SVGElement && e.tagName != "svg"))
  .filter(e => e.getBoundingClientRect().right > document.documentElement.clientWidth + 0.5)
  .map(e => `${e.tagName} ${e.className} ${e.textContent.slice(0, 40)}`)"""

# Ratio of luminances as in WCAG 2, of every element with text of its own, and of texts in charts.
CONTRAST = """(() => {
  const channels = text => text.match(/[\\d.]+/g).slice(0, 3).map(c => c / 255).map(
    c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  const luminance = text => { const [r, g, b] = channels(text); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const behind = e => {
    for (; e; e = e.parentElement) {
      const colour = getComputedStyle(e).backgroundColor;
      if (!colour.endsWith(", 0)")) return colour;
    }
  };
  const found = [];
  for (const e of document.querySelectorAll("body *:not(script)")) {
    if (![...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())) continue;
    const style = getComputedStyle(e);
    const [a, b] = [luminance(e instanceof SVGElement ? style.fill : style.color), luminance(behind(e))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) found.push(`${e.tagName} ${e.textContent.trim().slice(0, 30)} ${ratio.toFixed(2)}`);
  }
  return found;
})()"""


@pytest.fixture
def page(full_report: Report) -> str:
    return render_html(full_report)


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_nothing_is_wider_than_the_screen(show: Show, page: str, width: int) -> None:
    browser = show(page, width=width)
    assert browser.evaluate("innerWidth") == width
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    assert browser.evaluate(WIDE) == []


def test_what_is_too_wide_would_be_found(show: Show) -> None:
    browser = show("<!doctype html><main><pre style='width: 900px'>wide</pre><p>narrow</p></main>", width=768)
    assert browser.evaluate("document.documentElement.scrollWidth") > 768
    assert browser.evaluate(WIDE) == ["PRE  wide"]


def test_long_names_fit_on_a_phone(show: Show, full_report: Report) -> None:
    long = "a_rather_long_name_without_any_dot_in_it_as_some_exporters_write_them_0123456789"
    full_report.update(source=f"{long}.onnx", command=f"sparse-onnx optimize {long * 3}")
    for row in full_report["layers"]:
        row.update(name=long, module=f"{long}.{long}", reason=long)
    full_report["declined"][0].update(place=long, reason=long)
    browser = show(render_html(full_report), width=360)
    assert browser.evaluate("document.documentElement.scrollWidth") == 360
    assert browser.evaluate(WIDE) == []


def test_no_complaint_and_no_request(show: Show, page: str) -> None:
    browser = show(page)
    assert browser.complaints() == []
    assert len(browser.requests()) == 1
    assert browser.requests()[0].startswith("file:")


def test_injected_script_and_style_do_nothing(show: Show, full_report: Report) -> None:
    text = "</script></style></title><script>window.hacked = 1</script><style>main { display: none }</style>"
    full_report.update(source=text, command=text)
    for row in full_report["layers"]:
        row.update(module=text, reason=text)
    browser = show(render_html(full_report))
    assert browser.complaints() == []
    # Even if the escaping failed, the policy would hold.
    browser = show(render_html(full_report).replace("<main>", f"<main>{text}"))
    assert browser.evaluate("window.hacked === undefined")
    assert browser.evaluate("getComputedStyle(document.querySelector('main')).display") == "block"
    assert len(browser.complaints()) == 2


NAMES = """[...document.querySelectorAll("table.sortable tbody tr")]
  .filter(r => !r.hidden).map(r => r.cells[0].innerText)"""


def column(browser: Any, label: str) -> list[str]:
    """The cells of one column of the table of layers, in the order shown."""
    cells = f"document.querySelectorAll('table.sortable tbody td[data-label=\"{label}\"]')"
    found: list[str] = browser.evaluate(f"[...{cells}].map(c => c.innerText.trim())")
    return found


def press(browser: Any, head: str) -> str:
    """Press a head of the table of layers; how it is sorted then."""
    sort: str = browser.evaluate(
        f"""(() => {{
          const heads = [...document.querySelectorAll("table.sortable thead th")];
          const head = heads.find(h => h.textContent.trim() === {head!r});
          head.querySelector("button").click();
          return heads.map(h => h.getAttribute("aria-sort")).filter(s => s).join() ;
        }})()"""
    )
    return sort


def test_sorting_by_a_number(show: Show, full_report: Report) -> None:
    values = {2: 12.0, 5: 9.5, 7: None, 9: 100.0}
    for index, value in values.items():
        full_report["layers"][index]["times"]["dense"] = value
    browser = show(render_html(full_report))
    assert press(browser, "Dense") == "descending"
    shown = column(browser, "dense")
    assert shown[:3] == ["100.0 ms", "12.0 ms", "9.500 ms"]
    assert shown[-1] == "-"
    assert press(browser, "Dense") == "ascending"
    assert column(browser, "dense") == shown[::-1]


def test_sorting_by_a_word(show: Show, page: str) -> None:
    browser = show(page)
    assert press(browser, "Layer") == "descending"
    assert press(browser, "Layer") == "ascending"
    names = browser.evaluate(NAMES)
    assert names[0].startswith("bert.encoder.layer.0.")
    assert names[-1].startswith("bert.encoder.layer.11."), "numbers count as numbers"


def test_filtering(show: Show, page: str) -> None:
    browser = show(page)
    state = "document.querySelector('[role=status]').textContent"
    assert browser.evaluate(state) == "36 of 36"

    def type_in(text: str) -> list[str]:
        browser.evaluate(
            f"(() => {{ const f = document.querySelector('input[type=search]'); f.value = {text!r};"
            "f.dispatchEvent(new Event('input')); })()"
        )
        names: list[str] = browser.evaluate(NAMES)
        return names

    found = type_in("Intermediate DENSE below")
    assert len(found) == 2
    assert all("intermediate" in name for name in found)
    assert browser.evaluate(state) == "2 of 36"
    assert type_in("no such layer") == []
    assert len(type_in("")) == 36


def test_without_scripts_everything_is_there(show: Show, page: str) -> None:
    browser = show(page, scripts=False)
    assert len(browser.evaluate(NAMES)) == 36
    assert browser.evaluate("document.querySelectorAll('button, input').length") == 0
    assert browser.complaints() == []


@pytest.mark.parametrize("kind", ["good", "check", "bad"])
def test_contrast_is_enough_in_light_and_dark(show: Show, full_report: Report, kind: str) -> None:
    full_report["targets"][0]["quiet"] = kind != "check"
    full_report["goal"]["met"] = kind != "bad"
    source = render_html(full_report)
    assert f'class="verdict {kind}"' in source
    backgrounds = set()
    for dark in (False, True):
        browser = show(source, dark=dark)
        assert browser.evaluate(CONTRAST) == []
        backgrounds.add(browser.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(backgrounds) == 2


def test_too_little_contrast_would_be_found(show: Show) -> None:
    browser = show(
        "<body style='background: #fff'><p style='color: #777'>grey</p><p style='color: #767676'>enough</p>"
    )
    assert [entry.split()[1] for entry in browser.evaluate(CONTRAST)] == ["grey"]


def test_print(show: Show, page: str) -> None:
    browser = show(page)
    pages = len(re.findall(rb"/Type\s*/Page\b", browser.pdf()))
    assert 3 <= pages <= 8
    browser = show(page, width=680, media="print")  # A4 without its margins
    assert browser.evaluate(WIDE) == []
    assert browser.evaluate("document.documentElement.scrollWidth") == 680
    assert browser.evaluate("document.querySelector('.controls').getClientRects().length") == 0
    assert browser.evaluate(
        "[...document.querySelectorAll('details p')].every(p => p.checkVisibility() && p.getClientRects().length)"
    )
    table = "getComputedStyle(document.querySelector('table.sortable')).display"
    assert browser.evaluate(table) == "table", "no cards on paper"
