"""The command line: `mnif COMMAND …`, one table of commands, each imported only when it is called."""

import atexit
import os
import sys
from importlib import import_module

from mnif.utils.errors import UserError, printable
from mnif.utils.process import Terminated, escaped_output, sigterm_raises

COMMANDS = {
    "fit": ("mnif.commands.fit:main", "learn bases and latents from data (stage one)"),
    "compare-fit": (
        "mnif.commands.compare_fit:main",
        "learn in several ways at equal compute, and compare",
    ),
    "encode": ("mnif.commands.encode:main", "find the latents of new data on frozen bases"),
    "decode": ("mnif.commands.decode:main", "show what latents stand for: pictures, meshes, views"),
    "prior": ("latent_prior.commands.prior:main", "learn the distribution of the latents (stage two)"),
    "distill": ("latent_prior.commands.distill:main", "teach a student to draw in one to four steps"),
    "sample": ("latent_prior.commands.sample:main", "draw new pictures"),
    "demo-app": ("latent_prior.commands.demo_app:main", "serve a local page to try a model on"),
    "export": ("export.commands.export:main", "write ONNX graphs and weights for an edge device"),
    "build": ("export.commands.build:main", "build TensorRT plans for a bundle's graphs"),
    "verify": ("export.commands.verify:main", "check a bundle's graphs in every backend against the exact reference"),
    "bench": ("export.commands.bench:main", "time a bundle's graphs in every backend"),
    "inspect": ("export.commands.inspect:main", "show what is in a bundle and what its plans are made of"),
    "eval": ("evals.commands.eval:main", "measure samples and reconstructions beside their controls"),
    "report": ("evals.commands.report:main", "write one HTML page that shows a run"),
}


def main(arguments: list[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: without the program's name; default: the process's own.

    Returns:
        The exit code: 0 done, 1 a check that failed, 2 a mistake the user can mend (one line on stderr), 130 stopped
        by Ctrl-C, 141 nobody reads what is printed, 143 by SIGTERM.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if arguments[0] == "--version":
        from mnif import __version__

        print(f"mnif {__version__}")
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        print(f'mnif: no command "{name}"; choose one of {", ".join(COMMANDS)}', file=sys.stderr)
        return 2
    module, _, function = COMMANDS[name][0].partition(":")
    atexit.register(_leave_process_group)
    try:
        with sigterm_raises(), escaped_output():
            code: int | None = getattr(import_module(module), function)(rest)
    except UserError as error:
        print(f"mnif {name}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # such as `mnif fit --help | head`: nobody reads on, which is no mistake
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
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


def _leave_process_group() -> None:
    """Under torchrun: its threads abort an interpreter that ends before they do, now and then."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _usage() -> str:
    lines = [f"  {name:11} {purpose}" for name, (_, purpose) in COMMANDS.items()]
    return "\n".join(
        [
            "mnif: train a generative model of neural fields and run it on an edge GPU",
            "",
            "usage: mnif COMMAND [flags]      mnif COMMAND --help lists a command's flags",
            "",
            *lines,
        ]
    )
