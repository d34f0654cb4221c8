"""Names of the kinds of models that a pipeline may have as its flow, apart from what computes."""

FLOW, TRAJECTORY = "flow", "trajectory"
