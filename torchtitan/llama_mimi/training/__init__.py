"""Extensions of TorchTitan: checks of settings, loss, optimizer, metrics and validation."""
