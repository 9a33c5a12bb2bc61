"""Distillation: the formula, its gradient over ranks, and labels of a few images."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from simclr_ray.learn.distillation import distillation


def outputs(rows: int = 6, classes: int = 5) -> torch.Tensor:
    return torch.randn(rows, 2 * classes, generator=torch.Generator().manual_seed(0), dtype=torch.float32)


@pytest.mark.parametrize("temperature", [0.1, 1.0, 2.0])
def test_the_loss_is_the_cross_entropy_of_softened_distributions(temperature: float) -> None:
    z = outputs()
    student, teacher = z.chunk(2, dim=1)
    expected = F.cross_entropy(student / temperature, (teacher / temperature).softmax(1)) * temperature**2
    assert float(distillation(z, temperature=temperature, rows=6).loss) == pytest.approx(float(expected), rel=1e-5)


def test_a_student_that_equals_its_teacher_gets_no_gradient_and_the_teacher_never_one() -> None:
    half = torch.randn(4, 3)
    z = torch.cat([half, half], dim=1).requires_grad_()
    found = distillation(z, temperature=1.0, rows=4)
    found.loss.backward()  # type: ignore[no-untyped-call]
    assert z.grad is not None
    assert z.grad.abs().max() < 1e-6
    assert float(found.accuracy) == 1
    assert float(found.positive_similarity) == pytest.approx(1)
    z = outputs().requires_grad_()
    distillation(z, temperature=0.5, rows=6).loss.backward()  # type: ignore[no-untyped-call]
    assert z.grad is not None
    assert (z.grad[:, 5:] == 0).all()
    assert (z.grad[:, :5] != 0).any()


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_labels_of_a_few_weigh_one_minus_alpha(alpha: float) -> None:
    z, labels = outputs(), torch.tensor([2, -1, -1, 0, -1, 4])
    student, teacher = z.chunk(2, dim=1)
    known = labels >= 0
    expected = alpha * F.cross_entropy(student, teacher.softmax(1)) + (1 - alpha) * F.cross_entropy(
        student[known], labels[known]
    )
    found = distillation(z, temperature=1.0, rows=6, labels=labels, alpha=alpha)
    assert float(found.loss) == pytest.approx(float(expected), rel=1e-5)


def test_no_label_in_a_batch_is_no_nan() -> None:
    found = distillation(outputs(), temperature=1.0, rows=6, labels=torch.full((6,), -1), alpha=0.5)
    assert bool(torch.isfinite(found.loss))


def test_rows_that_are_not_finite_are_counted() -> None:
    z = outputs()
    z[2, 0] = float("nan")
    assert distillation(z, temperature=1.0, rows=6).nonfinite_rows.tolist() == [1]
