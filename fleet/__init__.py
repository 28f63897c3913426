"""The agents as the server sees them."""
