"""Is the refined prompt better, and how sure is that?"""
