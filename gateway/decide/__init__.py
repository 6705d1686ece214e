"""Middle floor: pure decisions. Given values and `now`, they return values."""
