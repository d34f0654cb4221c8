"""Speed, memory and exactness, measured: of sampling, of training, against the published algorithms and on GPUs.

May import: common, configs, data, models, flows.*, pipeline.*, training.flow.
"""
