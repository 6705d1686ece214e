"""Ground floor: values and wire formats. No I/O, no clock, no logging, no environment."""
