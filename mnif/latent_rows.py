"""One learned latent for every instance, for as many instances as memory holds.

A step reads and changes the rows of its batch only, so its cost does not depend on the number of instances. The rows
are dealt to lanes, row r to lane r modulo the batch size; every batch has one row of each lane
(:class:`mnif.rows.ShuffledBatches`), and with several processes each owns an equal share of the lanes: their latents and
optimizer states live in that process alone and are never exchanged.
"""

from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mnif.errors import UserError


class LatentRows:
    """A process's share of the latents, with the state of an Adam that moves only the rows it is given.

    Args:
        instances: N, rows over all processes.
        latent_dim: D.
        lanes: the batch size over all processes, a multiple of ``processes``.
        learning_rate: of Adam (Kingma and Ba, 2015); the moments of a row wait while it is not in a batch, as in
            :class:`torch.optim.SparseAdam`.
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
        self.latents = torch.empty(len(self.own), per_lane, latent_dim)
        for index, lane in enumerate(self.own):
            generator = np.random.default_rng([seed, lane])
            self.latents[index] = torch.from_numpy(
                generator.standard_normal((per_lane, latent_dim), dtype=np.float32) * np.float32(0.1)
            )
        self.latents = self.latents.to(device)
        self.mean = torch.zeros_like(self.latents)
        self.square = torch.zeros_like(self.latents)
        self.steps = torch.zeros(self.latents.shape[:2], dtype=torch.int32, device=device)
        self._asked: list[tuple[tuple[Tensor, Tensor], Tensor]] = []

    def take(self, rows: Tensor) -> Tensor:
        """The latents of ``rows`` [B] (of this process's lanes) as [B, D] that collect a gradient for :meth:`step`."""
        place = self._place(rows)
        taken = self.latents[place].requires_grad_()
        self._asked.append((place, taken))
        return taken

    def read(self, rows: Tensor) -> Tensor:
        """The latents of ``rows``, [B, D], without a gradient."""
        return self.latents[self._place(rows)]

    def owns(self, rows: Tensor) -> Tensor:
        """Which rows are of this process's lanes, [B] bool."""
        lane = rows % self.lanes
        return (lane >= self.own.start) & (lane < self.own.stop)

    @torch.no_grad()
    def step(self, factor: float = 1.0) -> None:
        """Moves the rows taken since the last step, by the gradients they have collected.

        Args:
            factor: multiplies the learning rate, for a schedule.
        """
        first, second = self.betas
        for place, taken in self._asked:
            if taken.grad is None:
                continue
            self.steps[place] += 1
            count = self.steps[place][:, None].float()
            mean = self.mean[place].lerp_(taken.grad, 1 - first)
            square = self.square[place].lerp_(taken.grad.square(), 1 - second)
            self.mean[place], self.square[place] = mean, square
            direction = mean / (1 - first**count) / ((square / (1 - second**count)).sqrt() + 1e-8)
            self.latents[place] -= self.learning_rate * factor * direction
        self._asked.clear()

    def save(self, folder: Path) -> None:
        """Writes this process's share to ``folder``, one file for each process."""
        tensors = {
            "latents": self.latents,
            "mean": self.mean,
            "square": self.square,
            "steps": self.steps,
            "own": torch.tensor([self.own.start, self.own.stop]),
        }
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, folder / self._file())

    def load(self, folder: Path) -> None:
        """Reads this process's share back, whatever number of processes wrote it.

        Raises:
            UserError: lanes are missing, or the rows are of another shape.
        """
        found = 0
        for path in sorted(folder.glob("latent-rows-*.safetensors")):
            with safe_open(path, framework="pt") as file:
                start, stop = file.get_tensor("own").tolist()
                for lane in range(max(start, self.own.start), min(stop, self.own.stop)):
                    for name in ("latents", "mean", "square", "steps"):
                        ours, stored = getattr(self, name)[lane - self.own.start], file.get_slice(name)
                        if tuple(stored.get_shape()[1:]) != tuple(ours.shape):
                            raise UserError(f"{path}: rows of another data set or latent size")
                        ours.copy_(stored[lane - start])
                    found += 1
        if found != len(self.own):
            raise UserError(f"{folder}: {found} of {len(self.own)} lanes of latents found; remove this checkpoint")

    def _place(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return rows % self.lanes - self.own.start, rows // self.lanes

    def _file(self) -> str:
        return f"latent-rows-{self.process:05d}-of-{self.processes:05d}.safetensors"


def read_all(folder: Path, rows: int) -> Tensor:
    """The latents of every row, [rows, D], from the files that all processes wrote to ``folder``."""
    shares: dict[int, Tensor] = {}
    for path in sorted(folder.glob("latent-rows-*.safetensors")):
        with safe_open(path, framework="pt") as file:
            shares[int(file.get_tensor("own")[0])] = file.get_tensor("latents")
    lanes = torch.cat([shares[start] for start in sorted(shares)])
    return lanes.transpose(0, 1).flatten(0, 1)[:rows].contiguous()  # row r is number r // lanes of lane r % lanes
