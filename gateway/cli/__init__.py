"""Top floor: the `gateway` command, a file for each family of commands. Reads arguments and prints; decides nothing."""
