"""A report as one self-contained HTML page."""

import re
from base64 import b64encode
from pathlib import Path
from urllib.parse import unquote

from markdown_it import MarkdownIt

from pvm.style import CSS


PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>
{css}</style>
</head>
<body>
{body}
</body>
</html>
"""
REPORT_CSS = """\
body { max-width: 62rem; padding-bottom: 4rem; }
h2 { display: inline; font-size: 1.1rem; }
.first { background: var(--panel); border: 1px solid var(--line); border-left: 6px solid var(--accent);
  border-radius: 10px; padding: .8rem 1rem; margin: 1rem 0; font-size: 1.08rem; }
.first ol { margin: .5rem 0; padding-left: 1.4rem; }
.first li { margin: .5rem 0; }
.first p { font-size: .85rem; color: var(--quiet); margin: 0; }
details { border-bottom: 1px solid var(--line); }
summary { padding: .6rem 0; cursor: pointer; }
.picture { overflow-x: auto; }
.picture img { display: block; width: 100%; min-width: 36rem; max-width: 54rem; background: var(--paper);
  border-radius: 8px; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; margin: .4rem 0 1.2rem; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { border-bottom: 2px solid var(--quiet); }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--page); }
code { background: var(--panel); padding: .05rem .3rem; border-radius: 3px; font-size: .9em;
  overflow-wrap: anywhere; }
@media print { ::details-content { content-visibility: visible; } }
"""


def html_page(markdown: str, folder: Path) -> str:
    """
    Markdown as HTML with its pictures embedded. The first section stands out, the second is open, the others are
    folded.

    Args:
        markdown (`str`): may have tables; raw HTML is escaped.
        folder (`Path`): of the PNG files.
    """
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)
    body = re.sub(
        r'<p><img src="([\w .%+-]+\.png)"(.*?)></p>', lambda match: _embedded(folder, match[1], match[2]), body
    )
    body = body.replace("<table>", '<div class="table"><table>').replace("</table>", "</table></div>")
    opening, *sections = re.split("(?=<h2>)", body)
    for k, section in enumerate(sections):
        if k == 0:
            sections[k] = f'<section class="first">\n{section}</section>\n'
        else:
            heading, text = section.split("\n", 1)
            sections[k] = f"<details{' open' * (k == 1)}>\n<summary>{heading}</summary>\n{text}</details>\n"
    title = re.search(r"<h1>(.*?)</h1>", body)
    title = re.sub("<.*?>", "", title[1]) if title else "Report"
    return PAGE.format(title=title, css=CSS + REPORT_CSS, body=opening + "".join(sections))


def _embedded(folder: Path, name: str, attributes: str) -> str:
    content = b64encode((folder / unquote(name)).read_bytes()).decode()
    return f'<div class="picture"><img src="data:image/png;base64,{content}"{attributes}></div>'
