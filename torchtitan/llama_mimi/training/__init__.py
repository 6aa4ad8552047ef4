"""TorchTitan's seams: settings and their checks, loss, metrics, validation.

May import: job_config, checkpoint, model, data, tokens, audio, common.
"""
