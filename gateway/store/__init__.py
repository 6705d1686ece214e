"""Durable state: the journal of this process, and the store that all processes share."""
