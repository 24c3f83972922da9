"""Everything that a recipe can name, one file for each part."""
