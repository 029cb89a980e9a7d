"""The templates of pages: those of the report, and those of another package that build upon them."""

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


def page_templates(*packages: str) -> Environment:
    """Makes the environment of the templates in ``evals/report/page`` and in the folder ``page`` of other packages.

    In them ``source`` puts a style sheet or script into the page as it stands.
    """
    loader = ChoiceLoader([PackageLoader(package, "page") for package in ("evals.report", *packages)])
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    environment.globals["source"] = lambda name: Markup(loader.get_source(environment, name)[0])
    return environment
