"""Behind store.py: the SQLite file. SQL stands here and nowhere else."""
