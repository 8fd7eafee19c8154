"""The weights of tiers: where they come from, how a machine gets them, whether they are whole.

Nothing here loads a model: no torch and no Ray, so that the command and the leader of a replica can
ask before any rank starts. What loads them is in engine/ and parallel/.
"""
