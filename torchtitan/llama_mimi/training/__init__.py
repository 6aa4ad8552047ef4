"""TorchTitan's hooks: settings and their checks, loss, metrics, validation."""
