"""One learned latent for every instance, for as many instances as memory holds.

A step reads and changes the rows of its batch only, so its cost does not depend on the number of instances. The rows
are dealt to lanes, row r to lane r modulo the batch size; every batch has one row of each lane
(:class:`mnif.data.batches.ShuffledBatches`), and with several processes each owns an equal share of the lanes: their
latents and optimizer states live in that process alone and are never exchanged.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mnif.utils.devices import sent
from mnif.utils.errors import UserError
from mnif.utils.files import save_tensors

_FORMAT = "mnif-latent-rows/1"
_STATE = ("latents", "mean", "square", "steps")


class LatentEmbedding:
    """A process's share of the latents, with the state of an Adam that moves only the rows it is given.

    Args:
        instances: N, rows over all processes.
        latent_dim: D.
        lanes: the batch size over all processes, a multiple of ``processes``.
        learning_rate: of Adam (Kingma and Ba, 2015); the moments of a row wait while it is not in a batch, as in
            :class:`torch.optim.SparseAdam`. Unlike there every row counts its own steps, so a row whose first turn
            comes late starts with a step as long as any other's (SparseAdam's would be three times as long).
        seed: row r starts with the same N(0, 0.1²) numbers whatever the number of processes.
        process: this process.
        processes: how many there are.
        device: where the rows live.
    """

    def __init__(
        self,
        instances: int,
        latent_dim: int,
        lanes: int,
        learning_rate: float,
        seed: int,
        process: int = 0,
        processes: int = 1,
        device: torch.device | str = "cpu",
        betas: tuple[float, float] = (0.9, 0.999),
    ):
        self.instances, self.lanes, self.learning_rate, self.betas = instances, lanes, learning_rate, betas
        self.own = range(process * lanes // processes, (process + 1) * lanes // processes)
        self.process, self.processes = process, processes
        per_lane = -(-instances // lanes)
        # Rows of one lane lie together; which lanes a process owns does not change what they start with.
        self.latents = torch.empty(len(self.own), per_lane, latent_dim, device=device)
        for index, lane in enumerate(self.own):
            # Not [seed, lane] alone: these are the numbers that sample `lane` of this seed is drawn from, and whoever
            # samples with the seed of the training would get the training instances back.
            generator = np.random.default_rng(np.random.SeedSequence([seed, lane], spawn_key=(2,)))
            numbers = generator.standard_normal((per_lane, latent_dim), dtype=np.float32)
            self.latents[index] = sent(torch.from_numpy(numbers), self.latents.device)
        self.latents *= 0.1
        self.mean = torch.zeros_like(self.latents)
        self.square = torch.zeros_like(self.latents)
        self.steps = torch.zeros(self.latents.shape[:2], dtype=torch.int32, device=device)
        self._taken: list[tuple[tuple[Tensor, Tensor], Tensor]] = []

    def take(self, rows: Tensor) -> Tensor:
        """Takes latents out, to collect a gradient for :meth:`step`.

        Args:
            rows: [B], of this process's lanes, none twice.

        Returns:
            [B, D].
        """
        place = self._place(rows)
        taken = self.latents[place].requires_grad_()
        self._taken.append((place, taken))
        return taken

    def read(self, rows: Tensor) -> Tensor:
        """Reads the latents of ``rows``, [B, D], without a gradient."""
        return self.latents[self._place(rows)]

    def owns(self, rows: Tensor) -> Tensor:
        """Says which rows are of this process's lanes, [B] bool."""
        lane = rows % self.lanes
        return (lane >= self.own.start) & (lane < self.own.stop)

    @torch.no_grad()
    def step(self, factor: float = 1.0, scale: float = 1.0) -> None:
        """Moves the rows taken since the last step, by the gradients they have collected.

        Args:
            factor: multiplies the learning rate, for a schedule.
            scale: what the loss was multiplied with; the gradients are divided by it.
        """
        place, gradient = self._collected()
        gradient = gradient / scale
        first, second = self.betas
        self.steps[place] += 1
        count = self.steps[place][:, None].float()
        mean = self.mean[place].lerp_(gradient, 1 - first)
        square = self.square[place].lerp_(gradient.square(), 1 - second)
        self.mean[place], self.square[place] = mean, square
        direction = mean / (1 - first**count) / ((square / (1 - second**count)).sqrt() + 1e-8)
        self.latents[place] -= self.learning_rate * factor * direction
        self.forget()

    def forget(self) -> None:
        """Leaves the rows taken since the last step where they are."""
        self._taken.clear()

    def save(self, folder: Path) -> None:
        """Writes this process's share to ``folder``, one file for each process."""
        layout = {"format": _FORMAT, "instances": str(self.instances), "lanes": str(self.lanes)}
        tensors = {name: getattr(self, name).cpu() for name in _STATE}
        path = folder / f"latent-rows-{self.process:05d}-of-{self.processes:05d}.safetensors"
        save_tensors(tensors, path, layout | {"first_lane": str(self.own.start)})

    def load(self, folder: Path) -> None:
        """Reads this process's share back, whatever number of processes wrote it.

        Raises:
            UserError: lanes are missing or damaged, or the rows are of another data set, batch size or latent size.
        """
        for lane, file, index in self._stored(folder, self.own):
            for name in _STATE:
                getattr(self, name)[lane - self.own.start].copy_(file.get_slice(name)[index])

    def read_all(self, folder: Path) -> Tensor:
        """Reads the latents of every row, [N, D], from the files that all processes wrote to ``folder``.

        Raises:
            UserError: as :meth:`load`.
        """
        latents = torch.empty(self.instances, self.latents.shape[2])
        for lane, file, index in self._stored(folder, range(self.lanes)):
            rows = latents[lane :: self.lanes]
            rows.copy_(file.get_slice("latents")[index][: len(rows)])  # a lane's last row may be one too many
        return latents

    def _collected(self) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Collects places and gradients of the rows taken since the last step; a row taken twice gets the sum."""
        gradients = [taken.grad for _, taken in self._taken if taken.grad is not None]
        if len(gradients) != len(self._taken) or not gradients:
            raise RuntimeError("latents were taken, but no loss was differentiated through them")
        if len(gradients) == 1:
            return self._taken[0][0], gradients[0]
        lanes, places = (torch.cat(parts) for parts in zip(*(place for place, _ in self._taken), strict=True))
        # A place that is there several times has its sum each time, and is written as often: to count the different
        # ones, an accelerator would have to be waited for.
        ordered, order = (lanes * self.latents.shape[1] + places).sort(stable=True)
        which = torch.empty_like(order).scatter_(0, order, (ordered.diff(prepend=ordered[:1]) != 0).cumsum(0))
        gradient = torch.cat(gradients)
        return (lanes, places), torch.zeros_like(gradient).index_add_(0, which, gradient)[which]

    def _stored(self, folder: Path, wanted: range) -> Iterator[tuple[int, Any, int]]:
        """Yields the ``wanted`` lanes, each with the open file it is in, and where in that file's tensors it is."""
        missing = set(wanted)
        for path in sorted(folder.glob("latent-rows-*.safetensors")):
            try:
                with safe_open(path, framework="pt") as file:
                    for lane, index in self._lanes_of(path, file, wanted):
                        missing.discard(lane)
                        yield lane, file, index
            except SafetensorError as error:
                raise UserError(f"{path}: damaged latents ({error})") from None
        if missing:
            raise UserError(f"{folder}: {len(missing)} of {len(wanted)} lanes of latents are missing")

    def _lanes_of(self, path: Path, file: Any, wanted: range) -> Iterator[tuple[int, int]]:
        """Yields the ``wanted`` lanes in a file, and where in its tensors they are."""
        layout = file.metadata() or {}
        if layout.get("format") != _FORMAT:
            raise UserError(f"{path}: not a file of latents (format {layout.get('format')!r})")
        if int(layout["lanes"]) != self.lanes:
            raise UserError(f"{path}: latents for batches of {layout['lanes']}, not {self.lanes}")
        if int(layout["instances"]) != self.instances:
            raise UserError(f"{path}: latents of {layout['instances']} instances, not {self.instances}")
        lanes, _, latent_dim = file.get_slice("latents").get_shape()
        if latent_dim != self.latents.shape[2]:
            raise UserError(f"{path}: latents of {latent_dim} numbers, not {self.latents.shape[2]}")
        start = int(layout["first_lane"])
        for lane in range(max(start, wanted.start), min(start + lanes, wanted.stop)):
            yield lane, lane - start

    def _place(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return rows % self.lanes - self.own.start, rows // self.lanes
