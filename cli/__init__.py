"""The command line: `tarflow generate`, `train`, `evaluate`, `demo`."""
