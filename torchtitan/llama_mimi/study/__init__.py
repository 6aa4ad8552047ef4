"""Many runs as one: which they are, what they cost, the way of each from training to scores, and to the hub."""
