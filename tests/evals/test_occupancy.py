import numpy as np
import pytest
import torch
from torchmetrics.image import PeakSignalNoiseRatio

from evals.metrics.reconstruction import joined, mean_metrics, occupancy_scores


def test_scores_by_hand() -> None:
    """Two of eight cells are inside; the model finds one of them and one that is not."""
    targets = -torch.ones(1, 2, 2, 2, 1)
    targets[0, 0, 0, :, 0] = 1
    values = -torch.ones(1, 2, 2, 2, 1)
    values[0, 0, :, 0, 0] = 1
    scores = occupancy_scores(values, targets)
    assert scores["iou"][0] == pytest.approx(1 / 3)
    assert scores["accuracy"][0] == pytest.approx(6 / 8)
    assert scores["psnr"][0] == pytest.approx(-10 * np.log10(2 / 8))


def test_psnr_is_of_occupancies_in_0_1() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, 4, 4, 4, 1, generator=generator)
    targets = torch.where(torch.rand(3, 4, 4, 4, 1, generator=generator) < 0.3, 1.0, -1.0)
    metric = PeakSignalNoiseRatio(data_range=(0.0, 1.0))
    for found, some, target in zip(occupancy_scores(values, targets)["psnr"], values, targets, strict=True):
        assert found == pytest.approx(float(metric(some / 2 + 0.5, target / 2 + 0.5)), abs=1e-4)


def test_drawing_nothing_is_accurate_but_has_no_overlap() -> None:
    targets = -torch.ones(1, 10, 10, 10, 1)
    targets[0, 0] = 1
    scores = occupancy_scores(-torch.ones_like(targets), targets)
    assert scores["accuracy"][0] == pytest.approx(0.9)
    assert scores["iou"][0] == 0
    assert occupancy_scores(-torch.ones_like(targets), -torch.ones_like(targets))["iou"][0] == 1


def test_figures_are_means_with_standard_errors() -> None:
    parts = [{"iou": np.array([0.0, 1.0])}, {"iou": np.array([1.0])}]
    metrics = mean_metrics(joined(parts), "heldout")
    assert metrics["iou_heldout"] == pytest.approx(2 / 3)
    assert metrics["iou_heldout_std"] == pytest.approx(np.std([0, 1, 1], ddof=1) / np.sqrt(3))
