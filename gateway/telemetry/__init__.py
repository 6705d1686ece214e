"""What is counted of calls, and how it is told: to Prometheus, to OpenTelemetry, in lines of a log."""
