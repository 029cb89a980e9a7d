"""The command line: `mnif COMMAND …`, one table of commands, each imported only when it is called."""

import atexit
import os
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from mnif.utils.errors import UserError, printable
from mnif.utils.process import Terminated, escaped_output, sigterm_raises

COMMANDS = {
    "fit": ("mnif.commands.fit", "FitArguments", "learn bases and latents from data (stage one)"),
    "compare-fit": (
        "mnif.commands.compare_fit",
        "CompareArguments",
        "learn in several ways at equal compute, and compare",
    ),
    "grow": ("mnif.commands.grow", "GrowArguments", "add bases to a model for new data, and keep what it knows"),
    "lineage": ("mnif.commands.lineage", "LineageArguments", "show what a model was grown from, and go back to it"),
    "pilot": ("evals.commands.pilot", "PilotArguments", "try sizes in small runs, and say which to train"),
    "encode": ("mnif.commands.encode", "EncodeArguments", "find the latents of new data on frozen bases"),
    "decode": ("mnif.commands.decode", "DecodeArguments", "show what latents stand for: pictures, meshes, views"),
    "prior": ("latent_prior.commands.prior", "PriorArguments", "learn the distribution of the latents (stage two)"),
    "distill": ("latent_prior.commands.distill", "DistillArguments", "teach a student to draw in one to four steps"),
    "sample": ("latent_prior.commands.sample", "SampleArguments", "draw new pictures"),
    "demo-app": ("latent_prior.commands.demo_app", "DemoAppArguments", "serve a local page to try a model on"),
    "export": ("export.commands.export", "ExportArguments", "write ONNX graphs and weights for an edge device"),
    "build": ("export.device.build", "make_parser", "build TensorRT plans for a bundle's graphs"),
    "verify": (
        "export.device.verify",
        "make_parser",
        "check a bundle's graphs in every backend against the exact reference",
    ),
    "bench": ("export.device.bench", "make_parser", "time a bundle's graphs in every backend"),
    "inspect": ("export.commands.inspect", "make_parser", "show what is in a bundle and what its plans are made of"),
    "eval": ("evals.commands.eval", "EvalArguments", "measure samples and reconstructions beside their controls"),
    "monitor": ("evals.commands.monitor", "MonitorArguments", "tell whether data are still of the kind a model knows"),
    "report": ("evals.commands.report", "ReportArguments", "write one HTML page that shows a run"),
    "atlas": ("evals.commands.atlas", "AtlasArguments", "write one HTML page that shows what each basis does"),
}
"""Each command: its module, what stands there for its flags (a dataclass, or on boards a parser), and its purpose."""

SHELLS = ("bash", "zsh", "fish")


def main(arguments: list[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: without the program's name; default: the process's own.

    Returns:
        The exit code: 0 done, 1 a check that failed, 2 a mistake the user can mend (one line on stderr), 130 stopped
        by Ctrl-C, 141 nobody reads what is printed, 143 by SIGTERM.
    """
    try:
        try:
            return _answer(sys.argv[1:] if arguments is None else arguments)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # such as `mnif fit --help | head`: nobody reads on, which is no mistake
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _answer(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if arguments[0] == "--version":
        from mnif import __version__

        print(f"mnif {__version__}")
        return 0
    name, rest = arguments[0], arguments[1:]
    if name != "--completion" and name not in COMMANDS:
        print(f'mnif: no command "{name}"; choose one of {", ".join(COMMANDS)}', file=sys.stderr)
        return 2
    if (foreign := _foreign_file()) is not None:
        found = f"{printable(foreign)} is found in the place of mnif's own package of that name"
        print(f"mnif: {found}; rename it, or take its folder out of PYTHONPATH", file=sys.stderr)
        return 2
    atexit.register(_leave_process_group)
    return _print_completion(rest) if name == "--completion" else _run(name, rest)


def _run(name: str, arguments: list[str]) -> int:
    """Runs a command, and tells in a line how it ended if that was no success."""
    module, flags, _ = COMMANDS[name]
    try:
        with sigterm_raises(), escaped_output():
            command = import_module(module)
            if flags == "make_parser" and {"-h", "--help"} & {*arguments}:
                from mnif.utils.args import print_help

                print_help(command.make_parser())
            code: int | None = command.main(arguments)
    except UserError as error:
        print(f"mnif {name}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        raise
    except OSError as error:
        where, what = error.filename or "file system", error.strerror or error
        print(f"mnif {name}: {printable(where)}: {printable(what)}", file=sys.stderr)
        return 2
    except Terminated:
        print(f"mnif {name}: terminated", file=sys.stderr)
        return 143
    except KeyboardInterrupt:
        print(f"mnif {name}: stopped", file=sys.stderr)
        return 130
    return code or 0


def _print_completion(arguments: list[str]) -> int:
    if len(arguments) != 1 or arguments[0] not in SHELLS:
        print(f"mnif --completion: name a shell, one of {', '.join(SHELLS)}", file=sys.stderr)
        return 2
    from mnif.utils.args import flags_of_command, flags_of_parser, print_completion

    commands = {}
    for name, (module, flags, purpose) in COMMANDS.items():
        home = getattr(import_module(module), flags)
        commands[name] = (flags_of_command(home) if isinstance(home, type) else flags_of_parser(home()), purpose)
    print_completion(commands, arguments[0])
    return 0


def _foreign_file() -> str | None:
    """What is found of somebody else's by the name of one of our packages, which lie beside this one."""
    beside = Path(__file__).resolve().parents[1]
    for name in ("latent_prior", "export", "evals"):
        spec = find_spec(name)
        if spec is not None and spec.origin and Path(spec.origin).resolve() != beside / name / "__init__.py":
            return spec.origin
    return None


def _leave_process_group() -> None:
    """Under torchrun: its threads abort an interpreter that ends before they do, now and then."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _usage() -> str:
    lines = [f"  {name:11} {purpose}" for name, (_, _, purpose) in COMMANDS.items()]
    return "\n".join(
        [
            "mnif: train a generative model of neural fields and run it on an edge GPU",
            "",
            "usage: mnif COMMAND [flags]      mnif COMMAND --help lists a command's flags",
            "       mnif --completion bash    prints what makes bash (or zsh, or fish) complete them",
            "",
            *lines,
        ]
    )
