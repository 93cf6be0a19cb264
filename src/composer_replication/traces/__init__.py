"""Recorded agent work, and the hint sites and preference pairs made from it."""
