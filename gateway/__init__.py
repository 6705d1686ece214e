"""Genesis Gateway: a sidecar that decides which model answers, sees that one does, caps the bill, keeps the record."""

__version__ = "0.1.0"
