"""Upper floor: everything that waits on a socket."""
