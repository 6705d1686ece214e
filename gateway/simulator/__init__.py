"""An OpenAI-compatible server for machines without a key: real HTTP, made-up answers, faults on demand."""
