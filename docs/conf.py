"""Configuration of Sphinx. `make docs` writes the sources with `python -m docs.generate site` before it runs Sphinx."""

import re
from pathlib import Path

_ROOT = Path(__file__).parents[1]

project = "bclip_fast"
author = copyright = "The bclip_fast authors"
release = re.search(r'__version__ = "(.+)"', (_ROOT / "bclip_fast/version.py").read_text())[1]
extensions = ["myst_parser", "sphinx_copybutton"]
source_suffix = {".md": "markdown"}
# Two hyphens begin a flag.
smartquotes = False

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4
# Pygments has no lexer for output, and TOML in text needs none.
highlight_language = "none"
copybutton_exclude = ".linenos, .gp"

html_theme = "furo"
html_title = "bclip_fast"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_js_files = [("site.js", {"defer": "defer"})]
html_copy_source = False
html_show_sphinx = False
# The pages load nothing from other hosts.
html_theme_options = {"navigation_with_keys": True}
pygments_style = "a11y-high-contrast-light"
pygments_dark_style = "a11y-high-contrast-dark"
python_display_short_literal_types = True
python_maximum_signature_line_length = 80
toc_object_entries_show_parents = "hide"
