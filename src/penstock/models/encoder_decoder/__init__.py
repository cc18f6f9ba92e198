"""Models with an encoder that reads the prompt and a decoder that writes the answer: T5 and its kin.

The encoder computes a prompt once, whole, in the step in which its request starts; each decoder layer keeps keys and
values of what came out, in the blocks of the sequence, and those of its own tokens behind them.
"""
