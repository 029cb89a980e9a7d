"""Pages from the templates in ``page/``: one file each, with styles, scripts and charts inside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from evals.charts import as_svg

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.figure import Figure


def rendered(template: str, package: str = "evals.report", **context: Any) -> str:
    """Fills in a template of ``page/``; ``source`` puts a style sheet or script into the page as it stands.

    Args:
        template: its file.
        package: whose folder ``page`` has it, if it is another one, which builds upon these templates.
        context: what stands in it, by name.
    """
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    loader = ChoiceLoader([PackageLoader(name, "page") for name in ("evals.report", package)])
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    environment.globals["source"] = lambda name: Markup(loader.get_source(environment, name)[0])
    return environment.get_template(template).render(**context)


def as_svgs(charts: Mapping[str, Figure | None]) -> dict[str, Markup]:
    """Draws the charts that there are as elements of a page."""
    from markupsafe import Markup

    return {name: Markup(as_svg(chart, name)) for name, chart in charts.items() if chart is not None}
