"""The program that runs jobs on a machine."""
