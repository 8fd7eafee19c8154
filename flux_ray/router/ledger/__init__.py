"""The ledger, one actor that queues the requests of all gateways, and how they talk to it."""
