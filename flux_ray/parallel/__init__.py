"""One model over many ranks: process groups, sharded loading, sequence parallel, precision."""
