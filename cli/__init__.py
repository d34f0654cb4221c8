"""The command line: `tarflow generate`, `train`, `train-student`, `evaluate`, `demo`, `models`, `configs`."""
