"""Offline work on what was recorded: reports, replays, reconciliation; the demo; proofs at the scale of days."""
