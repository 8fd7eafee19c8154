"""The adapter of the FLUX.2 family.

It runs its own denoise steps over the parts of diffusers' pipelines. Klein and dev differ in their
text encoders and in how a prompt is formatted for them.
"""
