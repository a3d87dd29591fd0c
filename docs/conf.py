"""How the documentation is built: ``make docs``. Nothing is fetched, in the build or by the browser that shows it."""

import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE / "_ext")]

import knowsam  # noqa: E402 - the checkout's own, whatever is installed

project = "knowsam"
author = "the knowsam authors"
version = release = knowsam.__version__
language = "en"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "api_pages",
    "config_keys",
    "figures",
    "mathml",
    "notebook",
]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build", "_ext", "figures", "slurm"]

myst_enable_extensions = ["attrs_block", "colon_fence", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 90
napoleon_numpy_docstring = False
napoleon_use_param = False  # one entry may describe several arguments, `mean, std: ...`
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_custom_sections = ["Source"]
add_module_names = False

highlight_language = "text"  # of a block that names none: what one types, or a program prints

html_theme = "furo"
html_title = f"knowsam {release}"
html_static_path = ["_static"]
html_css_files = ["knowsam.css"]
html_show_sphinx = False
html_show_copyright = False
html_copy_source = False
html_math_renderer = "mathml"
pygments_style = "a11y-light"
pygments_dark_style = "a11y-high-contrast-dark"
copybutton_prompt_text = "$ "


def leave_out_absent_pages(app, docname: str, source: list[str]) -> None:
    """In the table of contents a page that is named with a star may be absent: Sphinx would warn of it."""
    if docname == "index":
        starred = re.compile(r"(?m)^(\w+)\*\n")
        source[0] = starred.sub(lambda found: found[0] if any(HERE.glob(f"{found[1]}*.md")) else "", source[0])


def setup(app) -> None:
    """Called by Sphinx."""
    app.connect("source-read", leave_out_absent_pages)
