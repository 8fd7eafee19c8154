"""Price requests in replica seconds: a roofline estimate, corrected by what replicas measured."""
