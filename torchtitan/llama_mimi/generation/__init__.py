"""Continue speech with a converted model."""
