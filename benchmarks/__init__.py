"""Speed, memory and exactness, measured: of sampling, of training, of reading data, against the published algorithms and on GPUs.

May import: common, configs, data, data.stream, models, flows.*, pipeline.*, training.flow, training.loop.
"""
