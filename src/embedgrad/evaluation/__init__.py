"""Evaluation: is the refined prompt better, and how surely?"""
