"""The public HTTP API, one module for each resource."""
