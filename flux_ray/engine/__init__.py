"""The models: one adapter per family turns a prompt and reference images into pixels.

Nothing here knows Ray or HTTP, so that a stage can be tested in a plain process.
"""
