"""`mnif decode`: shows what latents stand for."""

from __future__ import annotations

import hashlib
import re
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from mnif.signals.output_flags import OutputFlags
from mnif.utils.args import parse_arguments
from mnif.utils.devices import DeviceFlags, chosen_device, sent
from mnif.utils.errors import UserError, check_at_least, printable
from mnif.utils.files import flush_everything, remove_leftovers, sha256_of_file, write_json
from mnif.utils.json_files import read_json
from mnif.utils.output_folders import holds_folder
from mnif.utils.pixels import image_grid, save_image
from mnif.utils.process import command_line, peak_memory_megabytes, progress_bar
from mnif.utils.resumable import SEALS, Seals

if TYPE_CHECKING:
    from mnif.latents.table import LatentTable

_OWN_FILES = ("grid", "grid.png", "metrics.json", "decode.json")  # names that no latent may have
_OVERVIEW, _OVERVIEW_PIXELS = 64, 256
_LONGEST_NAME = 160  # bytes; file systems allow 255, suffixes included


@dataclass(kw_only=True)
class DecodeArguments(OutputFlags, DeviceFlags):
    """Show what latents stand for: pictures, meshes, views; the same command again continues where it was stopped."""

    model: Path
    """The model folder, RUN/model, or avatars, which comes along."""
    latents: Path
    """A latents.safetensors of `mnif fit` or `mnif encode`."""
    output_dir: Path
    """Gets files named by the latents' ids, grid.png, metrics.json and decode.json."""
    ids: list[str] | None = None
    """Which latents."""
    num: int | None = None
    """How many latents, from the first on; default: 16."""


def main(arguments: list[str]) -> None:
    """Runs `mnif decode`."""
    decode(parse_arguments(DecodeArguments, arguments, "mnif decode"))


@holds_folder("output_dir", "decode")
def decode(arguments: DecodeArguments) -> None:
    """Writes what latents stand for to ``arguments.output_dir``.

    Raises:
        UserError: model or latents cannot be read or do not belong together, a flag is out of range or does not belong
            to the model's signal, the folder is another command's or holds something else, or no shape has a surface.
    """
    import torch

    from mnif.latents.table import LatentTable
    from mnif.models.io import load_component
    from mnif.models.mnif_model import MNIFModel
    from mnif.signals.outputs import writer_from_flags
    from mnif.signals.registry import signal_of_model

    device = chosen_device(arguments.device)
    decoder = load_component(MNIFModel, arguments.model, "decoder")
    signal = signal_of_model(decoder)
    writer = writer_from_flags(arguments, signal)
    fingerprint = decoder.fingerprint()
    table = LatentTable.load_for(decoder, arguments.latents)
    rows = _rows(arguments, table)
    names = safe_names(table.ids)
    decoder.to(device)

    output, started = arguments.output_dir, time.perf_counter()
    requested = {"decoder": fingerprint, "latents": sha256_of_file(arguments.latents)} | asdict(writer)
    files = {row: [output / file for file in writer.files(names[row])] for row in rows}
    _check_same_decoding(output, requested, [path for paths in files.values() for path in paths])
    for folder in {output, output / SEALS, *(path.parent for paths in files.values() for path in paths)}:
        remove_leftovers(folder)
    write_json(output / "decode.json", requested)
    seals = Seals(output)
    missing = {row: set(files[row]) - seals.sound(f"{row:09d}", files[row]) for row in rows}
    missing = {row: paths for row, paths in missing.items() if paths}
    unseen: dict[str, str] = {}
    bar = progress_bar(total=len(rows), initial=len(rows) - len(missing), desc="decoding", unit=signal.noun)
    with torch.no_grad(), bar:
        for row, paths in missing.items():
            for path in paths:
                path.unlink(missing_ok=True)  # writers keep what they find
            latent = sent(table.latents[row : row + 1], device)
            why = writer.write(decoder, signal, latent, output, names[row])
            if why:
                unseen[table.ids[row]] = why
            seals.seal(f"{row:09d}", files[row], flush=False)
            bar.update()
    _report(arguments, signal.noun, len(rows), len(missing), unseen, time.perf_counter() - started)
    _save_overview(output / "grid.png", [files[row][0] for row in rows if table.ids[row] not in unseen])
    flush_everything()


