"""
How pages and pictures look: their colours, the CSS that all pages share, matplotlib's settings.

The colours are those of Okabe and Ito, which the colour-blind tell apart. Pages are light or dark, as the reader's
system is; pictures are light in both, on a ground of their own.
"""

BLUE, VERMILLION, ORANGE, SKY = "#0072B2", "#D55E00", "#E69F00", "#56B4E9"
COLOURS = ("#000000", BLUE, VERMILLION, "#009E73", "#CC79A7", ORANGE, SKY, "#999999")  # of models, in this order
TEXT, QUIET, PAPER = "#1B1B1B", "#5D5D5D", "#FFFFFF"

CSS = f"""\
:root {{
  color-scheme: light dark;
  --text: light-dark({TEXT}, #E8E8E8);
  --quiet: light-dark({QUIET}, #A6A6A6);
  --page: light-dark({PAPER}, #16181B);
  --panel: light-dark(#F6F7F9, #1F2226);
  --line: light-dark(#D9DCE0, #3A3F45);
  --accent: light-dark({BLUE}, {SKY});
  --on-accent: light-dark({PAPER}, #111111);
  --contrast: light-dark({VERMILLION}, {ORANGE});
  --attention: {ORANGE};
  --paper: {PAPER};
}}
* {{ box-sizing: border-box; }}
body {{
  font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page);
  margin: 0 auto; max-width: 74rem; padding: 1rem;
}}
h1 {{ font-size: 1.5rem; line-height: 1.25; margin: 0; }}
a {{ color: var(--accent); }}
:focus-visible {{ outline: 2px solid var(--accent); outline-offset: 1px; }}
"""

PICTURES = {
    "text.parse_math": False,  # names, groups and tokens may contain dollars
    "text.color": TEXT,
    "axes.labelcolor": TEXT,
    "axes.edgecolor": QUIET,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "savefig.dpi": 160,
}
