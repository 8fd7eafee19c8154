"""The ledger: the books of the cluster, the actor that keeps them, and how gateways talk to it."""
