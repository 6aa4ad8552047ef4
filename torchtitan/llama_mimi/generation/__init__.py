"""A converted model at work: speech that goes on."""
