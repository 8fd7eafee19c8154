"""Quotas: what keys may have, and what they have had through all gateways. Pure."""
