"""Kinds of models that a pipeline may have as its flow, by the names of ``flow.kind`` in a training's settings."""

from __future__ import annotations

from typing import Any

from tarflow.flows.model import TARFlowModel
from tarflow.flows.trajectory.model import TrajectoryFlowModel
from tarflow.flows.trajectory.names import FLOW, TRAJECTORY

#: What a pipeline may have as its flow.
FlowModel = TARFlowModel | TrajectoryFlowModel
KINDS: dict[str, type[TARFlowModel | TrajectoryFlowModel]] = {
    FLOW: TARFlowModel,
    TRAJECTORY: TrajectoryFlowModel,
}


def kind_of(settings: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The kind that a ``flow`` section names, and the model's own settings.

    Raises:
        ValueError: for an unknown kind.
    """
    kind = settings.get("kind", FLOW)
    if kind not in KINDS:
        raise ValueError(f"flow.kind must be one of {', '.join(KINDS)}, got {kind!r}")
    return kind, {key: value for key, value in settings.items() if key != "kind"}


def name_of(model: FlowModel) -> str:
    """The kind of a model."""
    return TRAJECTORY if isinstance(model, TrajectoryFlowModel) else FLOW


def check_flow_kind(model: FlowModel, what: str) -> None:
    """An error if a model is a trajectory model, for what is of flows alone.

    Args:
        what: that, as the subject of a sentence.
    """
    if isinstance(model, TrajectoryFlowModel):
        raise ValueError(
            f"{what} for flows, and this pipeline has a trajectory model, whose likelihood is that of a whole chain of "
            "noise levels and whose pictures have no noise of their own: take another pipeline"
        )
