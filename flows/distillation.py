"""An inverse autoregressive student of an autoregressive teacher: the same map from noise to data, in one pass a block.

A teacher's block makes x_t = z_t·σ(x_<t) + μ(x_<t). Each x_<t is itself a function of z_<t, so as a function of the
noise this is x_t = z_t·S(z_<t) + M(z_<t): what a student's block is, (z_t − m(z_<t))/s(z_<t), with S = 1/s and
M = −m/s. So the student learns block by block from pairs, and one parallel pass of the teacher over data gives them all:
nothing is drawn. (Parallel WaveNet, van den Oord et al., 2017, has such students too, but trains them on their own
samples.) Shapes: B batch, C channels, H × W.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tarflow.flows.decoding.sampling import generate
from tarflow.flows.likelihood import prior_log_prob
from tarflow.flows.model import TARFlowModel


def check_pair(teacher: TARFlowModel, student: TARFlowModel) -> None:
    """An error unless the student can learn the teacher's blocks one by one."""
    kinds = teacher.config.block, student.config.block
    if kinds != ("autoregressive", "inverse_autoregressive"):
        raise ValueError(f"a teacher is 'autoregressive' and its student 'inverse_autoregressive', got {kinds}")
    orders = [[block.config.order for block in model.blocks] for model in (teacher, student)]
    if orders[0] != orders[1]:
        raise ValueError(f"teacher and student must have the same blocks in the same orders, got {orders}")


def distillation_loss(
    teacher: TARFlowModel,
    student: TARFlowModel,
    x: Tensor,
    class_labels: Tensor | None = None,
) -> Tensor:
    """How far the student's blocks are from inverting the teacher's, a scalar: the mean squared error of what each
    makes of the noise side of its pair, averaged over blocks.

    Args:
        teacher: a trained autoregressive `TARFlowModel`; it gets no gradients.
        student: an inverse autoregressive one with as many blocks in the same orders.
        x: data with the training noise (B, C, H, W).
        class_labels: the condition of both.

    Raises:
        ValueError: for models that are no such pair.
    """
    check_pair(teacher, student)
    with torch.no_grad():
        _, _, outputs = teacher(x, class_labels, return_block_outputs=True)
    condition = student.condition(class_labels, None, len(x))
    errors = []
    for block, data, noise in zip(student.blocks, [x, *outputs[:-1]], outputs, strict=True):
        tokens, grid = student.patchify(noise)
        made, _ = block.inverse(tokens, grid, condition)
        errors.append((made - student.patchify(data)[0]).pow(2).mean())
    return torch.stack(errors).mean()


@torch.no_grad()
def sample_divergence(
    teacher: TARFlowModel,
    student: TARFlowModel,
    z: Tensor,
    class_labels: Tensor | None = None,
) -> Tensor:
    """log p_student(x) − log p_teacher(x) in nats of the student's own samples, (B,); its mean estimates the
    Kullback–Leibler divergence of the teacher from the student, and one pass of each gives it.

    Args:
        teacher, student, class_labels: as of `distillation_loss`.
        z: noise (B, C, H, W).
    """
    x, log_det = generate(student, z, student.condition(class_labels, None, len(z)))
    of_student = prior_log_prob(z, student.prior_variance_image()) + log_det
    teacher_z, teacher_log_det = teacher(x, class_labels)
    return of_student - prior_log_prob(teacher_z, teacher.prior_variance_image()) - teacher_log_det
