"""Run one model on many ranks: process groups, sharded loading, sequence parallel, quantization.

Nothing here knows a model family: models are diffusers' and transformers' own modules.
"""
