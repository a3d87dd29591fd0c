"""Pages of one file: every style, script and picture stands inside, so nothing is fetched and nothing can be lost."""

from dataclasses import dataclass
from importlib import resources
from typing import Any

from knowsam.report.drawing import for_page


@dataclass(frozen=True)
class Figure:
    """A drawing on a page.

    Attributes:
        svg: ready to stand in HTML.
        caption: plain words below it.
    """

    svg: str
    caption: str


def figure(svg: str, description: str) -> Figure:
    """A plot with the page's colours, and the same words for those who see it and those who do not.

    Args:
        svg: what ``drawing`` made.
        description: plain words.
    """
    return Figure(for_page(svg, description), description)


def render(template: str, **values: Any) -> str:
    """Fill one of the templates of this room; every text in ``values`` is escaped.

    Args:
        template: file, such as ``compare/comparison.html``.
        values: what it names; a name that is missing is an error.
    """
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    files = resources.files("knowsam.report")
    loader = FunctionLoader(lambda name: files.joinpath(name).read_text(encoding="utf-8"))
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(template).render(**values)
