"""How a pipeline inverts its flow's blocks: compiled steps, and what calibrations have found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from torch import Tensor

from tarflow.flows.adapters.adapters import adapters_state
from tarflow.flows.decoding.calibration import BlockChoice, calibrate, conditions_key
from tarflow.flows.decoding.calibration import decodings as calibrated_decodings
from tarflow.flows.decoding.calibration_store import CalibrationStore, file_of, fingerprint, sample_of_weights
from tarflow.flows.decoding.fast_step import OFFLOADED, FastSteps
from tarflow.flows.decoding.method import Decoding
from tarflow.flows.decoding.watch import Calibration
from tarflow.flows.layers.condition import Condition
from tarflow.flows.layers.guidance import Guidance
from tarflow.flows.layers.prepared import is_elsewhere, leaves_after_use
from tarflow.flows.model import TARFlowModel
from tarflow.flows.student import StudentModel
from tarflow.models import FOLDER
from tarflow.pipeline.call.parts import PipelineParts
from tarflow.pipeline.call.student_sampling import NO_STUDENT, check_flow

logger: Any = logging.get_logger(__name__)

#: What tells a flow from another, or from itself with other weights; see `BlockInversion.flow_state`.
FlowState = tuple[TARFlowModel, list[int], bytes, list[tuple[Any, ...]]]


class BlockInversion(PipelineParts):
    """A pipeline's choice of a decoding for each block, its fast steps, and whether its student is of its flow."""

    _fast_student: tuple[StudentModel, Callable[..., Any]] | None = None
    _calibration_store: CalibrationStore | None = None
    _calibrated_state: FlowState | None = None
    _checked_student: tuple[StudentModel, FlowState] | None = None
    _decodings: list[Decoding] | None = None

    def enable_fast_decoding(self, backend: str | None = "inductor") -> None:
        """Compile the student and the sequential decode step (`torch.compile`; about half a minute for each block and
        shape, at their first call). On CUDA devices the step is also replayed as a CUDA graph. This pays for large
        models and many calls, and for a student with small batches.

        Args:
            backend: of `torch.compile`; None only makes CUDA graphs.
        """
        self._fast_steps, self._fast_student = FastSteps(backend), None

    def disable_fast_decoding(self) -> None:
        """Go back to eager steps, and free what was compiled."""
        self._fast_steps = self._fast_student = None

    def usable_fast_steps(self) -> FastSteps | None:
        """Fast steps, if fast decoding is on; none where offloading takes the flow away after each call, with a warning."""
        if self._fast_steps is None or not leaves_after_use(self.flow):
            return self._fast_steps
        logger.warning_once(OFFLOADED)
        self._fast_steps.steps.clear()  # those from before it was offloaded hold its weights
        return None

    def compiled_student(self) -> Callable[..., Any] | None:
        """What `torch.compile` makes of the present student, if fast decoding is on."""
        if self.student is None or self._fast_steps is None or self._fast_steps.backend is None:
            return None
        if self._fast_student is None or self._fast_student[0] is not self.student:
            compiled = torch.compile(self.student, backend=self._fast_steps.backend, dynamic=False)
            self._fast_student = (self.student, compiled)
        return self._fast_student[1]

    @property
    def decodings(self) -> list[Decoding] | None:
        """How the last call inverted each of ``flow.blocks``; None before the first one."""
        return self._decodings

    @property
    def calibrations(self) -> dict[str, list[BlockChoice]]:
        """What "auto" has found so far, by device, dtype, batch and so on: method and times for each block. Nothing where
        weights are fetched for each use."""
        return {} if is_elsewhere(self.flow) else self.calibration_store().choices

    def calibration_store(self) -> CalibrationStore:
        """Calibrations of the flow as it is now; kept in the pipeline's folder if it was loaded from one."""
        state = self.flow_state()
        if self._calibration_store is None or self._calibrated_state != state:
            self._calibrated_state = state
            name = self.config.get("_name_or_path")
            shipped = bool(name) and FOLDER.resolve() in Path(name).resolve().parents
            self._calibration_store = CalibrationStore(file_of(name, shipped), fingerprint(self.flow))
        return self._calibration_store

    def check_student(self) -> StudentModel:
        """The pipeline's student, if it was trained for this flow. Weights that were checked before are not read again
        except for a few numbers; `flow_state` says which changes this can miss."""
        if self.student is None:
            raise ValueError(NO_STUDENT)
        state = (self.student, self.flow_state())
        if state != self._checked_student:
            check_flow(self.student, self.flow, self.config.get("_name_or_path"))
            self._checked_student = state
        return self.student

    def flow_state(self) -> FlowState:
        """What differs when the flow is another one or its weights have changed.

        Not seen is what was written through ``.data`` (``EMAModel.copy_to``, for example) to so few numbers, or to such
        weights, that `sample_of_weights` does not show it.
        """
        # Weights that were made in inference mode have no versions, and cannot be trained.
        versions = [0 if one.is_inference() else one._version for one in self.flow.parameters()]
        # Adapters are merged into weights without a new version.
        return self.flow, versions, sample_of_weights(self.flow), adapters_state(self.flow)

    def resolve_decoding(
        self,
        decoding: Decoding | list[Decoding],
        noise: Tensor,
        cond: Condition,
        null_cond: Condition,
        guidance: Guidance,
    ) -> tuple[list[Decoding], Callable[[int, float], None] | None]:
        """One decoding for each block. Those that are "auto" are replaced by calibrated ones; without a calibration,
        one is made on this very noise. Also returns the function that takes each block's time, by which wrong
        choices are corrected, or None."""
        asked = list(decoding) if isinstance(decoding, list | tuple) else [decoding] * len(self.flow.blocks)
        automatic = [one for one in asked if one.method == "auto"]
        if not automatic:
            found, timed = asked, None
        elif is_elsewhere(self.flow):  # most of the time goes into fetching weights: the fewer passes the better
            found, timed = [Decoding("sequential") if one.method == "auto" else one for one in asked], None
        else:
            tolerances = {one.tolerance for one in automatic}
            alike = len(automatic) == len(asked) and len(tolerances) == 1
            found, timed = self._calibrated(noise, (cond, null_cond, guidance), min(tolerances), alike)
            found = [
                replace(best, tolerance=one.tolerance) if one.method == "auto" else one
                for one, best in zip(asked, found, strict=True)
            ]
        self._decodings = found
        return found, timed

    def _calibrated(
        self,
        noise: Tensor,
        conditions: tuple[Condition, Condition, Guidance],
        tolerance: float,
        timed: bool,
    ) -> tuple[list[Decoding], Callable[[int, float], None] | None]:
        """What calibration has found for each block, for `resolve_decoding`.

        Args:
            conditions: condition, null condition and guidance.
            timed: the blocks' times may be compared with the calibration's, as all of them are inverted as it says.
        """
        store = self.calibration_store()
        grid = self.flow.patchify(noise)[1]
        fast = self.usable_fast_steps()
        key = conditions_key(self.flow, len(noise), grid, conditions[2], tolerance, fast is not None)
        known = store.calibrations.get(key)
        if known is None or known.stale or len(known.choices) != len(self.flow.blocks):
            choices = calibrate(self.flow, noise, *conditions, tolerance, fast)
            known = Calibration(choices, len(noise), 1 if known is None else known.calibrations + 1)
            store.put(key, known)
        if not timed or len(noise) != known.batch:
            return calibrated_decodings(known.choices, tolerance), None
        found = calibrated_decodings(known.plan(doubtful_only=fast is not None), tolerance)
        return found, store.watched(key, [one.method for one in found])
