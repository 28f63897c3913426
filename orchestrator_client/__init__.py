"""The Python client of an Orchestrator server, and the command line for its users."""
