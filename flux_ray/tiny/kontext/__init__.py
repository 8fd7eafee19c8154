"""The tiny model in the layout of FLUX.1 Kontext: `tiny-flux1`."""
