"""TorchTitan's seams: settings and their checks, loss, metrics, validation."""
