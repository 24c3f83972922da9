"""Answers to users' queries with a refined prompt."""
