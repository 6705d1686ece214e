"""Durable state. Today the journal; the ledger's store follows behind the same floor."""
