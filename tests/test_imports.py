"""No module needs itself to be imported, not even for a type: what may import what stands in pyproject.toml."""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("mnif", "latent_prior", "export", "evals")


def module_files() -> dict[str, Path]:
    """Every module of ours by its dotted name; a package is its ``__init__``."""
    files = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


def imported_names(module: str, path: Path) -> Iterator[str]:
    """What a file imports at module level, under TYPE_CHECKING too: dotted names of modules or of what is in them."""
    statements = list(ast.parse(path.read_text()).body)
    while statements:
        node = statements.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If | ast.Try):
            statements += [*node.body, *node.orelse]


def cycles(graph: Mapping[str, set[str]]) -> list[set[str]]:
    """The strongly connected components of more than one node (Tarjan, 1972), and nodes that point at themselves."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[set[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph[node]:
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            place = stack.index(node)
            component = set(stack[place:])
            del stack[place:]
            if len(component) > 1 or node in graph[node]:
                found.append(component)

    for node in graph:
        if node not in index:
            visit(node)
    return found


def test_cycles_are_found() -> None:
    graph = {"a": {"b"}, "b": {"c", "d"}, "c": {"b"}, "d": {"e"}, "e": {"e"}}
    assert sorted(map(sorted, cycles(graph))) == [["b", "c"], ["e"]]


def test_no_module_needs_itself() -> None:
    files = module_files()
    assert {"mnif", "mnif.models.siren", "export.device.bundle", "evals.images"} <= files.keys()
    graph = {
        module: {name for name in imported_names(module, path) if name in files and name != module}
        for module, path in files.items()
    }
    assert {"export.device.bundle"} <= graph["export.device.cli"]
    assert cycles(graph) == []
