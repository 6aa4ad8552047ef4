"""Many runs as one: which they are, what they cost, and the way of each from training to scores.

May import: training, checkpoint, model, data, tokens, audio, common.
"""
