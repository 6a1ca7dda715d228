"""Data of the project: the manifest of frame pairs, which every later stage reads, and what makes or reads one."""
