"""The tiny model in the layout of FLUX.2 klein: `tiny`."""
