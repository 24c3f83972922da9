"""Rows in: files and Hub data sets, read, checked and split."""
