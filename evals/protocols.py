"""The protocols pictures are compared under: a number means nothing without its own.

The presets fix what published numbers differ in: extractor and its input range, resize filter, rounding, which part of
the reference, how many samples, and the neighbours of precision and recall.
"""

from dataclasses import dataclass, replace
from typing import Literal

from evals.arguments import EvalArguments
from evals.extractors.resizing import RESIZES, Resize
from mnif.errors import UserError

Part = Literal["half", "train", "all"]


@dataclass(frozen=True)
class Protocol:
    """How pictures are compared.

    Attributes:
        extractor: by name.
        resize: a filter of :data:`evals.extractors.resizing.RESIZES`.
        grey: the value in 0..255 that Inception sees as 0.
        quantise: whether a model's pictures are rounded to uint8, as files hold them; if not, they are clamped only.
        part: of the reference: all of it, what was trained on, or one half of its designs, so that the other half
            measures the floor under the same conditions.
        num_samples: how many.
        neighbours: k of precision, recall, density and coverage.
    """

    extractor: str
    resize: str
    grey: float
    quantise: bool
    part: Part
    num_samples: int
    neighbours: int

    @property
    def resizing(self) -> Resize:
        """The filter."""
        return RESIZES[self.resize]


PRESETS = {
    "offline": Protocol("lite0", "bicubic-antialias", 128, True, "half", 1000, 5),
    "paper": Protocol("inception", "bilinear", 127.5, False, "train", 50_000, 3),
    "pytorch-fid": Protocol("inception", "bilinear", 127.5, True, "all", 50_000, 5),
    "clean": Protocol("inception", "pillow-bicubic", 128, True, "all", 50_000, 5),
    "tf1": Protocol("inception", "tf1-bilinear", 128, True, "all", 50_000, 5),
}
"""``paper`` is You et al., NeurIPS 2023: pytorch-fid on unrounded pictures, against the training set, with k = 3."""


def protocol_of(asked: EvalArguments) -> Protocol:
    """The preset with what the flags change in it.

    Raises:
        UserError: a number is out of range.
    """
    protocol = PRESETS[asked.preset]
    for flag, least in (("num_samples", 2), ("neighbours", 1)):
        value = getattr(asked, flag)
        if value is not None and value < least:
            raise UserError(f"--{flag} {value}: at least {least} {'are' if least > 1 else 'is'} needed")
        if value is not None:
            protocol = replace(protocol, **{flag: value})
    return replace(protocol, extractor=asked.extractor or protocol.extractor)
