"""A report as one self-contained HTML page."""

import re
from base64 import b64encode
from pathlib import Path
from urllib.parse import unquote

from markdown_it import MarkdownIt


PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.55 system-ui, sans-serif; color: #1b1b1b; background: #fff; margin: 0 auto; max-width: 62rem;
       padding: 1rem 1.5rem 4rem; }}
h1 {{ font-size: 1.7rem; }} h2 {{ margin-top: 2.6rem; border-bottom: 1px solid #ddd; padding-bottom: .2rem; }}
img {{ max-width: 100%; height: auto; }}
.table {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; margin: .4rem 0 1.2rem; }}
th, td {{ padding: .3rem .7rem; border-bottom: 1px solid #e4e4e4; white-space: nowrap; }}
th {{ border-bottom: 2px solid #888; }} tr:hover td {{ background: #f5f8fc; }}
code {{ background: #f2f2f2; padding: .05rem .3rem; border-radius: 3px; font-size: .9em; overflow-wrap: anywhere; }}
nav {{ font-size: .92rem; columns: 2; margin: 1rem 0; }} nav a {{ display: block; color: #0072b2; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def html_page(markdown: str, folder: Path) -> str:
    """
    Markdown as HTML with its pictures embedded.

    Args:
        markdown (`str`): may have tables; raw HTML is escaped.
        folder (`Path`): of the PNG files.
    """
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)
    body = re.sub(r'<img src="([\w .%+-]+\.png)"', lambda match: _embedded(folder, match[1]), body)
    body = body.replace("<table>", '<div class="table"><table>').replace("</table>", "</table></div>")
    headings = re.findall(r"<h2>(.*?)</h2>", body)
    links = "".join(f'<a href="#part-{k}">{heading}</a>' for k, heading in enumerate(headings))
    for k, heading in enumerate(headings):
        body = body.replace(f"<h2>{heading}</h2>", f'<h2 id="part-{k}">{heading}</h2>', 1)
    body = body.replace("</h1>", f"</h1>\n<nav>{links}</nav>", 1)
    title = re.search(r"<h1>(.*?)</h1>", body)
    return PAGE.format(title=re.sub("<.*?>", "", title[1]) if title else "Report", body=body)


def _embedded(folder: Path, name: str) -> str:
    content = b64encode((folder / unquote(name)).read_bytes()).decode()
    return f'<img src="data:image/png;base64,{content}"'
