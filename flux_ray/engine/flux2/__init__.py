"""The FLUX.2 family.

Its step loop over diffusers' parts, and how its text encoders take prompts.
"""