def _report(
    arguments: DecodeArguments, noun: str, asked: int, missing: int, unseen: dict[str, str], seconds: float
) -> None:
    """Says what was decoded, and of what there is nothing to show.

    Raises:
        UserError: of nothing there is.
    """
    for id, why in unseen.items():
        print(f"{printable(id)}: the {noun} is {why}, it has no surface; skipped")
    if len(unseen) == asked:
        raise UserError(
            f"{arguments.latents}: every {noun} asked for is empty or full, none has a surface; "
            "choose other --ids or train the model for longer"
        )
    output, made = arguments.output_dir, missing - len(unseen)
    metrics: dict[str, Any] = {"seconds": round(seconds, 2), "without_surface": unseen}
    metrics |= {"command": command_line(), "peak_rss_mb": peak_memory_megabytes()}
    if not made:
        if not (output / "metrics.json").exists():  # of one that was killed at its end
            write_json(output / "metrics.json", metrics)
        print(f"{output}: all {asked - len(unseen)} are there already")
        return
    write_json(output / "metrics.json", metrics | {"images_per_second": made / seconds})
    print(f"{output}: {made} latents decoded, {made / seconds:.1f} a second")


def safe_names(ids: Iterable[str]) -> list[str]:
    """Makes a file name for each id: what may trouble a file system becomes "_".

    Names that were too long or would be the same as another's, in small letters or capitals, end on part of the id's
    SHA-256, so that a name depends on the ids alone and not on which of them are written.
    """
    ids = list(ids)
    plain = [re.sub(r"^\.|[^\w.,+=@() -]|[. ]$", "_", id) or "_" for id in ids]
    taken = Counter(name.casefold() for name in plain) + Counter(_OWN_FILES)
    names = []
    for id, name in zip(ids, plain, strict=True):
        if taken[name.casefold()] > 1 or len(name.encode()) > _LONGEST_NAME:
            digest = hashlib.sha256(id.encode()).hexdigest()[:8]
            name = f"{name.encode()[:_LONGEST_NAME].decode(errors='ignore')}-{digest}"
        names.append(name)
    return names


def _rows(arguments: DecodeArguments, table: LatentTable) -> list[int]:
    """Finds the rows of the latents that ``--ids`` or ``--num`` name."""
    if arguments.ids is None:
        count = 16 if arguments.num is None else arguments.num
        check_at_least(1, num=count)
        rows = list(range(min(count, len(table.ids))))
    else:
        if arguments.num is not None:
            raise UserError("give either --ids or --num")
        rows = table.rows_of(dict.fromkeys(arguments.ids), arguments.latents)
    if not rows:
        raise UserError(f"{arguments.latents}: no latents were asked for")
    return rows


def _check_same_decoding(output: Path, requested: dict[str, Any], wanted: list[Path]) -> None:
    """Refuses to fill up a folder whose files came from other latents or settings."""
    record = output / "decode.json"
    if not record.exists():
        for path in wanted:
            if path.exists():
                raise UserError(f"{path} is not of `mnif decode`; choose another --output_dir")
    elif any(output.rglob("*.png")):
        before = read_json(record)
        for name in sorted(before.keys() | requested.keys()):
            if before.get(name) != requested.get(name):
                raise UserError(
                    f"{output} holds what was decoded with {name} {before.get(name)!s:.12}, "
                    f"not {requested.get(name)!s:.12}; choose another --output_dir or empty it"
                )


def _save_overview(path: Path, images: list[Path]) -> None:
    """Lays the first images side by side on white, small ones enlarged and large ones reduced."""
    shown = []
    for image_path in images[:_OVERVIEW]:
        with Image.open(image_path) as image:
            image.thumbnail((_OVERVIEW_PIXELS, _OVERVIEW_PIXELS))
            opaque = image.convert("RGBA")
        shown.append(np.asarray(Image.alpha_composite(Image.new("RGBA", opaque.size, "white"), opaque).convert("RGB")))
    scale = max(1, 64 // shown[0].shape[0])
    save_image(path, image_grid(shown, columns=min(len(shown), 8), scale=scale))
