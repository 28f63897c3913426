"""Benchmarks of the real server and real agents, each beside the floor of the same machine.

``python -m bench [name ...]`` runs them; see ``python -m bench --help``.
"""
