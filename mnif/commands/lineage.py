"""`mnif lineage`: shows the generations that a model was grown through, and goes back to one of them."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mnif.utils.args import parse_arguments
from mnif.utils.errors import UserError, printable
from mnif.utils.files import check_writable, folder_written_atomically

if TYPE_CHECKING:
    from mnif.models.growth import Generation
    from mnif.models.mnif_model import MNIFModel


@dataclass(kw_only=True)
class LineageArguments:
    """Show what a model was grown from, with the figures of every generation; or go back to one of them."""

    model: Path
    """The model folder, RUN/model."""
    rollback_to: str | None = None
    """The generation to go back to: the beginning of its fingerprint, or its number, 0 for the first."""
    output_dir: Path | None = None
    """Gets the run of that generation: its model, and what it had besides its bases as far as RUN/inherited has it."""


def main(arguments: list[str]) -> None:
    """Runs `mnif lineage`."""
    show_or_roll_back(parse_arguments(LineageArguments, arguments, "mnif lineage"))


def show_or_roll_back(arguments: LineageArguments) -> None:
    """Prints the lineage of ``arguments.model``, or writes the generation that is asked for.

    Raises:
        UserError: the model cannot be read, has no such generation or has it no more, or the folder is not empty.
    """
    if (arguments.rollback_to is None) != (arguments.output_dir is None):
        raise UserError("--rollback_to and --output_dir: give both or none")
    output = arguments.output_dir
    if output is not None:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise UserError(f"{output} is not empty; choose another --output_dir")
        check_writable(output)

    from mnif.models.io import load_component
    from mnif.models.mnif_model import MNIFModel
    from mnif.training.inheritance import lineage_of

    decoder = load_component(MNIFModel, arguments.model, "decoder")
    lineage = lineage_of(decoder, arguments.model)
    if arguments.rollback_to is None or output is None:
        print("\n".join(lineage_lines(decoder, lineage)))
        return
    _roll_back(decoder, arguments.model, _generation(lineage, arguments.rollback_to), output)


def _generation(lineage: list[Generation], name: str) -> int:
    """Finds the generation that a number or the beginning of a fingerprint names.

    Raises:
        UserError: there is none, there are several, or it is the model itself.
    """
    found = [number for number, one in enumerate(lineage) if name and one["fingerprint"].startswith(name)]
    if name.isdecimal() and int(name) < len(lineage):
        found = [int(name)]
    known = ", ".join(one["fingerprint"][:12] for one in lineage[:-1])
    if len(lineage) == 1:
        raise UserError(f"--rollback_to {name}: the model was not grown; there is no earlier generation")
    if len(found) != 1 or found[0] == len(lineage) - 1:
        raise UserError(f"--rollback_to {name}: name one of the earlier generations, {known}")
    return found[0]


def _roll_back(decoder: MNIFModel, model: Path, generation: int, output: Path) -> None:
    """Writes an earlier generation to ``output/model``, with its latents, encoder and prior where they were kept."""
    from mnif.models.io import save_component
    from mnif.models.lineage import ancestor, fingerprints
    from mnif.training.inheritance import inherited_folder

    earlier, known = ancestor(decoder, generation), fingerprints(decoder)
    kept = inherited_folder(model.parent, known[generation])
    with folder_written_atomically(output) as folder:
        if kept.is_dir():
            shutil.copytree(kept, folder, dirs_exist_ok=True)
        for before in known[:generation]:
            if (source := inherited_folder(model.parent, before)).is_dir():
                shutil.copytree(source, inherited_folder(folder, before))
        save_component(folder / "model", "decoder", earlier)
    beside = "with what else it had" if kept.is_dir() else f"its bases alone; {kept}, which has the rest, is not there"
    print(f"{output}: generation {generation}, decoder {known[generation][:12]}, {beside}")


def lineage_lines(decoder: MNIFModel, lineage: list[Generation]) -> list[str]:
    """Words for each generation: what it learned from and was made by, and its figures on every data set known."""
    config, growths = decoder.config, decoder.config.growths
    bases = [decoder.generations[0], *(f"+ {growth['num_bases']}" for growth in growths)]
    numbers = [config.latent_dim - sum(growth["latent_dim"] for growth in growths)]
    numbers += [f"+ {growth['latent_dim']}" for growth in growths]
    lines = []
    for number, one in enumerate(lineage):
        data = f"{one['data'] or 'data that are not known'} ({one['data_fingerprint'][:12] or 'no fingerprint'})"
        how = "" if number == 0 else ", all before as it was" if one["frozen"] else ", all before moved by replay"
        what = f"{bases[number]} bases, {numbers[number]} numbers in a latent{how}"
        branch = "   " * (number - 1) + "└─ " if number else ""
        lines.append(f"{branch}{one['fingerprint'][:12]}  {data}: {what}")
        indent = "   " * (number + 1)
        if one["command"]:
            lines.append(f"{indent}{one['command']}" + (f"  (mnif {one['version']})" if one["version"] else ""))
        for name, figures in one["figures"].items():
            shown = ", ".join(f"{figure} {value:g}" for figure, value in figures.items())
            lines.append(f"{indent}{name or 'its data'}: {shown}")
        if number and one["frozen"]:
            names = dict.fromkeys(before["data"] for before in lineage[:number] if before["data"] != one["data"])
            lines += [f"{indent}{name}: as before, the same bytes for old latents" for name in names]
    return [printable(line) for line in lines]
