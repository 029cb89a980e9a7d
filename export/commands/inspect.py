"""`mnif inspect`: what is in a bundle, and what its plans are made of."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from export.device.bundle import ENGINES, BundleFolder, entry
from export.device.cli import Parser, columns, printable, run_command
from export.device.json_files import check_form
from export.device.plans import PlanRefused, read_sidecar

_KERNEL = {
    "name": str,
    "kind": str,
    "inputs": [str],
    "outputs": [str],
    "nodes": [str],
    "profile": range(1 << 16),
}
_SHOWN = {  # of a sidecar
    "facts": {
        "builder": str,
        "builder_version": str,
        "gpu": (str, None),
        "driver": (str, int, None),
        "compute_capabilities": [str],
    },
    "report": {"seconds": float, "built_at": str, "typing": str, "flags": [str], "kernels": [_KERNEL]},
}


def make_parser() -> Parser:
    """Makes the command's flags."""
    parser = Parser("inspect", "Show a bundle's graphs and plans, or with --plan what one plan is made of.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--bundle", type=Path, help="the bundle's folder")
    what.add_argument("--plan", type=Path, help="a plan, engines/NAME.plan; its sidecar lies beside it")
    parser.add_argument("--kernels", action="store_true", help="list every kernel of every plan")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns 0, or 2 after one line about what is wrong."""
    return run_command(make_parser(), arguments, _inspect)


def _inspect(options: Any) -> int:
    if options.plan is not None:
        _print(plan_lines(options.plan, kernels=True))
        return 0
    folder = BundleFolder(options.bundle)
    _print(bundle_lines(folder))
    plans = sorted((folder.path / ENGINES).glob("*.plan"))
    for plan in plans:
        try:
            lines = plan_lines(plan, options.kernels)
        except PlanRefused as reason:
            lines = [f"{plan.stem}: refused, {reason.reason}"]
        _print(["", *lines])
    if not plans:
        print("\nno plans here; mnif build makes them")
    return 0


def _print(lines: Iterable[str]) -> None:
    """Prints lines of which each may hold names from a manifest or a sidecar."""
    print("\n".join(map(printable, lines)))


def bundle_lines(folder: BundleFolder) -> list[str]:
    """Lists what the manifest says: the model, the grid, and a line for every graph."""
    from export.readme import pixel_steps

    manifest = folder.manifest
    files = entry(manifest, "files", kind=dict)
    grid = manifest["grid"]
    lines = [
        f"{folder.path}: {manifest['signal']}, {' × '.join(map(str, grid['resolution']))}, "
        f"{grid['cells']} cells per axis, {len(files)} files, "
        f"{sum(each['bytes'] for each in files.values()) / 1e6:.2f} MB",
        f"made by {manifest['package']['name']} {manifest['package']['version']}, decoder "
        f"{manifest['decoder_fingerprint'][:16]}",
        "",
    ]
    rows = [("graph", "kind", "precision", "storage", "MB", "PSNR dB", "off by", "pixel steps", "inputs → outputs")]
    for name, graph in sorted(entry(manifest, "graphs", kind=dict).items()):
        psnr = "–" if graph["psnr"] is None else f"{graph['psnr']:.1f}"
        size = f"{files[graph['file']]['bytes'] / 1e6:.2f}"
        tensors = " → ".join(", ".join(map(_tensor, graph[side])) for side in ("inputs", "outputs"))
        error = _largest_error(manifest, name)
        steps = None if error is None else pixel_steps(graph, manifest, error)
        loss = ("–" if error is None else f"{error:.1e}", "–" if steps is None else f"{steps:.2f}")
        rows.append((name, graph["kind"], graph["precision"], graph["storage"], size, psnr, *loss, tensors))
    return lines + columns(rows)


def _largest_error(manifest: dict[str, Any], name: str) -> float | None:
    """Looks up how far a graph's worst value was off at the export; None in bundles that do not say so."""
    try:
        check_form(manifest.get("measured"), {name: {"max_abs": float}})
    except ValueError:
        return None
    return float(manifest["measured"][name]["max_abs"])


def plan_lines(path: Path, kernels: bool) -> list[str]:
    """Lists what a plan's sidecar says, each kernel with what was fused into it if asked for.

    Raises:
        PlanRefused: the sidecar is missing, was not written here, or by another version.
    """
    sidecar = read_sidecar(path)
    try:
        check_form(sidecar, _SHOWN, "it")
    except ValueError as error:
        raise PlanRefused(path, f"its sidecar is of another version ({error})") from None
    facts, report = sidecar["facts"], sidecar["report"]
    capabilities = ", ".join(facts["compute_capabilities"])
    where = f"on {facts['gpu']}, CUDA {facts['driver']}" if facts["gpu"] else "without a GPU: a compile gate"
    lines = [
        f"{path.stem}: {facts['builder']} {facts['builder_version']} for compute capability {capabilities}, {where}",
        f"  {sidecar['plan']['bytes'] / 1e6:.2f} MB, {report['seconds']:.2f} s on {report['built_at']}, typing "
        f"{report['typing']}, flags {', '.join(report['flags']) or 'none'}, TF32 off",
        f"  {kernel_summary(report['kernels'])}",
    ]
    if kernels and report["kernels"]:
        rows = [("kernel", "kind", "types", "nodes of the graph")]
        for kernel in report["kernels"]:
            types = f"{_types(kernel['inputs'])} → {_types(kernel['outputs'])}"
            rows.append((kernel["name"], kernel["kind"], types, ", ".join(kernel["nodes"])))
        lines += ["", *columns(rows)]
    return lines


def kernel_summary(kernels: list[dict[str, Any]]) -> str:
    """Counts the kernels of each kind, and what they write, for one call: those of the last profile."""
    if not kernels:
        return "the builder did not print its kernels"
    profiles = 1 + max(kernel["profile"] for kernel in kernels)
    kernels = [kernel for kernel in kernels if kernel["profile"] == profiles - 1]
    kinds = _counted(kernel["kind"] for kernel in kernels)
    written = _counted(kind for kernel in kernels for kind in kernel["outputs"])
    nodes = {node for kernel in kernels for node in kernel["nodes"]}
    return (
        f"{len(kernels)} kernels a call ({kinds}) do {len(nodes)} nodes of the graph and write {written}; "
        f"{profiles} profile{'s' if profiles > 1 else ''}"
    )


def _counted(names: Iterable[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in Counter(names).most_common())


def _tensor(tensor: dict[str, Any]) -> str:
    return f"{tensor['name']} [{', '.join(map(str, tensor['shape']))}]"


def _types(names: list[str]) -> str:
    return "+".join(sorted(set(names))) or "–"
