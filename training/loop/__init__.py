"""What every training shares: trainer, checkpoints, averages, batches, random draws, schedules, processes, stopping.

May import: common, data.*, flows.*, pipeline.*, vae.
"""
