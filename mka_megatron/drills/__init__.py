"""Fault drills: one tiny run whose ranks are killed, stopped and interrupted, watched through its files."""
